"""Connections that all tasks of one worker share: one resource per event loop and address, counted, bounded by its
maker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from streamproc.core.errors import invariant

__all__ = ["Shared"]

T = TypeVar("T")


class Shared(Generic[T]):
    """``make(address)`` on the first `acquire` in a loop, ``close`` on the last `release`. ``make`` does no I/O."""

    def __init__(self, make: Callable[[str], T], close: Callable[[T], Awaitable[None]]) -> None:
        self._make, self._close = make, close
        self._held: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, tuple[T, int]]] = WeakKeyDictionary()

    def acquire(self, address: str) -> T:
        """The resource of the running loop; each call is paid back by one `release`."""
        held = self._held.setdefault(asyncio.get_running_loop(), {})
        entry = held.get(address)
        resource = entry[0] if entry else self._make(address)
        held[address] = (resource, entry[1] + 1 if entry else 1)
        return resource

    async def release(self, address: str) -> None:
        held = self._held.get(asyncio.get_running_loop(), {})
        invariant(address in held, "A shared connection was released more often than acquired.")
        resource, users = held[address]
        if users > 1:
            held[address] = (resource, users - 1)
            return
        del held[address]
        await self._close(resource)
