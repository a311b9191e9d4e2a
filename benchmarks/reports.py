"""What benchmarks with figures of their own have in common: their arguments, the facts of a run, and how a run is told."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped]

from benchmarks.parts import TRANSPORTS, Log, Say
from streamproc.core.errors import StreamprocError

__all__ = ["Line", "facts", "machine", "main", "parser"]

Line = dict[str, Any]
"""What a run prints: names and figures. Has ``name``, ``transport`` and ``correct``, and ``wrong`` if it is not."""
PACKAGES: Final = (
    "streamproc", "faust-streaming", "aiokafka", "polars", "numba", "numpy", "rocksdict", "fastavro", "asyncpg", "redis",
)  # fmt: skip
_LEFT_OUT: Final = ("name", "versions", "date", "machine", "wrong")
"""Not in the last line of a run."""


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """With the arguments that all of these benchmarks take."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about)
    made.add_argument(
        "--transport", choices=TRANSPORTS, default="embedded", help="kafka starts one, or KAFKA_BOOTSTRAP"
    )
    made.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else there")
    return made


def main(given: argparse.Namespace, run: Callable[[argparse.Namespace, Say], Line]) -> int:
    """Run a benchmark and tell its line: progress on stderr, figures last. Exit code 1: a result was wrong or the run
    failed."""
    try:
        line = run(given, lambda what: print(what, file=sys.stderr, flush=True))
    except StreamprocError as failure:
        print(failure, file=sys.stderr)
        return 1
    for difference in line.get("wrong", ()):
        print(f"wrong: {difference}", file=sys.stderr)
    print(json.dumps(line) if given.json else _last(line), flush=True)
    return 0 if line["correct"] else 1


def facts(log: Log, wrong: Sequence[str]) -> Line:
    """What every line ends with."""
    packages = {package: version(package) for package in PACKAGES}
    line: Line = {
        "correct": not wrong,
        "versions": {"python": platform.python_version(), **packages, **log.version},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    if wrong:
        line["wrong"] = list(wrong)
    return line


def machine() -> str:
    """What kind it is, never whose."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {os.cpu_count()} CPUs, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def _last(line: Mapping[str, Any]) -> str:
    words = [f"{name}={value}" for name, value in line.items() if name not in _LEFT_OUT and not isinstance(value, dict)]
    return " ".join([line["name"], *words])
