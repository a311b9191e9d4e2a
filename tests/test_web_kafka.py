"""Two workers of one app on a real Kafka: each answers for both, by what Faust's assignor tells them of each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamproc.testing.kafka_server import KafkaServer
from tests.web import free_port

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).resolve().parent.parent
ACTIVITY = "/api/tables/activity"


def get(port: int, path: str, **parameters: Any) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}{path}?{urllib.parse.urlencode(parameters)}", timeout=10
        ) as got:
            return got.status, json.load(got)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)
    except OSError:
        return 0, {}


@contextmanager
def workers(folder: Path, bootstrap: str, ports: list[int]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The click stream's job, once for each port."""
    environment = {**os.environ, "STREAMPROC_BROKER": f"kafka://{bootstrap}", "STREAMPROC_RATE": "200"}
    environment.pop("STREAMPROC_WEB_TOKEN", None)
    faust = Path(sys.executable).with_name("faust")
    running = [
        subprocess.Popen(
            [faust, "--datadir", folder / str(port), "-A", "agents.user_events", "worker", "--web-port", str(port)],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for port in ports
    ]  # fmt: skip
    try:
        yield running
    finally:
        for worker in running:
            worker.kill()
            worker.wait()


def wait_for(what: str, condition: Any) -> Any:
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.2)
    return found


def test_any_worker_answers_for_all_and_says_when_the_owner_is_gone(tmp_path: Path, kafka: KafkaServer) -> None:
    one, two = free_port(), free_port()
    with workers(tmp_path, kafka.bootstrap, [one, two]) as running:

        def shared() -> bool:
            halves = [get(port, "/api/tasks", local="1")[1].get("tasks", []) for port in (one, two)]
            return len(halves[0]) == len(halves[1]) == 4

        wait_for("the two workers to share the tasks", shared)
        rows = wait_for("a window of both kinds", lambda: both_kinds(one))
        whole = get(one, "/api/overview")[1]
        assert {task["worker"] for task in whole["tasks"]} == {f"http://127.0.0.1:{port}" for port in (one, two)}
        far = []
        for row in rows:
            named = {"kind": row["row"]["kind"], "window_start": row["row"]["window_start"]}
            answers = [get(port, f"{ACTIVITY}/row", **named) for port in (one, two)]
            assert [status for status, _ in answers] == [200, 200]
            # The owner answers itself, the other one names it.
            assert sorted("worker" in answer for _, answer in answers) == [False, True]
            assert all(answer["row"]["events"] >= row["row"]["events"] for _, answer in answers)
            far += [named] if "worker" in answers[1][1] else []
        running[0].kill()
        running[0].wait()
        for named in far:
            status, answer = get(two, f"{ACTIVITY}/row", **named)
            assert (status, answer["error"]["worker"]) == (503, f"http://127.0.0.1:{one}")
        left = get(two, f"{ACTIVITY}/rows")[1]
        assert len(left["missing_partitions"]) == 2
        assert f"http://127.0.0.1:{one}" in left["problems"][0]


def both_kinds(port: int) -> list[Any]:
    answer = get(port, f"{ACTIVITY}/rows")[1]
    rows = answer.get("rows", [])
    complete = {row["row"]["kind"] for row in rows} == {"purchase", "signup"} and not answer["missing_partitions"]
    return list(rows) if complete else []
