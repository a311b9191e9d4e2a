"""An event loop in virtual time for several simulated processes, with a seeded schedule.

Time stands still while anything can run and jumps to the next timer when nothing can, so a run takes as long as its
computing does. Whatever is started inside a `Process` belongs to it (by its context): it can be paused, and it can die,
after which nothing of it runs again: no `finally`, no callback, no timer. Between processes the order is drawn from the
seed; within one it is asyncio's, first come first served.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import heapq
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, TypeVar

from streamproc.core.errors import invariant

__all__ = [
    "Life", "Process", "Stuck", "VirtualClock", "VirtualLoop",
    "bury", "current_process", "unless_abandoned", "virtual_loop",
]  # fmt: skip

T = TypeVar("T")
_CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("simulated_process", default=None)
STEPS_MAX = 600_000
"""Callbacks of one run; a run that needs more spins."""


class Stuck(AssertionError):
    """Nothing can run and no timer is set, or something runs for ever."""


class Life(Enum):
    """A process runs, stands still (SIGSTOP) or is dead (SIGKILL)."""

    ALIVE = "alive"
    PAUSED = "paused"
    DEAD = "dead"


class Process:
    """One life of one worker."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.life = Life.ALIVE
        self.context = contextvars.copy_context()
        self.context.run(_CURRENT.set, self)
        self.tasks: list[asyncio.Task[Any]] = []
        """All it ever started: an abandoned coroutine must not be collected, which would run its `finally`."""
        self._held: deque[_Handle] = deque()

    @property
    def dead(self) -> bool:
        return self.life is Life.DEAD


def current_process() -> Process | None:
    """Whose code is running; None: the harness's."""
    return _CURRENT.get()


class _Handle:
    """What `asyncio.Handle` and `TimerHandle` are to their loop's users."""

    __slots__ = ("args", "callback", "context", "gone", "process", "when_s")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context | None,
                 when_s: float = 0.0) -> None:  # fmt: skip
        self.callback, self.args, self.when_s, self.gone = callback, args, when_s, False
        self.context = context if context is not None else contextvars.copy_context()
        self.process = self.context.get(_CURRENT)

    def cancel(self) -> None:
        self.gone = True

    def cancelled(self) -> bool:
        return self.gone

    def when(self) -> float:
        return self.when_s


class VirtualLoop(asyncio.AbstractEventLoop):
    """See the module. ``dice`` orders the processes."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._now_s = 1_000.0
        self._ready: dict[Process | None, deque[_Handle]] = {}
        self._timers: list[tuple[float, int, _Handle]] = []
        self._count = itertools.count()
        self._running = False
        self.failures: list[BaseException] = []
        """What callbacks and tasks failed with and nobody fetched."""

    # ---- what asyncio asks of a loop

    def time(self) -> float:
        return self._now_s

    # What they return is a handle of ours: asyncio's reach into their own loop.
    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        handle = _Handle(callback, args, context)
        self._push(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        return self.call_at(self._now_s + max(delay, 0.0), callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        handle = _Handle(callback, args, context, when)
        heapq.heappush(self._timers, (when, next(self._count), handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: contextvars.Context | None = None,
                    **options: Any) -> asyncio.Task[Any]:  # fmt: skip
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        process = (context or contextvars.copy_context()).get(_CURRENT)
        if process is not None:
            process.tasks.append(task)
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """At once: there are no threads."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as failure:  # it is the caller's, as from a thread
            done.set_exception(failure)
        return done

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return False

    def get_exception_handler(self) -> None:
        return None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        failure = context.get("exception")
        if failure is not None:
            self.failures.append(failure)

    default_exception_handler = call_exception_handler

    # ---- processes

    def start(self, process: Process, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``coroutine`` as the process's own."""
        return process.context.copy().run(self.create_task, coroutine, context=process.context.copy())

    def pause(self, process: Process) -> None:
        invariant(process.life is Life.ALIVE, f"{process.name} cannot be paused: it is {process.life}.")
        process.life = Life.PAUSED

    def go_on(self, process: Process) -> None:
        """What it would have run meanwhile it runs now."""
        if process.life is Life.PAUSED:
            process.life = Life.ALIVE
            held, process._held = process._held, deque()
            for handle in held:
                self._push(handle)

    def kill(self, process: Process) -> None:
        """Nothing of it runs again."""
        process.life = Life.DEAD
        process._held.clear()
        self._ready.pop(process, None)
        for task in process.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own switch for abandoned tasks

    # ---- running

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run ``main`` to its end. Raises what it raises, `Stuck` if it can never end."""
        task: asyncio.Task[T] = self.create_task(main, name="harness")
        asyncio._set_running_loop(self)
        self._running = True
        try:
            for _ in range(STEPS_MAX):
                if task.done():
                    return task.result()
                self._step()
            raise Stuck(f"{STEPS_MAX} callbacks were run, at {self._now_s - 1_000:.1f} s: something spins.")
        finally:
            self._running = False
            asyncio._set_running_loop(None)

    def _push(self, handle: _Handle) -> None:
        process = handle.process
        if process is None or process.life is Life.ALIVE:
            self._ready.setdefault(process, deque()).append(handle)
        elif process.life is Life.PAUSED:
            process._held.append(handle)

    def _step(self) -> None:
        if not self._ready:
            self._jump()
            return
        owners = list(self._ready)
        owner = owners[0] if len(owners) == 1 else owners[self._dice.randrange(len(owners))]
        queue = self._ready[owner]
        handle = queue.popleft()
        if not queue:
            del self._ready[owner]
        if owner is not None and owner.life is Life.PAUSED:
            owner._held.append(handle)
        elif not handle.gone:
            handle.context.run(self._run_one, handle)

    def _run_one(self, handle: _Handle) -> None:
        try:
            handle.callback(*handle.args)
        except Exception as failure:  # a callback's, as in any loop: noted, and the loop goes on
            self.failures.append(failure)

    def _jump(self) -> None:
        timers = self._timers
        while timers and (timers[0][2].gone or (timers[0][2].process is not None and timers[0][2].process.dead)):
            heapq.heappop(timers)
        if not timers:
            raise Stuck("Nothing can run and no timer is set: everybody waits for somebody.")
        self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            handle = heapq.heappop(timers)[2]
            if not handle.gone:
                self._push(handle)


def virtual_loop(seed: object) -> VirtualLoop:
    """A loop whose order is drawn from ``seed``. What a simulated run has no use for (sockets, signals) is not there."""
    return VirtualLoop(random.Random(f"order {seed}"))  # type: ignore[abstract]


def bury() -> None:
    """Free what dead workers left. Python runs the `finally` of each of their coroutines on the way, and what these start
    or wait for must go too: asyncio's default loop, where it would else end up, never runs and keeps it for ever."""
    found = True
    while found:
        asyncio._set_running_loop(virtual_loop("nobody's"))
        try:
            found = gc.collect() > 0
        finally:
            asyncio._set_running_loop(None)


def unless_abandoned(what: sys.UnraisableHookArgs) -> None:
    """`sys.unraisablehook` while coroutines are abandoned: their `finally` can reach nothing any more, and fails."""
    if not isinstance(what.object, types.CoroutineType | types.AsyncGeneratorType):
        sys.__unraisablehook__(what)


class VirtualClock:
    """`core.clock.Clock` of one process over the loop's time. ``skew_ms`` may be moved at will, also back."""

    def __init__(self, loop: VirtualLoop, epoch_ms: int) -> None:
        self._loop, self._epoch_ms = loop, epoch_ms
        self.skew_ms = 0

    def now_ms(self) -> int:
        return self._epoch_ms + self.skew_ms + int(self._loop.time() * 1000)

    def monotonic_s(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
