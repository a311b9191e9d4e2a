"""What the harness must know of an engine, and where its libraries are kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final

from benchmarks.peers.jobs.told import FIRST, Told
from streamproc.core.errors import UserError
from streamproc.transport.contract import TopicSpec

__all__ = ["ROOT", "Command", "Engine", "JvmEngine", "PythonEngine"]

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
INSTALL_S_MAX: Final = 900.0
"""Pip's or Maven's downloads: some 100 MB each."""
HEAP: Final = "2g"

Command = tuple[list[str], dict[str, str]]
"""Arguments, and what is added to the environment."""


class Engine(ABC):
    """One peer. Installed where it is first asked for; its worker is one process."""

    name: str
    title: str
    differs: str
    """What it does differently from our own job, for whoever reads the figures."""
    plain = False
    """It reads a copy of the orders without the head of Confluent's wire format, and writes none."""
    updates = False
    """Its ``pipeline`` publishes each change of a window, not the closed window."""
    first = FIRST
    """Text in the line that the worker prints at its first record."""
    offsets_lag = False
    """It commits its last offsets seconds after all is done, so the end is when its process went quiet."""
    warms_up = False
    """It compiles its code while it runs, so the second half of the orders is told too."""
    records: ClassVar[Mapping[str, int]]
    """Orders by job: enough for a run of some seconds and `COMMITS_MIN` commits, and for a JVM to be warm at half of them.
    More would only take longer: the cost of a record is the same."""

    @abstractmethod
    def lacks(self) -> str:
        """What this machine lacks to run it; nothing if it can."""

    @abstractmethod
    def prepare(self) -> None:
        """Install it, if that was not done before. Raises `UserError` with what the installer said."""

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def command(self, told: Told) -> Command:
        """How its worker is started. May write files to ``told.folder``."""

    def topics(self, told: Told) -> list[TopicSpec]:
        """Those that its worker would make itself but must find: the harness makes them with those of the run."""
        return []

    def counts_topic(self, told: Told) -> str:
        """What the name of the topic begins with in which `count` leaves its counts."""
        return f"{told.app_id}-counts-changelog"

    @abstractmethod
    def count(self, key: bytes, value: bytes) -> tuple[int, int]:
        """User and count, of a record of that topic."""


class PythonEngine(Engine):
    """In a venv of its own, from ``requirements-NAME.txt``."""

    package: str

    def lacks(self) -> str:
        return ""

    def prepare(self) -> None:
        if (self._home / "ready").exists():
            return
        # A venv cannot be renamed when it is whole, so a file says so.
        shutil.rmtree(self._home, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(self._home)])
        _run([self.python, "-m", "pip", "install", "-q", "-r", str(self._requirements)])
        (self._home / "ready").touch()

    def version(self) -> str:
        lines = self._requirements.read_text().splitlines()
        return dict(line.split("==") for line in lines if "==" in line)[self.package]

    @property
    def python(self) -> str:
        return str(self._home / "bin" / "python")

    @property
    def _requirements(self) -> Path:
        return HERE / f"requirements-{self.name}.txt"

    @property
    def _home(self) -> Path:
        return _home(self.name, self._requirements.read_bytes() + sys.version.encode())

    def _command(self, told: Told, *arguments: str) -> Command:
        paths = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        return [self.python, *arguments], {**told.environment(), **paths}


class JvmEngine(Engine):
    """Its jars come by Maven from ``jobs/NAME/pom.xml``; ``jobs/NAME/Job.java`` is compiled with them."""

    artifact: str
    warms_up = True
    records: ClassVar[Mapping[str, int]] = {"pipeline": 2_000_000, "count": 4_000_000, "forward": 4_000_000}

    def lacks(self) -> str:
        java = [name for name in ("java", "javac") if shutil.which(name) is None]
        maven = ["mvn"] if not self._home.is_dir() and shutil.which("mvn") is None else []
        return ", ".join([*java, *maven])

    def prepare(self) -> None:
        if self._home.is_dir():
            return
        self._home.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: half of it would count as all of it.
        partial = Path(tempfile.mkdtemp(prefix=self._home.name, dir=self._home.parent))
        pom = str(self._source / "pom.xml")
        _run(["mvn", "-q", "-B", "-f", pom, "dependency:copy-dependencies", "-DincludeScope=runtime",
              f"-DoutputDirectory={partial}"])  # fmt: skip
        _run(["javac", "-nowarn", "-cp", f"{partial}/*", "-d", str(partial), str(self._source / "Job.java")])
        try:
            partial.rename(self._home)
        except OSError:  # another run was faster
            shutil.rmtree(partial)

    def version(self) -> str:
        jar = next(self._home.glob(f"{self.artifact}-[0-9]*.jar"))
        return jar.stem.removeprefix(f"{self.artifact}-")

    @property
    def _source(self) -> Path:
        return HERE / "jobs" / self.name

    @property
    def _home(self) -> Path:
        return _home(self.name, b"".join((self._source / name).read_bytes() for name in ("pom.xml", "Job.java")))

    def _java(self, *options: str, arguments: list[str]) -> list[str]:
        quiet = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
        paths = ["-cp", f"{self._home}:{self._home}/*"]
        return ["java", f"-Xmx{HEAP}", "-XX:+UseG1GC", quiet, *options, *paths, "Job", *arguments]


def _home(name: str, made_from: bytes) -> Path:
    """In the system's temporary folder, a new one when what it is made from changes."""
    digest = hashlib.sha256(made_from).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"streamproc-benchmarks-{os.getuid()}" / f"peer-{name}-{digest}"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S_MAX, check=False)
    if done.returncode:
        raise UserError(
            f"`{' '.join(command)}` ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}",
            remedy="Run it by hand to see why.",
        )
