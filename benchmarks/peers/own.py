"""Our own benchmark of the same name, by its own command, on the broker of the peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Final

from benchmarks.peers.engine import ROOT
from streamproc.core.errors import UserError

__all__ = ["NAME", "TITLE", "run"]

NAME: Final = "streamproc"
TITLE: Final = "streamproc"
DIFFERS: Final = (
    "Its windows end in Redis and Postgres, each with a ledger, beside the changelog; the peers' in a topic. Remembers "
    "order ids for 24 hours. Commits every 0.25 s at two million records and more often at fewer. `count` goes through a "
    "repartition topic, as any grouping does. `forward` passes the bytes of a record on, since both schemas are one; the "
    "peers encode it again. Its code was compiled before, by a short run."
)
RECORDS: Final = 4_000_000
RECORDS_MIN: Final = 300_000
"""With fewer the worker is done before it has committed often enough, and the run is refused."""
RUN_S_MAX: Final = 1_800.0


def run(job: str, records: int, bootstrap: str) -> dict[str, Any]:
    """The run's line, named as those of the peers are, of at most ``records`` orders, but for `RECORDS_MIN`.

    Raises `UserError` when the command failed or there is none.
    """
    records = max(RECORDS_MIN, min(records, RECORDS))
    command = [sys.executable, "-m", "benchmarks", job, "--records", str(records), "--transport", "kafka", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "KAFKA_BOOTSTRAP": bootstrap}, capture_output=True, text=True,
        timeout=RUN_S_MAX, check=False,
    )  # fmt: skip
    if not done.stdout.strip():
        raise UserError(f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stderr[-2000:]}", remedy="Run it.")
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    # The broker's version is the harness's to know: to the command it is just somebody's.
    versions = {name: number for name, number in line["versions"].items() if name != "kafka"}
    names = {"name": f"peers-{job}-{NAME}", "job": job, "engine": NAME}
    return {**line, **names, "differs": DIFFERS, "versions": versions}
