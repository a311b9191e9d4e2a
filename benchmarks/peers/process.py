"""A peer's worker, watched from outside: CPU time and memory of its process and all its children, as a line of samples."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import psutil  # type: ignore[import-untyped]

from benchmarks.peers.engine import Command
from benchmarks.peers.jobs.told import FIRST
from streamproc.core.clock import Clock
from streamproc.core.errors import UserError

__all__ = ["Process", "Sample", "last_busy", "started"]

STOP_S_MAX: Final = 20.0
TAIL_LINES: Final = 40
BUSY: Final = 0.25
"""Of one core, between one sample and the one after the next. A JVM with nothing to do stays far below."""


class Sample(NamedTuple):
    at_s: float
    cpu_s: float
    committed: int
    """Input records behind a committed position."""


class Process:
    """Made by `started`."""

    def __init__(self, process: asyncio.subprocess.Process, first: str, clock: Clock) -> None:
        self._process, self._first, self._clock = process, first, clock
        self._watched = psutil.Process(process.pid)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader = asyncio.create_task(self._read())
        self._cpu_s = 0.0
        self.started_s = clock.monotonic_s()
        self.first: Sample | None = None
        self.rss_mb = 0.0
        """The most that was seen at once."""

    def sample(self, committed: int) -> Sample:
        """Raises `UserError` with the end of its output when it has ended."""
        if self._process.returncode is not None:
            raise UserError(
                f"The worker ended with code {self._process.returncode}.",
                remedy=f"The end of its output:\n{''.join(self._tail)}",
            )
        return Sample(self._clock.monotonic_s(), self._look(), committed)

    def give_up(self, why: str) -> UserError:
        return UserError(why, remedy=f"The end of the worker's output:\n{''.join(self._tail)}")

    def _look(self) -> float:
        cpu = rss = 0.0
        with suppress(psutil.NoSuchProcess):
            for one in (self._watched, *self._watched.children(recursive=True)):
                times = one.cpu_times()
                cpu += times.user + times.system
                rss += one.memory_info().rss
        self.rss_mb = max(self.rss_mb, rss / 1e6)
        self._cpu_s = max(self._cpu_s, cpu)
        return self._cpu_s

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            line = raw.decode(errors="replace")
            self._tail.append(line)
            if self.first is None and self._first in line:
                # What the worker says of its own clock is sharper than what is seen when the line arrives.
                told = line.partition(FIRST)[2] if self._first == FIRST else ""
                self.first = Sample(self._clock.monotonic_s(), float(told) if told else self._look(), 0)

    async def end(self) -> None:
        """As a user does it; after that, as the machine does."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)  # the group that was started here, none else
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_S_MAX)
        await self._reader


@asynccontextmanager
async def started(command: Command, folder: Path, first: str, clock: Clock) -> AsyncIterator[Process]:
    """The worker, until the end of the block. ``first``: what stands in the line that it prints at its first record."""
    arguments, environment = command
    process = await asyncio.create_subprocess_exec(
        *arguments, cwd=folder, env={**os.environ, **environment}, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    worker = Process(process, first, clock)
    try:
        yield worker
    finally:
        await worker.end()


def last_busy(samples: list[Sample]) -> Sample:
    """The last sample before which the process used more than `BUSY` of a core; the first one if it never did."""
    for before, sample in zip(reversed(samples[:-2]), reversed(samples[2:]), strict=True):
        if sample.cpu_s - before.cpu_s > BUSY * (sample.at_s - before.at_s):
            return sample
    return samples[0]
