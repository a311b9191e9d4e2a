"""`python -m demo`: the main job equals its oracle, goes on where it was, notices one wrong cell, and leaves nothing
running."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from demo.machine import free_port, held_back
from streamproc.testing.servers import EmbeddedPostgres

ROOT = Path(__file__).resolve().parent.parent
DAYS = "12"
PATIENCE_S = 90.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own, which another run of pytest may make impassable for the server's user."""
    made = Path(tempfile.mkdtemp(prefix="streamproc-demo-"))
    yield made / "run"
    shutil.rmtree(made)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """In a process group of its own, as a terminal's foreground is one."""
    command = [sys.executable, "-m", "demo", "--folder", str(folder), "--days", DAYS, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    demo = start(folder, *arguments)
    told, _ = demo.communicate(timeout=PATIENCE_S)
    return demo.returncode, told


def running_in(folder: Path) -> list[list[str]]:
    """Processes that have the folder in their command line or are at home in it."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in part for part in [*process.cmdline(), process.cwd()]):
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.02)


async def _alter(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        done = await connection.execute(
            "UPDATE daily SET tails = tails + 1 WHERE (carrier, origin, window_start) IN "
            "(SELECT carrier, origin, window_start FROM daily ORDER BY 1, 2, 3 LIMIT 1)"
        )
    finally:
        await connection.close()
    assert done == "UPDATE 1"


@pytest.mark.server
def test_results_equal_the_oracle_a_second_run_finds_nothing_new_and_a_wrong_cell_is_noticed(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = _until_ctrl_c(folder, "--web-port", str(port))
    assert f"Port {port} is in use" in told
    total = re.search(r"([\d,]+) new records in this run, of ([\d,]+)", told)
    assert total is not None
    assert total[1] == total[2]
    assert "The results equal the oracle" in told
    assert "Web view:" in told
    assert running_in(folder) == []

    code, told = run(folder, "--exit", "--keep")
    assert code == 0, told
    assert f"0 new records in this run, of {total[2]}" in told
    assert running_in(folder) == []

    postgres = EmbeddedPostgres(folder / "postgres").start()
    try:
        asyncio.run(_alter(postgres.dsn))
    finally:
        postgres.stop()
    code, told = run(folder, "--exit", "--keep")
    assert code == 1, told
    assert "The results differ from the oracle" in told
    assert re.search(r"daily, Postgres: daily 9E EWR 2013-01-\S+: tails is \d+, expected \d+", told)
    assert running_in(folder) == []


def _until_ctrl_c(folder: Path, *arguments: str) -> str:
    """What a demo says until it stays up; it is left by Ctrl-C then."""
    demo = start(folder, *arguments)
    assert demo.stdout is not None
    told = ""
    for line in demo.stdout:
        told += line
        if "It stays up" in line:
            break
    assert len(running_in(folder)) > 2, told
    os.killpg(demo.pid, signal.SIGINT)  # a terminal sends it to all of the foreground
    assert demo.wait(PATIENCE_S) == 0
    demo.stdout.close()
    return told


@pytest.mark.server
@pytest.mark.parametrize("moment", ["log", "postgres", "redis", "worker.log"])
def test_ctrl_c_at_any_time_leaves_no_process_behind(folder: Path, moment: str) -> None:
    demo = start(folder)
    wait_for((folder / moment).exists, f"{moment} to be there")
    os.killpg(demo.pid, signal.SIGINT)
    told, _ = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 130, told
    assert "Traceback" not in told
    assert running_in(folder) == []


@pytest.mark.server
def test_a_killed_demo_takes_its_worker_with_it(folder: Path) -> None:
    demo = start(folder)
    wait_for((folder / "worker.log").exists, "the worker")
    demo.kill()
    demo.communicate(timeout=PATIENCE_S)
    wait_for(lambda: not any("faust" in command for command in running_in(folder)), "the worker to leave")
    for process in psutil.process_iter():  # the servers know nothing of it; the next run in the folder would stop them
        if any(str(folder) in part for part in _line(process)):
            process.kill()


def _line(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline(), process.cwd()]
    except psutil.Error:
        return []


def told_by(code: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_package_that_is_not_installed_is_named_without_a_traceback() -> None:
    code, told = told_by(
        "import demo.machine as machine; machine.NEEDED = ('no_such_package',)\n"
        "from demo.__main__ import main; main(['--exit', '--folder', '/nowhere/at/all'])"
    )
    assert code == 1
    assert "no_such_package" in told
    assert "pip install 'streamproc[demo]'" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(("days", "told"), [("5", "too short"), ("12", "holds files that are not the demo's")])
def test_a_mistake_on_the_command_line_is_told_before_anything_is_deleted(tmp_path: Path, days: str, told: str) -> None:
    (tmp_path / "thesis.txt").write_text("two years of work")
    code, said = told_by(f"from demo.__main__ import main; main(['--days', '{days}', '--folder', '{tmp_path}'])")
    assert code == 1
    assert told in said
    assert "Traceback" not in said
    assert (tmp_path / "thesis.txt").exists()


def test_a_port_in_use_leads_to_the_next_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port < free_port(port) <= port + 100


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []

    def start_child() -> None:
        with held_back():
            signal.raise_signal(signal.SIGTERM)
            done.append("the child is known")

    with pytest.raises(KeyboardInterrupt):
        start_child()
    assert done == ["the child is known"]
