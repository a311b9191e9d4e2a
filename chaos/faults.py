"""What is done to a running job: one fault every few seconds, out of a shuffled deck, all of it decided by the seed."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from chaos import MOMENTS
from chaos.machine import Machine, Worker
from streamproc.core.clock import Clock

__all__ = ["Faults"]

BETWEEN_S: Final = (2.0, 5.0)
DOWN_S: Final = (0.0, 3.0)
"""From an end to the next start."""
PAUSE_S: Final = (7.5, 10.0)
"""Longer than the session time-out of 6 s: others own the tasks when the worker wakes."""
WAIT_S: Final = 15.0
"""How long a fault waits for a worker that holds tasks."""
LOOK_S: Final = 0.05


class Faults:
    """``run`` until told to stop; everything that was stopped runs again when it returns."""

    def __init__(self, machine: Machine, seed: int, clock: Clock, say: Callable[[str], None]) -> None:
        self._machine, self._clock, self._say = machine, clock, say
        self._rng = random.Random(f"faults {seed}")
        self._moments: list[str] = []
        self._background: set[asyncio.Task[None]] = set()
        self.kills = self.pauses = self.restarts = 0
        self.done: Counter[str] = Counter()
        """How often what was done."""
        self.uncommitted = 0
        """Kills and pauses of workers that had read beyond their last commit."""
        self.failures: list[str] = []
        self.broker_down_s = -1e9
        """When the broker was last seen down, on the clock."""
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "kill": self._kill,
            "kill while starting": self._kill_while_starting,
            "terminate": self._terminate,
            "pause": self._pause,
            "wipe": self._wipe,
            "power": self._power,
            "broker": self._broker,
            "Redis": self._redis,
            "Postgres": self._postgres,
        }

    async def run(self, stop: asyncio.Event) -> None:
        deck: list[str] = []
        while True:
            deck = deck or self._deck()
            before = self._machine.committed()
            if await self._stopped(stop, self._rng.uniform(*BETWEEN_S)):
                break
            await self._until_progress(before)
            await self._kinds[deck.pop()]()
        for running in list(self._background):
            await running

    def _deck(self) -> list[str]:
        """A kill behind every other fault; the pause early, for it is the longest. Taken from the end."""
        others = [kind for kind in self._kinds if kind not in ("kill", "pause")]
        self._rng.shuffle(others)
        others.append("pause")
        return [card for kind in others for card in ((kind, "kill") if kind in others[::2] else (kind,))]

    async def _stopped(self, stop: asyncio.Event, seconds: float) -> bool:
        end = self._clock.monotonic_s() + seconds
        while self._clock.monotonic_s() < end and not stop.is_set():
            await self._clock.sleep(LOOK_S)
        return stop.is_set()

    async def _until_progress(self, before: dict[str, int]) -> None:
        """A job that never gets to work has nothing to lose: each fault meets one that has committed since the last."""
        end = self._clock.monotonic_s() + WAIT_S
        while self._clock.monotonic_s() < end:
            if any(at > before.get(tp, at) for tp, at in self._machine.committed().items()):
                return
            await self._clock.sleep(LOOK_S)

    # ---- workers

    async def _victim(self) -> Worker:
        """A worker that holds tasks, if there is one soon."""
        end = self._clock.monotonic_s() + WAIT_S
        while self._clock.monotonic_s() < end:
            if holding := [worker for worker in self._machine.working() if worker.status()["tasks"]]:
                return self._rng.choice(holding)
            await self._clock.sleep(LOOK_S)
        return self._rng.choice([worker for worker in self._machine.workers if not worker.paused])

    async def _kill(self) -> None:
        await self._kill_one(await self._victim())

    def _moment(self) -> str:
        if not self._moments:
            deck = (*MOMENTS, MOMENTS[0])  # most of an epoch's time is spent within it
            self._moments = self._rng.sample(deck, len(deck))
        return self._moments.pop()

    async def _kill_one(self, worker: Worker, then: Callable[[], None] = lambda: None) -> None:
        moment, down_s, before = self._moment(), self._rng.uniform(*DOWN_S), len(worker.ends())
        self.kills += 1
        self._note_end("kill", worker, moment, await worker.kill_at(moment), before)
        then()
        await self._clock.sleep(down_s)
        worker.start()

    async def _kill_while_starting(self) -> None:
        """A second time, while it joins, restores or claims."""
        worker = await self._victim()
        await self._kill_one(worker)
        await self._clock.sleep(self._rng.uniform(1.0, 6.0))
        self.kills += 1
        await worker.kill()
        self._note("kill while starting", f"worker {worker.name} killed again while it starts")
        worker.start()

    async def _terminate(self) -> None:
        worker = await self._victim()
        held = worker.status()["tasks"]
        code = await worker.stop()
        self.restarts += 1
        self._note("terminate", f"worker {worker.name} told to stop, which it did with {code}")
        if code and (held or code != -signal.SIGTERM):  # before it can listen, the signal is the end of it
            self.failures.append(f"worker {worker.name} ended with {code} on SIGTERM:\n{worker.last_words()}")
        await self._clock.sleep(self._rng.uniform(*DOWN_S))
        worker.start()

    async def _wipe(self) -> None:
        worker = await self._victim()
        await self._kill_one(worker, worker.wipe)
        self._note("wipe", f"worker {worker.name} has lost its disk")

    async def _pause(self) -> None:
        """Goes on beside the next faults."""
        worker, seconds, moment = await self._victim(), self._rng.uniform(*PAUSE_S), self._moment()
        before = len(worker.ends())
        self.pauses += 1
        self._note_end("pause", worker, moment, await worker.pause_at(moment), before)
        running = asyncio.create_task(self._wake(worker, seconds))
        self._background.add(running)
        running.add_done_callback(self._background.discard)

    async def _wake(self, worker: Worker, seconds: float) -> None:
        await self._clock.sleep(seconds)
        worker.go_on()
        self._say(f"worker {worker.name} wakes")

    # ---- servers

    async def _power(self) -> None:
        """All workers and all servers at once."""
        machine = self._machine
        for running in list(self._background):
            await running
        workers = [worker for worker in machine.workers if worker.runs]
        self.kills += len(workers) + 3
        self.broker_down_s = self._clock.monotonic_s()
        ends = (asyncio.to_thread(kill) for kill in (machine.kafka.kill, machine.redis.kill, machine.postgres.kill))
        await asyncio.gather(*(worker.kill() for worker in workers), *ends)
        self._note("power", "power failure: workers and servers killed")
        for start in (machine.kafka.start, machine.redis.start, machine.postgres.start):
            await asyncio.to_thread(start)
        self.broker_down_s = self._clock.monotonic_s()
        for worker in workers:
            worker.start()

    async def _broker(self) -> None:
        kafka = self._machine.kafka
        self.kills += 1
        self.broker_down_s = self._clock.monotonic_s()
        await asyncio.to_thread(kafka.kill)
        self._note("broker", "broker killed")
        await self._clock.sleep(self._rng.uniform(*DOWN_S))
        await asyncio.to_thread(kafka.start)
        self.broker_down_s = self._clock.monotonic_s()
        self._say("broker is back")

    async def _redis(self) -> None:
        redis = self._machine.redis
        await self._server("Redis", redis.kill, redis.stop, redis.start)

    async def _postgres(self) -> None:
        postgres = self._machine.postgres
        await self._server("Postgres", postgres.kill, postgres.stop, postgres.start)

    async def _server(
        self, name: str, kill: Callable[[], None], stop: Callable[[], None], start: Callable[[], object]
    ) -> None:
        killed, down_s = self._rng.random() < 0.5, self._rng.uniform(*DOWN_S)
        await asyncio.to_thread(kill if killed else stop)
        self.kills, self.restarts = self.kills + killed, self.restarts + (not killed)
        what = "killed" if killed else "stopped"
        self._note(f"{name} {what}", f"{name} {what}")
        await self._clock.sleep(down_s)
        await asyncio.to_thread(start)
        self._say(f"{name} is back")

    def _note_end(self, act: str, worker: Worker, moment: str, met: bool, before: int) -> None:
        """``before``: how many lines of its ends there were."""
        if not met:
            self._note(f"{act} at any time", f"worker {worker.name}: {act}; it came to no moment {moment}")
            return
        held = sum(len(end["uncommitted"]) for end in worker.ends()[before:])
        self.uncommitted += held > 0
        self._note(f"{act} {moment}", f"worker {worker.name}: {act} {moment}, {held} partitions beyond their commit")

    def _note(self, what: str, text: str) -> None:
        self.done[what] += 1
        self._say(text)
