"""Durations as users write them: Polars strings or `timedelta`."""

from __future__ import annotations

import re
from datetime import timedelta

from streamproc.core.errors import UserError

__all__ = ["Duration", "milliseconds"]

Duration = str | timedelta
_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_PART = re.compile(r"(\d+)(ms|s|m|h|d|w)")


def milliseconds(duration: Duration, *, setting: str, where: str | None = None) -> int:
    """``"1h30m"`` or a `timedelta` as milliseconds; anything else is a `UserError` that names ``setting``.

    Units are Polars's ms, s, m, h, d, w; d and w are 24 hours and 7 days (calendar units have no fixed length).
    """
    if isinstance(duration, timedelta):
        value = round(duration.total_seconds() * 1000)
    else:
        parts = _PART.findall(duration) if isinstance(duration, str) else []
        if not parts or "".join(n + u for n, u in parts) != duration:
            raise UserError(
                f"{setting}={duration!r} is not a duration.",
                remedy='Write for example "90s", "5m", "1h30m", "1d" or a datetime.timedelta.',
                where=where,
            )
        value = sum(int(n) * _UNITS_MS[u] for n, u in parts)
    if value < 0:
        raise UserError(f"{setting}={duration!r} is negative.", remedy="Give a duration of zero or more.", where=where)
    return value
