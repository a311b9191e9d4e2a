"""What a peer's worker is told, and how it says that its first record is there. Standard library only."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["FIRST", "Told", "say_first", "schema", "told"]

FIRST: Final = "@@first "
"""Begins the line of the first record; the process's CPU seconds until then follow."""
_VARIABLE: Final = "PEER_BENCHMARK"


@dataclass(frozen=True)
class Told:
    """One run of one job. Times in ms."""

    job: str
    """pipeline, count or forward."""
    bootstrap: str
    source: str
    output: str
    app_id: str
    """Also the consumer group; every topic that the worker makes has it in its name."""
    folder: str
    """Where the worker keeps its state."""
    partitions: int
    schema_id: int
    window_ms: int
    grace_ms: int
    """How late an order may be for engines whose clock is the greatest time seen in any partition."""
    disorder_ms: int
    """How late it may be for engines with a watermark per partition."""
    remembered_ms: int
    """How long a repeated order is known."""
    commit_ms: int

    @property
    def paid(self) -> str:
        """The topic between the two agents of Faust's ``pipeline``."""
        return f"{self.app_id}-paid"

    @property
    def head(self) -> bytes:
        """What stands before each value in Confluent's wire format."""
        return b"\0" + self.schema_id.to_bytes(4, "big")

    def environment(self) -> dict[str, str]:
        """For the worker's process."""
        return {_VARIABLE: json.dumps(asdict(self))}


def told() -> Told:
    """What this process was told."""
    return Told(**json.loads(os.environ[_VARIABLE]))


def schema() -> dict[str, Any]:
    """That of the orders, with the event time as a bare long: so no engine makes a datetime of each."""
    text = (Path(__file__).resolve().parents[2] / "schemas" / "order.avsc").read_text()
    found: dict[str, Any] = json.loads(text)
    for field in found["fields"]:
        if isinstance(field["type"], dict):
            field["type"] = field["type"]["type"]
    return found


def say_first() -> None:
    """To be called at the first record, once."""
    print(f"{FIRST}{time.process_time()}", flush=True)
