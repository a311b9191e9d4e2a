"""Server-sent events: each open page is told the overview once a second, all of them the same one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from streamproc.core import limits
from streamproc.core.clock import Clock
from streamproc.core.errors import StreamprocError
from streamproc.web.answers import Refused, encode
from streamproc.web.security import refusal

__all__ = ["Live"]


class Live:
    """At most `WEB_STREAMS_MAX` pages; they are let go when the server stops, which would wait for them otherwise."""

    def __init__(self, read: Callable[[], Awaitable[dict[str, Any]]], clock: Clock) -> None:
        self._read, self._clock = read, clock
        self._open: set[asyncio.Task[Any]] = set()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        if len(self._open) >= limits.WEB_STREAMS_MAX:
            return refusal(Refused(503, f"{len(self._open)} pages are kept up to date already.", "Close one of them."))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        running = asyncio.current_task()
        assert running is not None
        self._open.add(running)
        try:
            while True:
                await self._tell(response)
                await self._clock.sleep(limits.WEB_EVENT_INTERVAL_S)
        except (ConnectionError, TimeoutError):
            return response  # the page was closed
        finally:
            self._open.discard(running)

    async def _tell(self, response: web.StreamResponse) -> None:
        try:
            event = b"event: overview\ndata: " + encode(await self._read()) + b"\n\n"
        except StreamprocError as failure:
            event = b"event: problem\ndata: " + encode({"message": str(failure)}) + b"\n\n"
        async with asyncio.timeout(limits.WEB_SEND_TIMEOUT_S):
            await response.write(event)

    async def close(self, _: object = None) -> None:
        """End every stream."""
        for running in self._open:
            running.cancel()
        if self._open:
            await asyncio.wait(self._open)
