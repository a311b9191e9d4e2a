"""Time and sleeping, passed in. Nothing else in the package reads a clock or sleeps; a simulation passes its own."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """Processing time."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch, UTC. May step back; nothing that must not go back is derived from it."""

    def monotonic_s(self) -> float:
        """Seconds that never step back, of no fixed origin."""

    async def sleep(self, seconds: float) -> None:
        """Return after ``seconds`` of this clock's time."""


class SystemClock:
    """The machine's own clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
