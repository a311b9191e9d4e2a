"""What the README and the pages under docs/ say is so: examples run, links lead somewhere, names are those of the code."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib import request

import pytest

from streamproc import App
from streamproc.core import limits

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOTS = ("streamproc", "agents", "benchmarks", "demo", "docs", "schemas", "tests")
WAIT_S = 60.0


class Block(NamedTuple):
    """A fenced block: ```` ```python shop.py ```` is ``shop.py``, to be written under that name."""

    language: str
    name: str
    text: str


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)[ ]?([^\n]*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Block(*part) for part in found]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def write_files(page: Path, folder: Path) -> None:
    """Every named block of the page as the file it names."""
    for block in blocks(page):
        if block.name:
            target = folder / block.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)


def commands(page: Path) -> list[str]:
    return [line[2:] for block in blocks(page) if block.language == "console" for line in block.text.splitlines()]


# ---- links, names, numbers


@cache
def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_files_that_are_named_are_there(page: Path) -> None:
    spelt = re.findall(rf"(?<![\w/.{{-])(?:{'|'.join(ROOTS)})/[\w./-]*\w/?", page.read_text())
    # What the examples write, and what only a benchmark or a build makes.
    made = {block.name for one in PAGES for block in blocks(one)} | {"benchmarks/results.jsonl"}
    assert not [name for name in spelt if not (ROOT / name).exists() and name not in made]


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_limits_that_are_named_are_there(page: Path) -> None:
    spelt = re.findall(r"`([A-Z]+(?:_[A-Z]+)*_(?:MAX|MIN|MS|S|BYTES|ROWS))`", prose(page))
    assert not [name for name in spelt if not hasattr(limits, name)]


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_make_targets_that_are_named_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    spelt = set(re.findall(r"`make ([\w-]+)", page.read_text())) | set(
        re.findall(r"^make ([\w-]+)", page.read_text(), re.M)
    )
    assert spelt <= targets


def test_the_pages_number_the_steps_as_the_code_does() -> None:
    runtime = ROOT / "streamproc" / "runtime"
    page = " ".join((ROOT / "docs" / "commit.md").read_text().split())
    steps = []
    for file in ("start.py", "task.py", "epoch.py"):
        comments = re.sub(r"\n *# (?!\d\. )", " ", (runtime / file).read_text())
        steps += re.findall(r"^\s*# (\d\. .+)$", comments, re.M)
    assert len(steps) >= 12
    assert not [step for step in steps if step.rstrip(".") not in page]


def test_the_guide_lists_every_setting_of_an_app_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", (ROOT / "docs" / "guide.md").read_text(), re.M))
    settings = {
        name: parameter.default
        for name, parameter in inspect.signature(App.__init__).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert {name: ast.literal_eval(listed[name]) for name in settings} == settings


def test_messages_that_the_guide_explains_are_messages_of_the_code() -> None:
    """Their fixed words at least; what stands for a value there is ``…`` here."""
    code = "".join(file.read_text() for file in (ROOT / "streamproc").rglob("*.py"))
    table = (ROOT / "docs" / "guide.md").read_text().partition("## When something is wrong")[2].partition("###")[0]
    messages = [spelt for spelt in re.findall(r"^\| [^|]*?`([^`]+)` \|", table, re.M) if "…" in spelt]
    assert len(messages) >= 6
    assert not [(spelt, part) for spelt in messages for part in spelt.split("…") if part.strip() not in code]


def test_every_decision_has_its_page_in_the_list_and_every_section() -> None:
    folder = ROOT / "docs" / "adr"
    listed = (folder / "README.md").read_text()
    pages = sorted(folder.glob("0*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        assert f"]({page.name})" in listed
        sections = re.findall(r"^## (.+)$", page.read_text(), re.M)
        assert sections == ["Context", "Options", "Choice", "What would change our mind"], page.name


# ---- examples


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=names)
def test_python_in_the_pages_runs_and_its_plans_compile(page: Path, tmp_path: Path) -> None:
    """Unnamed blocks of a page are one module, in order; every app that a module makes is compiled as a worker would."""
    write_files(page, tmp_path)
    whole = "\n".join(block.text for block in blocks(page) if block.language == "python" and not block.name)
    (tmp_path / "whole_page.py").write_text(whole)
    modules = [Path(block.name).stem for block in blocks(page) if block.language == "python" and block.name]
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, *modules, "whole_page"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


_IMPORT = """
import importlib, sys
import streamproc
sys.path.insert(0, "")
for name in sys.argv[1:]:
    for app in vars(importlib.import_module(name)).values():
        if isinstance(app, streamproc.App):
            app.finalize()
            app.build_groups({spec.name: spec.partitions or 4 for spec in app.declared_topics()})
"""


def environment(**more: str) -> dict[str, str]:
    """For a process in another folder: the same packages, and no setting of this machine's."""
    ours = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    ours["PYTHONPATH"] = str(ROOT)
    return {**{name: value for name, value in os.environ.items() if not name.startswith("STREAMPROC_")}, **ours, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(command: str, folder: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker by a command line of the README."""
    log = (folder / "worker.log").open("ab")
    process = subprocess.Popen(shlex.split(command), cwd=folder, env=environment(**settings), stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(WAIT_S)
        log.close()


def get(url: str) -> Any:
    opener = request.build_opener(request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        return json.load(answer)


def until(condition: Callable[[], object], folder: Path) -> None:
    """Ask a worker until it answers, and as it should."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        with suppress(OSError):
            if condition():
                return
        time.sleep(0.1)
    raise AssertionError((folder / "worker.log").read_text()[-3000:])


def until_orders(url: str, more_than: int, folder: Path, partitions: int = 2) -> int:
    """Ask until every partition answers and more than so many orders are counted; how many are."""
    counted = 0

    def enough() -> bool:
        nonlocal counted
        found = get(url)
        counted = sum(row["row"]["orders"] for row in found["rows"])
        return len(found["partitions"]) == partitions and counted > more_than

    until(enough, folder)
    return counted


README = ROOT / "README.md"


def line(start: str) -> list[str]:
    return [command for command in commands(README) if command.startswith(start)]


def at_port(command: str, port: int) -> str:
    """The command or URL as printed, but for the port: another worker may run on this machine."""
    return re.sub(r"606[67]", str(port), command)


def test_the_readme_runs_as_printed_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    write_files(README, tmp_path)
    worker, curl = line("streamproc worker")[0], line("curl")[0]
    port = free_port()
    url = at_port(curl.split()[-1], port)
    with started(worker, tmp_path, WEB_PORT=str(port)) as first:
        before = until_orders(url, 5, tmp_path)
        first.kill()
        first.wait()
    with started(worker, tmp_path, WEB_PORT=str(port)):
        until_orders(url, before, tmp_path)
    assert (tmp_path / "shop.log").exists()
    assert (tmp_path / "shop-data").is_dir()


def test_the_guide_feeds_runs_and_reads_its_dead_letters(tmp_path: Path) -> None:
    """Its sinks are not there: the dead letters do not wait for them."""
    guide = ROOT / "docs" / "guide.md"
    write_files(guide, tmp_path)
    program = [block.text for block in blocks(guide) if block.language == "python" and not block.name]
    (tmp_path / "shop.py").write_text("\n".join(program))
    worker = next(command for command in commands(guide) if command.startswith("streamproc worker"))
    port = free_port()
    run = {
        "cwd": tmp_path,
        "env": environment(),
        "capture_output": True,
        "text": True,
        "timeout": WAIT_S,
        "check": True,
    }
    subprocess.run([sys.executable, "feed.py"], **run)  # type: ignore[call-overload]
    with started(at_port(worker, port), tmp_path):
        until(lambda: any(topic["records"] for topic in get(f"http://localhost:{port}/api/side")["topics"]), tmp_path)
    told = subprocess.run([sys.executable, "dead_letters.py"], **run)  # type: ignore[call-overload]
    assert told.stdout.count("'sp-reason': b'amount sane'") == 1


@pytest.mark.kafka
@pytest.mark.timeout(240)
@pytest.mark.skipif("KAFKA_BOOTSTRAP" in os.environ, reason="an outside broker may have topics of the README's names")
def test_the_readme_runs_on_kafka_with_two_workers_of_which_one_is_killed(tmp_path: Path) -> None:
    from streamproc.testing.kafka_server import KafkaServer

    write_files(README, tmp_path)
    (broker,) = line("export BROKER")
    _, one, two = line("streamproc worker")
    ports = free_port(), free_port()
    path = line("curl")[0].partition("6066")[2]
    with KafkaServer() as kafka:
        name, _, value = broker.removeprefix("export ").partition("=")
        settings = {name: value.replace("localhost:9092", kafka.bootstrap)}
        with (
            started(at_port(one, ports[0]), tmp_path, **settings) as first,
            started(at_port(two, ports[1]), tmp_path, **settings),
        ):
            before = until_orders(f"http://localhost:{ports[1]}{path}", 5, tmp_path)
            until_orders(f"http://localhost:{ports[0]}{path}", before, tmp_path)
            assert _held(ports[0]) == _held(ports[1]) == 1
            first.kill()
            first.wait()
            until_orders(f"http://localhost:{ports[1]}{path}", before, tmp_path)
            assert _held(ports[1]) == 2


def _held(port: int) -> int:
    """Partitions of the table that this worker itself holds."""
    return len(get(f"http://localhost:{port}/api/tables/revenue/rows?local=1")["partitions"])
