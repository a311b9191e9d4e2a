"""The main job as a worker that tells how far it is and, if asked, kills itself in the middle of an epoch.

    TEST_FOLDER=… TEST_NAME=a TEST_KILL_AT=12345 faust -A tests.flights_worker worker

It waits for the file ``go`` so that several workers join at once; it writes ``NAME.json`` now and then (tasks, positions,
whether all is done), and before a SIGKILL ``NAME.killed``: the positions that it had read beyond its last commit.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from agents.flights import app
from streamproc.commit.record import tp_name
from streamproc.core import limits
from streamproc.runtime.sourcework import SourceWork

FOLDER, NAME = Path(os.environ["TEST_FOLDER"]), os.environ["TEST_NAME"]
KILL_AT = int(os.environ.get("TEST_KILL_AT", "0"))

limits.FETCH_PARTITION_BYTES_MAX = 24 * 1024  # type: ignore[misc]  # small steps, so that a kill meets a run under way
app.conf.broker_session_timeout = 6.0
app.conf.broker_heartbeat_interval = 1.0
app.conf.datadir = FOLDER / f"state-{NAME}"
app.commit_interval_s = 0.3

(FOLDER / f"{NAME}.ready").touch()
while not (FOLDER / "go").exists():
    time.sleep(0.02)


def beyond() -> dict[str, list[int]]:
    """Source partition -> [committed position, position read]; only where the two differ."""
    found = {}
    for task in app.runtime.tasks.values():
        work = task.work
        if isinstance(work, SourceWork) and task.record is not None:
            committed = task.committed_position(work.tp) or 0  # nothing committed yet: the first epoch begins at 0
            read = work.resume_at().get(work.tp)
            if read is not None and read > committed and work.program.size_bytes > 0:
                found[tp_name(work.tp)] = [int(committed), int(read)]
    return found


def read_in_all() -> int:
    works = [task.work for task in app.runtime.tasks.values() if isinstance(task.work, SourceWork)]
    return sum(next(iter(work.positions()["flights"].values())) for work in works)


def show_tasks() -> None:
    """On SIGUSR1: what every coroutine waits for."""
    for running in asyncio.all_tasks():
        running.print_stack(limit=4)


@app.task
async def watch() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, show_tasks)
    told = 0.0
    while not app.should_stop:
        if KILL_AT and read_in_all() >= KILL_AT and (lost := beyond()):
            (FOLDER / f"{NAME}.killed").write_text(json.dumps(lost))
            os.kill(os.getpid(), signal.SIGKILL)
        if time.monotonic() - told > 0.1:
            told = time.monotonic()
            tell()
        await app.sleep(0.001)


def tell() -> None:
    tasks: dict[str, Any] = {str(task.id): task.phase.value for task in app.runtime.tasks.values()}
    status = {"tasks": tasks, "finished": app.runtime.finished(), "read": read_in_all()}
    temporary = FOLDER / f"{NAME}.json.new"
    temporary.write_text(json.dumps(status))
    temporary.rename(FOLDER / f"{NAME}.json")
