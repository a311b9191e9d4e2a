"""The other workers of the app: who owns a partition, and asking them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import aiohttp
import msgspec

from streamproc.core import limits
from streamproc.web.answers import Refused

__all__ = ["HOP", "Told", "Workers"]

HOP: Final = "X-Streamproc-Hop"
"""Header of a forwarded question: whoever gets it answers from what it holds and asks nobody."""


class Told(NamedTuple):
    """What a worker said: an answer, or why there is none."""

    worker: str
    answer: Any
    problem: str | None = None


class Workers:
    """Addresses come from the metadata that Faust's assignor shares within the consumer group, so they are as old as
    the last rebalance; the embedded log has one worker and no such metadata."""

    def __init__(self, app: Any, token: str | None) -> None:
        self._app, self._token = app, token

    @property
    def own(self) -> str:
        return str(self._app.conf.canonical_url).rstrip("/")

    def others(self) -> list[str]:
        """Every other worker that holds a partition."""
        return sorted({str(url).rstrip("/") for url in self._distribution()} - {self.own})

    def owner(self, topics: Sequence[str], partition: int) -> str | None:
        """Who holds ``partition`` of ``topics``, as far as it is known."""
        for url, held in self._distribution().items():
            if any(partition in held.get(topic, ()) for topic in topics):
                return str(url).rstrip("/")
        return None

    def _distribution(self) -> Mapping[str, Mapping[str, Sequence[int]]]:
        found: Mapping[str, Mapping[str, Sequence[int]]] = self._app.assignor.external_topics_metadata()
        return found

    async def ask(self, worker: str, path: str, parameters: Mapping[str, str]) -> Any:
        """The worker's answer. `Refused` with its own status and message, or 503 if it cannot be reached."""
        headers = {HOP: "1"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            async with asyncio.timeout(limits.WEB_WORKER_TIMEOUT_S):
                async with self._app.http_client.get(
                    worker + path, params=dict(parameters), headers=headers, allow_redirects=False
                ) as response:
                    status, body = response.status, await response.read()
            answer = msgspec.json.decode(body)
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as away:
            raise Refused(
                503, f"The worker {worker} does not answer: {type(away).__name__}.",
                "Ask again: after a rebalance another one owns its partitions.", worker=worker,
            ) from away  # fmt: skip
        if status != 200:
            error = answer.get("error", {}) if isinstance(answer, dict) else {}
            message = error.pop("message", f"The worker {worker} answered {status}.")
            error.pop("status", None)
            raise Refused(status if status in (400, 404, 503) else 502, message, **{**error, "worker": worker})
        return answer

    async def ask_others(self, path: str, parameters: Mapping[str, str]) -> list[Told]:
        """Every other worker's answer, or its problem, side by side."""

        async def one(worker: str) -> Told:
            try:
                return Told(worker, await self.ask(worker, path, parameters))
            except Refused as refused:
                return Told(worker, None, str(refused))

        return list(await asyncio.gather(*map(one, self.others())))
