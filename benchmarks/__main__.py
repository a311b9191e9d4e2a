"""python -m benchmarks NAME --records N --transport kafka --json

python -m benchmarks soak --seconds 600
python -m benchmarks unavailability --transport kafka
python -m benchmarks peers --records 2000000 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import latency, memory, partitions, profile, restore, soak, unavailability
from benchmarks.parts import FULL_RECORDS, TRANSPORTS
from benchmarks.peers import cli as peers
from benchmarks.run import NAMES, run
from streamproc.core.clock import SystemClock
from streamproc.core.errors import StreamprocError
from streamproc.testing.kafka_server import can_start

__all__ = ["main"]

RESULTS: Final = Path(__file__).resolve().parent / "results.jsonl"
WIDTH: Final = 100
OTHERS: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    "latency": latency.main,
    "memory": memory.main,
    "partitions": partitions.main,
    "peers": peers.main,
    "profile": profile.main,
    "restore": restore.main,
    "soak": soak.main,
    "unavailability": unavailability.main,
}
"""Benchmarks with arguments and figures of their own, by name."""
SHOWN: Final = {
    "records_per_worker_cpu_s": "records/CPU-s",
    "worker_cpu_s": "CPU s",
    "wall_s": "wall s",
    "rss_mb": "RSS MB",
    "commits": "commits",
    "correct": "correct",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: every run was correct. 1: one was not, failed, or committed too seldom."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in OTHERS:
        return OTHERS[words[0]](words[1:])
    given = _parser().parse_args(words)
    errors = Console(stderr=True, highlight=False)
    names = NAMES if given.name == "all" else (given.name,)
    code = 0
    lines = []
    for transport in _transports(given.transport, errors):
        for name in names:
            line = _run(name, transport, given, errors)
            code |= int(line is None or not line["correct"])
            if line is None:
                continue
            lines.append(line)
            if given.json:
                print(json.dumps(line), flush=True)
            for difference in line.get("wrong", ()):
                errors.print(f"wrong: {difference}", style="red", markup=False, soft_wrap=True)
    if not given.json:
        # Nobody reads a table that a pipe's 80 columns have folded.
        Console(width=None if sys.stdout.isatty() else WIDTH).print(_table(lines, _last(RESULTS)))
    if given.append:
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Records per worker CPU-second.")
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--records", type=int, default=FULL_RECORDS, help="orders in the topic (default %(default)s)")
    parser.add_argument("--transport", choices=[*TRANSPORTS, "all"], default="embedded",
                        help="kafka starts one, or uses KAFKA_BOOTSTRAP; all: kafka too if it can be started")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON line a run on stdout, nothing else there")
    parser.add_argument("--append", action="store_true", help=f"append the lines to {RESULTS.name}")
    parser.add_argument("--commit-interval", type=float, metavar="S", help="seconds between two commits of a task")
    parser.add_argument(
        "--profile", default="", metavar="FILE", help="write cProfile's figures of the worker; slows it"
    )
    return parser


def _transports(wanted: str, errors: Console) -> tuple[str, ...]:
    if wanted != "all":
        return (wanted,)
    if can_start():
        return TRANSPORTS
    errors.print("No Kafka can be started here (Java and Maven, or KAFKA_BOOTSTRAP): its benchmarks are left out.")
    return ("embedded",)


def _run(name: str, transport: str, given: argparse.Namespace, errors: Console) -> dict[str, Any] | None:
    with errors.status("") as status:
        try:
            return run(
                name, given.records, transport, clock=SystemClock(), interval_s=given.commit_interval,
                profile=given.profile, say=lambda what: status.update(f"{name} on {transport}: {what}"),
            )  # fmt: skip
        except StreamprocError as failure:
            errors.print(str(failure), style="red", markup=False, soft_wrap=True)
            return None


def _last(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last line of each benchmark and transport."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {(line["name"], line["transport"]): line for line in found}


def _table(lines: Iterable[dict[str, Any]], last: dict[tuple[str, str], dict[str, Any]]) -> Table:
    """A row a run, and below it the last one that was kept."""
    table = Table("benchmark", "records", *SHOWN.values(), box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(f"{line['name']} on {line['transport']}", *_cells(line))
        if (before := last.get((line["name"], line["transport"]))) is not None:
            table.add_row(f"  on {before['date'][:10]}", *_cells(before), style="dim")
    return table


def _cells(line: dict[str, Any]) -> list[str]:
    return [
        f"{line['records']:,}",
        *("yes" if line[name] is True else "NO" if line[name] is False else f"{line[name]:,}" for name in SHOWN),
    ]


if __name__ == "__main__":
    sys.exit(main())
