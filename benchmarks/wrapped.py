"""A transport of which only what its fetchers do at a resume differs: how jobs see, or hold back, the reading of orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import Fetcher, Transport

__all__ = ["WrappedFetcher", "WrappedTransport"]


class WrappedTransport:
    """Each fetcher is what ``wrap`` makes of the transport's; all else is the transport's own."""

    def __init__(self, transport: Transport, wrap: Callable[[Fetcher], Fetcher]) -> None:
        self._transport, self._wrap = transport, wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def fetcher(self) -> Fetcher:
        return self._wrap(self._transport.fetcher())


class WrappedFetcher:
    """Does what the fetcher does, but for what a subclass does instead."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self.get, self.at_end, self.lag, self.close = fetcher.get, fetcher.at_end, fetcher.lag, fetcher.close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fetcher, name)

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        self._fetcher.resume(tp, position)

    def pause(self, tp: TopicPartition) -> None:
        self._fetcher.pause(tp)
