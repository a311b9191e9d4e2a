"""What is written to a worker, the code that it runs, and the worker itself: started, stopped, its last words.

The events are of `apps.EVENT`. A worker is a process of its own (`start_worker`) where its exit code and its words are
what counts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from streamproc.app import App
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.transport.contract import OutRecord
from tests.apps import events_avsc, until

__all__ = [
    "HEAD", "HOUR", "PLAN", "T0", "TOPIC",
    "event", "last_words", "record", "refusal", "start_worker", "stop_worker", "wait_for",
]  # fmt: skip

HOUR = 3_600_000
T0 = 1_700_000_000_000 // HOUR * HOUR


@cache
def encoder(folder: Path) -> Encoder:
    return Encoder(load_schema(events_avsc(folder) / "event.avsc"), 1)


def event(
    folder: Path, at: int | None = T0, *, id: str | None = None, country: str = "DE", amount: float = 1.0
) -> bytes:
    return encoder(folder).encode({"id": id, "country": country, "amount": amount, "at": at})


def record(value: bytes | None, timestamp_ms: int | None = T0) -> OutRecord:
    return OutRecord(None, value, (), timestamp_ms)


async def refusal(app: App) -> str:
    """Why the app stopped itself."""
    await app.start()
    try:
        await until(lambda: app.crashed, "the crash")
        return str(app.crash_reason)
    finally:
        await app.stop()


HEAD = """
import os, pathlib, time
import polars as pl
import streamproc as sp

app = sp.App("bad", broker=os.environ.get("BROKER", "embedded://log"), schemas="schemas", commit_interval="50ms",
             datadir="state", topic_disable_leader=True)
"""
TOPIC = 'events = app.topic("events", value_schema="event.avsc", partitions=2, event_time=sp.event_time("at"))\n'
PLAN = """sums = (app.pipeline(events).group_by("country").window(sp.tumbling("1h"), allowed_lateness="1d")
        .agg(n=sp.count()).table("sums"))
"""


def start_worker(folder: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    """``faust -A job worker`` in ``folder``, its words in ``folder/out``."""
    events_avsc(folder) if not (folder / "schemas").exists() else None
    (folder / "job.py").write_text(code)
    command = [sys.executable, "-m", "faust", "-A", "job", "worker", "--without-web"]
    with (folder / "out").open("w") as out:
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=out, stderr=out, text=True
        )


def stop_worker(worker: subprocess.Popen[str], seconds: float = 15.0) -> int:
    """Exit code after SIGTERM; one that does not leave is killed and fails the test."""
    worker.send_signal(signal.SIGTERM)
    try:
        return worker.wait(seconds)
    except subprocess.TimeoutExpired:
        worker.kill()
        raise


def last_words(folder: Path, code: str, seconds: float = 30.0, **environment: str) -> str:
    """Why a worker says that it stops, as the last it says, with exit code 1 and without a traceback."""
    worker = start_worker(folder, code, **environment)
    try:
        exit_code = worker.wait(seconds)
    finally:
        worker.kill()
    told = (folder / "out").read_text()
    assert exit_code == 1, told
    assert "Traceback" not in told
    reasons = [reason.splitlines()[0].strip() for reason in told.split("streamproc stops: ")[1:]]
    assert len(set(reasons)) == 1, told  # in the log when it happens, and again as the last word
    return reasons[0]


def wait_for(path: Path, worker: subprocess.Popen[str], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert worker.poll() is None, (path.parent / "out").read_text()
        assert time.monotonic() < end, f"waited for {path.name}: {(path.parent / 'out').read_text()}"
        time.sleep(0.01)
