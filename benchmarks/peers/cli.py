"""python -m benchmarks peers --rounds R"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks.orders import orders
from benchmarks.parts import kafka_version, temporary_folder
from benchmarks.peers import measure, own, report
from benchmarks.peers.engine import Engine
from benchmarks.peers.engines import ENGINES, JOBS
from benchmarks.run import refuse_too_few
from streamproc.core.clock import SystemClock
from streamproc.core.errors import StreamprocError
from streamproc.testing.kafka_server import KafkaServer, can_start

__all__ = ["main"]

BENCHMARKS: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = BENCHMARKS / "results.jsonl"
CHART: Final = BENCHMARKS / "peers.svg"
WIDTH: Final = 140


def main(argv: Sequence[str]) -> int:
    """Exit code 0: every run was correct, or no Kafka can be started here. 1: one was not, or failed."""
    given = _parser().parse_args(argv)
    errors = Console(stderr=True, highlight=False)
    if not can_start():
        errors.print("No Kafka can be started here (Java and Maven, or KAFKA_BOOTSTRAP): the peers are left out.")
        return 0
    peers = _ready([one for one in ENGINES if one.name in given.engines], errors)
    planned = list(_plan(given, peers))
    lines, missing = [], []
    with temporary_folder() as folder, KafkaServer() as kafka:
        for round_, job, engine in planned:
            line = _run(engine, job, given.records, kafka.bootstrap, folder, errors)
            if line is None:
                missing.append(f"{job} on {engine.title if engine else own.TITLE}, round {round_}")
                continue
            line |= {"round": round_, "versions": {**line["versions"], "kafka": kafka_version()}}
            lines.append(line)
            if given.json:
                print(json.dumps(line), flush=True)
    _tell(lines, missing, given)
    return int(len(lines) < len(planned) or not all(line["correct"] for line in lines))


def _parser() -> argparse.ArgumentParser:
    names = [own.NAME, *(engine.name for engine in ENGINES)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers",
        description="The same jobs on streamproc and on its peers, in turn, over one Kafka.",
    )
    parser.add_argument("--records", type=int, default=own.RECORDS, metavar="N",
                        help="at most, for a look; each engine has a number of its own, by its speed")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="so often each, in turn (default %(default)s)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--engines", nargs="+", choices=names, default=names)
    parser.add_argument("--json", action="store_true", help="one JSON line a run on stdout, nothing else there")
    parser.add_argument("--append", action="store_true", help=f"append to {RESULTS.name} and draw {CHART.name}")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the chart there, as SVG")
    return parser


def _ready(engines: Sequence[Engine], errors: Console) -> list[Engine]:
    """Those that this machine can run, installed."""
    found = []
    for engine in engines:
        if lacking := engine.lacks():
            errors.print(f"{engine.title} is left out: no {lacking} here.")
            continue
        with errors.status(f"installing {engine.title}"):
            engine.prepare()
        found.append(engine)
    return found


def _plan(given: argparse.Namespace, peers: Sequence[Engine]) -> Iterator[tuple[int, str, Engine | None]]:
    """In turn, so that what else the machine does meets all alike. None is our own."""
    ours: list[Engine | None] = [None] if own.NAME in given.engines else []
    for round_ in range(1, given.rounds + 1):
        for job in given.jobs:
            for engine in [*ours, *peers]:
                yield round_, job, engine


def _run(
    engine: Engine | None, job: str, records: int, bootstrap: str, folder: Path, errors: Console
) -> dict[str, Any] | None:
    title = engine.title if engine else own.TITLE
    with errors.status(f"{job} on {title}") as status:
        try:
            if engine is None:
                line = own.run(job, records, bootstrap)
            else:
                input_ = orders(min(records, engine.records[job]))
                line = asyncio.run(
                    measure.run(
                        engine, job, input_, bootstrap, folder, SystemClock(),
                        lambda what: status.update(f"{job} on {title}: {what}"),
                    )
                )  # fmt: skip
            refuse_too_few(f"{job} on {title}", line["commits"], line["wall_s"])
        except StreamprocError as failure:
            errors.print(f"{job} on {title}: {failure}", style="red", markup=False, soft_wrap=True)
            return None
    for difference in line.get("wrong", ()):
        errors.print(f"wrong: {job} on {title}: {difference}", style="red", markup=False, soft_wrap=True)
    return line


def _tell(lines: list[dict[str, Any]], missing: Sequence[str], given: argparse.Namespace) -> None:
    """``missing``: runs that failed or were refused; why was told when it happened."""
    found = report.summaries(lines)
    if not found:
        return
    if not given.json:
        # Nobody reads a table that a pipe's 80 columns have folded.
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        console.print(report.table(found))
        for line in [*report.wrong(found), *(f"NO FIGURE: {run}" for run in missing), *report.differs(found)]:
            console.print(line, markup=False, highlight=False)
    if given.append:
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    for path in [*([CHART] if given.append else []), *([given.chart] if given.chart else [])]:
        path.write_text(report.chart(found))
