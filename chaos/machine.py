"""What a run consists of: a Kafka, a Redis, a Postgres and three workers, each of which may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from chaos.compare import Servers
from streamproc.core.clock import Clock
from streamproc.testing.kafka_server import KafkaServer
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis

__all__ = ["Machine", "Worker"]

ROOT: Final = Path(__file__).resolve().parent.parent
WORKERS: Final = ("a", "b", "c")
STOP_S: Final = 40.0
"""From SIGTERM to a worker's end: it commits, fills its sinks and leaves the group."""
MOMENT_S: Final = 5.0
"""How long a worker may look for the moment that it was told to end at; then it is ended at whatever it is at."""
LOOK_S: Final = 0.05
LOG_LINES_SHOWN: Final = 30


class Worker:
    """One worker and all processes that it has been."""

    def __init__(self, name: str, folder: Path, servers: Servers, clock: Clock) -> None:
        self.name, self.folder, self._clock = name, folder, clock
        self.state, self.log = folder / f"state-{name}", folder / f"{name}.log"
        self.paused = False
        self.meant_to_end = True
        """Nobody is to wonder that it does not run."""
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ,
            "CHAOS_BROKER": f"kafka://{servers.broker}",
            "CHAOS_REDIS": servers.redis,
            "CHAOS_POSTGRES": servers.postgres,
            "CHAOS_FOLDER": str(folder),
            "CHAOS_NAME": name,
        }

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        (self.folder / f"{self.name}.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "faust", "-A", "chaos.worker", "worker", "--without-web", "-l", "info"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.meant_to_end = False

    def status(self) -> dict[str, Any]:
        """What it last said of itself; nothing while it has not said anything since its start."""
        try:
            found: dict[str, Any] = json.loads((self.folder / f"{self.name}.json").read_text())
        except FileNotFoundError:
            return {"tasks": {}, "commits": 0, "positions": {}}
        return found

    async def kill_at(self, moment: str) -> bool:
        """SIGKILL by its own hand at ``moment``; False: it was not at one in time and was killed from here."""
        self.meant_to_end = True
        self._tell(f"kill {moment}")
        if await self._until(lambda: not self.runs, MOMENT_S):
            return True
        await self.kill()
        return False

    async def pause_at(self, moment: str) -> bool:
        """As `kill_at`, with SIGSTOP; `go_on` wakes it."""
        self.paused = True
        self._tell(f"stop {moment}")
        if await self._until(self._stands, MOMENT_S):
            return True
        self._signal(signal.SIGSTOP)
        return False

    async def kill(self) -> None:
        self.meant_to_end = True
        self._signal(signal.SIGKILL)
        await self._until(lambda: not self.runs, STOP_S)

    async def stop(self) -> int | None:
        """SIGTERM; its exit code, None if it had to be killed in the end (with what it was waiting for in its log)."""
        self.meant_to_end = True
        self.go_on()
        self._signal(signal.SIGTERM)
        if await self._until(lambda: not self.runs, STOP_S):
            return self.exit_code
        self._signal(signal.SIGUSR1)
        await self._clock.sleep(1.0)
        await self.kill()
        return None

    def go_on(self) -> None:
        self.paused = False
        self._signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Its disk is gone."""
        shutil.rmtree(self.state, ignore_errors=True)

    def last_words(self) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-LOG_LINES_SHOWN:])

    def ends(self) -> list[dict[str, Any]]:
        """Each time it did something to itself: what, when, and its uncommitted positions."""
        path = self.folder / f"{self.name}.ends"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _tell(self, order: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has just ended
            self._process.stdin.write(f"{order}\n".encode())
            self._process.stdin.flush()

    def _stands(self) -> bool:
        assert self._process is not None
        if not self.runs:
            return True
        flags = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is not None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.runs:
            self._process.send_signal(number)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        end = self._clock.monotonic_s() + seconds
        while not condition():
            if self._clock.monotonic_s() > end:
                return False
            await self._clock.sleep(LOOK_S)
        return True


class Machine:
    """Servers and workers of one run. Blocking calls of the servers run in a thread."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder, self.clock = folder, clock
        self.kafka = KafkaServer(folder / "kafka")
        self.postgres = EmbeddedPostgres(folder / "postgres")
        # What it has answered must outlive a kill, or rows would be lost that no worker could know of.
        self.redis = EmbeddedRedis(folder / "redis", config={"appendfsync": "always"})
        self.workers: list[Worker] = []
        self._committed: dict[str, int] = {}

    async def start_servers(self) -> None:
        for start in (self.kafka.start, self.postgres.start, self.redis.start):
            await asyncio.to_thread(start)

    def start_workers(self) -> None:
        servers = self.servers()
        self.workers = [Worker(name, self.folder, servers, self.clock) for name in WORKERS]
        for worker in self.workers:
            worker.start()

    def servers(self) -> Servers:
        return Servers(self.kafka.bootstrap, self.redis.url, self.postgres.dsn)

    async def stop(self) -> None:
        """Whatever still runs."""
        stops: list[Callable[[], None]] = [self.kafka.stop, self.redis.stop, self.postgres.stop]
        await asyncio.gather(*(worker.kill() for worker in self.workers))
        for stop in stops:
            await asyncio.to_thread(stop)

    def working(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.runs and not worker.paused and not worker.meant_to_end]

    def tasks(self) -> dict[str, str]:
        """Task -> what it is at, over all workers that run."""
        return {task: at for worker in self.working() for task, at in worker.status()["tasks"].items()}

    def committed(self) -> dict[str, int]:
        """Source partition -> the greatest position that any worker has ever told of."""
        for worker in self.workers:
            for tp, at in worker.status()["positions"].items():
                self._committed[tp] = max(at, self._committed.get(tp, 0))
        return dict(self._committed)
