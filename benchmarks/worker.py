"""One worker as users start it, watched from outside: CPU time and memory of its process and all its children."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped]

from benchmarks.marks import MARK, Settings
from streamproc.core.clock import Clock
from streamproc.core.errors import UserError

__all__ = ["Measured", "measure"]

RUN_S_MAX: Final = 900.0
STOP_S_MAX: Final = 30.0
SAMPLE_S: Final = 0.1
"""Between two looks at the memory."""
TAIL_LINES: Final = 40
_ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measured:
    """One run between its marks."""

    wall_s: float
    cpu_s: float
    rss_mb: float
    """The most that was held at once, by the process and its children."""
    epochs: dict[str, int]
    """Epochs that each task committed."""
    restarts: int


def measure(
    job: str, told: Settings, clock: Clock, *, faust: Path | None = None, run_s_max: float = RUN_S_MAX
) -> Measured:
    """Run ``faust -A benchmarks.JOB worker`` until it says that all is done, then end it.

    Raises `UserError` with the end of its output when it stops before that or takes longer than ``run_s_max``.
    """
    command = [
        str(faust or Path(sys.executable).with_name("faust")),
        "-A",
        f"benchmarks.{job}",
        "worker",
        "-l",
        "warn",
        "--without-web",
    ]
    process = subprocess.Popen(
        command, cwd=_ROOT, env=_environment(told), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    run = _Run(process, clock, run_s_max)
    try:
        return run.measure()
    finally:
        run.end()


def _environment(told: Settings) -> dict[str, str]:
    """This process's own. A worker keeps its modules compiled, as an installed one does: to compile them anew would be a
    fifth of a second of each start."""
    env = {**os.environ, **told.environment(), "PYTHONUNBUFFERED": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return env


class _Run:
    def __init__(self, process: subprocess.Popen[str], clock: Clock, run_s_max: float) -> None:
        self._process, self._clock, self._run_s_max = process, clock, run_s_max
        self._watched = psutil.Process(process.pid)
        self._marks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._rss = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def measure(self) -> Measured:
        self._await("first")
        wall, cpu = self._clock.monotonic_s(), self._cpu_s()
        self._answer()
        last = self._await("last")
        cpu, wall = self._cpu_s() - cpu, self._clock.monotonic_s() - wall
        self._look()
        self._answer()
        return Measured(wall, cpu, self._rss / 1e6, last["epochs"], last["restarts"])

    def end(self) -> None:
        """As a user does it; after that, as the machine does."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            at = line.find(MARK)
            if at < 0:
                self._tail.append(line)
            else:
                self._marks.put(json.loads(line[at + len(MARK) :]))
        self._marks.put(None)

    def _await(self, name: str) -> dict[str, Any]:
        until = self._clock.monotonic_s() + self._run_s_max
        while self._clock.monotonic_s() < until:
            try:
                mark = self._marks.get(timeout=SAMPLE_S)
            except queue.Empty:
                self._look()
                continue
            if mark is not None and mark["mark"] == name:
                return mark
            if mark is None:
                self._reader.join()
            break
        raise UserError(f"The worker {self._excuse(name)}.", remedy=f"The end of its output:\n{''.join(self._tail)}")

    def _excuse(self, name: str) -> str:
        try:
            code = self._process.wait(STOP_S_MAX if not self._reader.is_alive() else 0)
        except subprocess.TimeoutExpired:
            return f"did not come to its mark {name!r} in {self._run_s_max:.0f} s"
        return f"ended with code {code} before its mark {name!r}"

    def _answer(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def _cpu_s(self) -> float:
        """User and system time, of children that ended too. The worker stands still at a mark, so nobody comes or goes."""
        total = 0.0
        for one in (self._watched, *self._watched.children(recursive=True)):
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def _look(self) -> None:
        try:
            held = sum(one.memory_info().rss for one in (self._watched, *self._watched.children(recursive=True)))
        except psutil.NoSuchProcess:
            return
        self._rss = max(self._rss, held)
