"""What an answer is made of: plain JSON values, the parameters of a question, and refusals that say what to do.

JSON has no room for some values. The rules, the same everywhere:

- times are integers, milliseconds since the epoch in UTC; dates and times of day are ISO text, durations milliseconds
- integers beyond ±2^53 are text, because JavaScript would round them
- ``NaN`` and the infinities are text: ``"NaN"``, ``"Infinity"``, ``"-Infinity"``
- bytes are base64 text; tuples and sets are arrays
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from difflib import get_close_matches
from typing import Any, Final

import msgspec

from streamproc.core import limits
from streamproc.core.errors import StreamprocError

__all__ = ["Question", "Refused", "encode", "nearest", "plain", "read_time"]

EXACT_MAX: Final = 1 << 53
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


class Refused(StreamprocError):
    """A question that is answered with an error: its HTTP ``status``, what is wrong, and what to do."""

    def __init__(self, status: int, fact: str, remedy: str = "", **more: Any) -> None:
        super().__init__(f"{fact} {remedy}".rstrip())
        self.status, self.more = status, more

    def body(self) -> dict[str, Any]:
        return {"error": {"status": self.status, "message": str(self), **self.more}}


def encode(value: Any) -> bytes:
    """JSON of plain values."""
    return msgspec.json.encode(value)


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return value if -EXACT_MAX <= value <= EXACT_MAX else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else _not_finite(value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _as_text(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(part) for part in value), key=lambda part: (type(part).__name__, str(part)))
    return _plain_time(value)


def _plain_time(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return (moment - _EPOCH) // _MILLISECOND
    if isinstance(value, timedelta):
        return plain(value // _MILLISECOND)
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value)


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _as_text(key: Any) -> str:
    return encode(plain(key)).decode()


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the names that ``name`` may have been meant to be."""
    names = sorted(known)
    if not names:
        return "There is none."
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"There is: {', '.join(names[:20])}."


def read_time(text: str, what: str) -> int:
    """Milliseconds, or ISO 8601 (UTC where it names no zone)."""
    try:
        if text.lstrip("-").isdecimal():
            moment = int(text)
        else:
            # A '+' that was not escaped arrives as a blank.
            parsed = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
            moment = (parsed.replace(tzinfo=parsed.tzinfo or UTC) - _EPOCH) // _MILLISECOND
    except (ValueError, OverflowError):
        moment = 1 << 63
    if -(1 << 63) <= moment < 1 << 63:
        return moment
    raise Refused(400, f"{what}={text!r} is not a time.", "Write 2013-01-02T11:00:00Z or milliseconds since 1970.")


class Question:
    """The parameters of a request, each taken once; what is left over was misspelt."""

    def __init__(self, parameters: Iterable[tuple[str, str]]) -> None:
        self._left: dict[str, str] = {}
        for name, value in parameters:
            if name in self._left:
                raise Refused(400, f"The parameter {name} is there twice.")
            if len(value) > limits.WEB_TEXT_MAX:
                raise Refused(400, f"The parameter {name} has {len(value)} characters.",
                              f"Up to {limits.WEB_TEXT_MAX} are read.")  # fmt: skip
            self._left[name] = value
        self._known: set[str] = set()

    def text(self, name: str) -> str | None:
        self._known.add(name)
        return self._left.pop(name, None)

    def count(self, name: str, default: int, most: int) -> int:
        """A number from 1 to ``most``; more is ``most``."""
        text = self.text(name)
        if text is None:
            return default
        if not text.isdecimal() or int(text) < 1:
            raise Refused(400, f"{name}={text!r} is not a number from 1 to {most}.")
        return min(int(text), most)

    def time(self, name: str) -> int | None:
        text = self.text(name)
        return None if text is None else read_time(text, name)

    def done(self, *more: str) -> None:
        """Refuse whatever nobody asked for; ``more`` names parameters that may also be there."""
        for name in self._left:
            known = self._known | set(more)
            raise Refused(400, f"There is no parameter {name!r}.", nearest(name, known), parameter=name)
