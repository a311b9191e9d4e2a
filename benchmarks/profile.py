"""python -m benchmarks profile --records 2000000 --transport kafka

Where the time goes: what each step of a benchmark costs, in µs of CPU per record, and a flame graph of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.parts import FULL_RECORDS, Say
from benchmarks.profile_sampler import SESSION, THREADS
from benchmarks.profile_steps import by_step
from benchmarks.reports import Line, parser
from benchmarks.reports import main as report
from benchmarks.run import NAMES
from benchmarks.run import run as run_benchmark
from streamproc.core.clock import SystemClock

__all__ = ["costs_us", "main"]

FOLDER: Final = Path(".run") / "profile"
USUAL: Final = ("pipeline", "agent")
COMMIT_INTERVAL_S: Final = 0.25
"""Whatever the number of records, so that the cost of a commit weighs the same."""
THREADS_STEP: Final = "other threads"


def main(argv: Sequence[str]) -> int:
    """Exit code 1: a result was wrong or a run failed."""
    made = parser("profile", "CPU time of each step in µs per record, and a flame graph.")
    made.add_argument("--of", nargs="+", choices=NAMES, default=list(USUAL), metavar="NAME",
                      help=f"of {', '.join(NAMES)} (default {' '.join(USUAL)})")  # fmt: skip
    made.add_argument("--records", type=int, default=FULL_RECORDS, help="orders of each run (default %(default)s)")
    made.add_argument("--commit-interval", type=float, default=COMMIT_INTERVAL_S, metavar="S")
    made.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="for the graphs (default %(default)s)")
    return report(made.parse_args(argv), run)


def run(given: argparse.Namespace, say: Say) -> Line:
    """Each benchmark twice, plain and looked into: the plain run says what a record costs, the other one for what."""
    given.out.mkdir(parents=True, exist_ok=True)
    line: Line = {"name": "profile", "transport": given.transport, "records": given.records}
    plain: dict[str, Any] = {}
    wrong: list[str] = []
    for name in given.of:
        file = given.out.resolve() / f"{name}{SESSION}"
        say(f"{name}: as it is")
        plain = _run(name, given, "")
        say(f"{name}: looked into")
        looked_into = _run(name, given, str(file))
        wrong += [*plain.get("wrong", ()), *looked_into.get("wrong", ())]
        costs = costs_us(plain["worker_cpu_s"] * 1e6 / given.records, *_looks(file))
        line[f"{name}_us"] = round(sum(costs.values()), 3)
        line[f"{name}_steps"] = {step: round(us, 3) for step, us in costs.items()}
        line[f"{name}_graph"] = str(_draw(file, given.out / name))
        if not given.json:
            Console(width=90).print(_table(name, costs))
    line.update({key: plain[key] for key in ("versions", "date", "machine")}, correct=not wrong)
    return {**line, "wrong": wrong} if wrong else line


def costs_us(record_us: float, looks: Mapping[str, float], threads: Mapping[str, float]) -> dict[str, float]:
    """``record_us`` shared out: to the other threads what was theirs (``threads``: CPU seconds of the main thread and of
    all), to the main thread's steps by the seconds they were seen in. Adds up to ``record_us``."""
    elsewhere = record_us * max(0.0, 1 - threads["main_s"] / threads["all_s"])
    seen_s = sum(looks.values())
    costs = {step: (record_us - elsewhere) * seconds / seen_s for step, seconds in looks.items()}
    return {**costs, THREADS_STEP: elsewhere}


def _run(name: str, given: argparse.Namespace, profile: str) -> dict[str, Any]:
    return run_benchmark(name, given.records, given.transport, clock=SystemClock(), interval_s=given.commit_interval,
                         profile=profile)  # fmt: skip


def _looks(file: Path) -> tuple[dict[str, float], dict[str, float]]:
    from pyinstrument.session import Session

    return by_step(Session.load(file).frame_records), json.loads(Path(f"{file}{THREADS}").read_text())


def _draw(file: Path, out: Path) -> Path:
    """Two graphs of the same looks: a page that opens by itself, and a file for https://www.speedscope.app. Returns the
    page."""
    from pyinstrument.renderers import HTMLRenderer, SpeedscopeRenderer
    from pyinstrument.session import Session

    session, page = Session.load(file), out.with_suffix(".html")
    page.write_text(HTMLRenderer().render(session))
    out.with_suffix(".speedscope.json").write_text(SpeedscopeRenderer(show_all=True).render(session))
    return page


def _table(name: str, costs: Mapping[str, float]) -> Table:
    table = Table(f"step of {name}", "µs a record", "%", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    total = sum(costs.values())
    for step, us in costs.items():
        table.add_row(step, f"{us:.3f}", f"{100 * us / total:.1f}")
    table.add_section()
    table.add_row("all", f"{total:.3f}", "")
    return table
