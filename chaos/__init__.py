"""Exactly-once under real kills: ``make chaos`` (see `chaos.__main__`)."""

from typing import Final

__all__ = ["MOMENTS"]

MOMENTS: Final = (
    "within an epoch",
    "before produce",
    "after produce",
    "before EndTxn",
    "after EndTxn",
    "before a sink",
    "after a sink",
)
"""When a worker can be killed (see `chaos.worker`)."""
