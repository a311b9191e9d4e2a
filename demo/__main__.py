"""The main job on real input, on this machine alone, and whether its results are right.

    python -m demo                stays up until Ctrl-C: look at the web view, Redis and Postgres
    python -m demo --exit         leaves when the input is done
    python -m demo --keep         goes on with the last run's state, and finds 0 new records

Feeds the flights of 2013 into an embedded log, starts Redis, Postgres and a worker, waits until the job is done and
compares everything that it left with the oracle. Exit code 0: all equal; 1: not, or it could not run; 130: interrupted
before that was known.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from demo.machine import ROOT, Machine, Worker, free_port, require_extras
from streamproc.core.errors import StreamprocError, UserError

__all__ = ["main"]

FOLDER: Final = ROOT / ".run" / "demo"
MARK: Final = ".streamproc-demo"
"""A file that says whose the folder is."""
WEB_PORT: Final = 6066
POLL_S: Final = 0.25
STARTUP_S: Final = 60.0
"""How long a worker may take until its first page."""


class Oracle(threading.Thread):
    """Works out what is expected while the worker works; never holds up an exit."""

    def __init__(self, injections: dict[str, Any]) -> None:
        super().__init__(name="oracle", daemon=True)
        self._injections = injections
        self._expected: Any = None
        self.start()

    def run(self) -> None:
        from demo.oracle import expect

        self._expected = expect(self._injections)

    def expected(self) -> Any:
        """`demo.oracle.Expected`, once it is there."""
        self.join()
        if self._expected is None:
            raise UserError("The oracle could not work out what to expect.", remedy="Its error is printed above.")
        return self._expected


class Demo:
    """One run. ``folder`` holds log, state, servers' data and what was injected: all that ``--keep`` goes on with."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.folder = Path(arguments.folder).resolve()
        self.days, self.keep, self.leave = arguments.days, arguments.keep, arguments.exit
        self.web_port, self.console = arguments.web_port, console

    def run(self) -> int:
        require_extras()
        with _alone(self.folder):
            injections = self._injections()
            port = free_port(self.web_port)
            if port != self.web_port:
                self.console.print(f"Port {self.web_port} is in use; the web view is on {port}.", highlight=False)
            with Machine(self.folder, port) as machine:
                with self.console.status("starting Redis and Postgres"):
                    machine.start_servers()
                return self._work(machine, injections)

    def _work(self, machine: Machine, injections: dict[str, Any]) -> int:
        worker = machine.start_worker()
        oracle = Oracle(injections)
        self._follow(worker, len(injections["order"]))
        from demo.report import check_all, print_checks, print_results, read_results

        with self.console.status("comparing everything with the oracle"):
            results = read_results(machine, worker)
            checks = check_all(oracle.expected(), results)
        equal = print_checks(self.console, checks)
        print_results(self.console, results)
        verdict = "[green]The results equal the oracle.[/]" if equal else "[red]The results differ from the oracle.[/]"
        self.console.print(verdict)
        if not self.leave:
            self._print_places(machine, worker)
            self._stay(worker)
        return 0 if equal else 1

    def _injections(self) -> dict[str, Any]:
        """What is in the log: fed now, or with ``--keep`` by the run before. The list is written last, so that a feed
        that was broken off is never taken for one."""
        listed = self.folder / "injections.json"
        if self.keep and listed.exists():
            found: dict[str, Any] = json.loads(listed.read_text())
            if self.days is not None and self.days != found["days"]:
                raise UserError(
                    f"--days {self.days} does not fit --keep: the last run had {found['days'] or 'all'} days.",
                    remedy="Leave one of the two out.",
                )
            return found
        if self.keep:
            self.console.print("There is no run to go on with: this one starts anew.")
        return self._feed(listed)

    def _feed(self, listed: Path) -> dict[str, Any]:
        from demo.data import make_feed
        from demo.feed import open_transport, write_feed

        with self.console.status("reading the flights of 2013 and injecting faults"):
            feed = make_feed(self.days)
        self._empty_folder()

        async def write() -> None:
            transport = open_transport(f"embedded://{self.folder / 'log'}")
            await transport.start()
            try:
                await write_feed(feed, transport, console=self.console)
            finally:
                await transport.stop()

        asyncio.run(write())
        feed.save_injections(listed)
        return feed.injections

    def _empty_folder(self) -> None:
        """Of an earlier run; never one that is not the demo's."""
        mark = self.folder / MARK
        if self.folder.exists() and not mark.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder} holds files that are not the demo's.",
                remedy="Give it a folder of its own: --folder PATH.",
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def _follow(self, worker: Worker, total: int) -> None:
        """Until the worker has read, committed and handed all to the sinks."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        waited_s, new = 0.0, 0
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            bar = progress.add_task("starting the worker", total=total)
            while True:
                worker.wait(POLL_S)
                about = worker.ask("/demo/progress")
                if about is None:
                    waited_s += POLL_S
                    if waited_s > STARTUP_S:
                        raise UserError(
                            f"The worker does not answer on {worker.url}.", remedy=f"Its log is in {worker.log}."
                        )
                    continue
                new = max(new, about["records"])
                progress.update(bar, completed=about["position"], description=_doing(about, total))
                if about["finished"]:
                    break
        self.console.print(f"{new:,} new records in this run, of {total:,}.", highlight=False)

    def _print_places(self, machine: Machine, worker: Worker) -> None:
        where = {
            "Web view": worker.url,
            **machine.clients(),
            "Log and state": f"{self.folder} (safe against a crash of any process and, as far as the disk keeps its "
            "word, against a power cut)",
            "Worker's log": str(worker.log),
        }
        for what, place in where.items():
            self.console.print(f"{what + ':':15}{place}", markup=False, highlight=False, soft_wrap=True)

    def _stay(self, worker: Worker) -> None:
        self.console.print("It stays up: Ctrl-C ends it.")
        try:
            while True:
                worker.wait(60.0)
        except KeyboardInterrupt:
            self.console.print("\nStopping the worker, Redis and Postgres.")


def _doing(about: dict[str, Any], total: int) -> str:
    if about["problems"]:
        return str(about["problems"][0])
    if about["position"] < total:
        return "running the job"
    return "closing windows, filling Redis and Postgres"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One demo per folder; the lock lies beside it, for the folder is emptied."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another demo is running in {folder}.", remedy="Stop it, or give this one a folder: --folder PATH."
            ) from None
        yield


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description="The main job on real input, on this machine.")
    parser.add_argument("--exit", action="store_true", help="leave when the input is done")
    parser.add_argument("--keep", action="store_true", help="go on with the last run's state")
    parser.add_argument("--days", type=int, help="only the first so many days of the year, at least 10")
    parser.add_argument("--web-port", type=int, default=WEB_PORT, help="the web view's port, or the next free one")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where log, state and servers keep their data")
    return parser.parse_args(argv)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> NoReturn:
    arguments = _arguments(argv)
    console = Console()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        code = Demo(arguments, console).run()
    except KeyboardInterrupt:
        console.print("\nInterrupted; nothing is left running.")
        code = 130
    except (StreamprocError, ValueError) as problem:
        Console(stderr=True).print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)
        code = 1
    raise SystemExit(code)


if __name__ == "__main__":
    main()
