"""Exactly-once under real kills: is everything right when everything has been killed?

    python -m chaos --seconds 120 --seed 1

A real Kafka, Redis (Valkey) and Postgres and three workers run `chaos/job.py` under a steady load. Every few seconds
something is killed, stopped or paused, at random by the seed (`chaos/faults.py`). Then there is peace, and every row of
every table, in the changelogs, Redis and Postgres, every output record, late record and dead letter is held against
`chaos/oracle.py`. The last line says how many differ. Exit code 0: none; 1: some, or it could not run; the folder with
the workers' logs and the data is kept then.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from rich.console import Console

from streamproc.core.clock import SystemClock
from streamproc.core.errors import StreamprocError, UserError

__all__ = ["main"]

DIFFERENCES_SHOWN: Final = 20
FAILURES_SHOWN: Final = 3
RATE: Final = 3_000


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description="Exactly-once under real kills.")
    parser.add_argument("--seconds", type=float, default=120, help="how long faults and load last")
    parser.add_argument("--seed", type=int, default=1, help="decides the data, the faults and their order")
    parser.add_argument("--rate", type=int, default=RATE, help="records a second, of both topics together")
    parser.add_argument("--folder", type=Path, help="where everything lies; a temporary folder by default")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a clean run too")
    return parser.parse_args(argv)


def _folder(wanted: Path | None) -> Path:
    """An empty one, with a path short enough for a socket. Not below a folder that only its owner may enter: as root,
    Postgres runs as somebody else."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="streamproc-chaos-"))
    wanted = wanted.resolve()
    if wanted.exists() and any(wanted.iterdir()):
        raise UserError(f"{wanted} is not empty.", remedy="Give --folder a new one.")
    wanted.mkdir(parents=True, exist_ok=True)
    return wanted


async def _run(arguments: argparse.Namespace, folder: Path, console: Console) -> int:
    from chaos.run import Settings, run

    clock = SystemClock()
    settings = Settings(arguments.seconds, arguments.seed, arguments.rate, folder)
    began = clock.monotonic_s()

    def say(text: str) -> None:
        console.print(f"{clock.monotonic_s() - began:6.1f} s  {text}", markup=False, highlight=False, soft_wrap=True)

    main_task = asyncio.current_task()
    assert main_task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, main_task.cancel)
    with console.status("starting Kafka, Redis and Postgres") as status:
        result = await run(settings, clock, say, lambda text: status.update(text))
    for what, count in sorted(result.faults.done.items()):
        console.print(f"{count:5}  {what}", markup=False, highlight=False)
    for where, count in result.tally.compared.items():
        console.print(f"{count:9,}  {where}", markup=False, highlight=False)
    for failure in result.failures[:FAILURES_SHOWN]:
        console.print(failure, style="red", markup=False, highlight=False, soft_wrap=True)
    for difference in result.tally.differences[:DIFFERENCES_SHOWN]:
        console.print(difference, style="red", markup=False, highlight=False, soft_wrap=True)
    if len(result.tally.differences) > DIFFERENCES_SHOWN:
        console.print("… and more", style="red")
    if result.clean and not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        again = f"python -m chaos --seconds {arguments.seconds:g} --seed {arguments.seed} --rate {arguments.rate}"
        console.print(f"Everything lies in {folder}. Once more: {again}", markup=False, highlight=False, soft_wrap=True)
    console.print(result.last_line(), markup=False, highlight=False, soft_wrap=True)
    return 0 if result.clean else 1


def main(argv: Sequence[str] | None = None) -> NoReturn:
    arguments, console = _arguments(argv), Console()
    if os.environ.get("KAFKA_BOOTSTRAP"):
        raise SystemExit("A broker of somebody else's is not for killing. Unset KAFKA_BOOTSTRAP.")
    # The client's complaints about a broker that is down are not news here.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    folder: Path | None = None
    try:
        folder = _folder(arguments.folder)
        code = asyncio.run(_run(arguments, folder, console))
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print(f"Interrupted; nothing is left running. What there is lies in {folder}.", soft_wrap=True)
        code = 130
    except (StreamprocError, TimeoutError) as problem:
        text = f"{problem}\nWhat there is lies in {folder}."
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        code = 1
    raise SystemExit(code)


if __name__ == "__main__":
    main()
