"""An answer that many share: asked again when it has grown old, by one of them, and never waited for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from streamproc.core import limits
from streamproc.core.clock import Clock
from streamproc.core.errors import Retryable

__all__ = ["Fresh"]

T = TypeVar("T")


class Fresh(Generic[T]):
    """``ask`` is called at most once per ``age_s``, however many want to know."""

    def __init__(self, ask: Callable[[], Awaitable[T]], clock: Clock, first: T, *,
                 age_s: float = limits.WEB_EVENT_INTERVAL_S) -> None:  # fmt: skip
        self._ask, self._clock, self._value, self._age_s = ask, clock, first, age_s
        self._asked_s: float | None = None
        self._running: asyncio.Task[None] | None = None
        self.problem: str | None = None
        """Why the answer is older than it should be."""

    async def get(self, *, patience_s: float = limits.WEB_PATIENCE_S) -> T:
        """An answer younger than ``age_s``; the last one there was if that takes longer than ``patience_s``."""
        now_s = self._clock.monotonic_s()
        if self._running is None and (self._asked_s is None or now_s - self._asked_s >= self._age_s):
            self._asked_s = now_s
            self._running = asyncio.create_task(self._renew(), name="web answer")
        if (running := self._running) is not None:
            await asyncio.wait({running}, timeout=patience_s)
            if running.done():
                running.result()
        return self._value

    async def _renew(self) -> None:
        try:
            self._value = await self._ask()
            self.problem = None
        except Retryable as away:
            self.problem = str(away)
        finally:
            self._running = None

    def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
