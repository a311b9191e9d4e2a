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
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib import request

import msgspec
import numpy as np
import polars as pl
import pytest
from google_crc32c import value as crc32c

from streamproc import App
from streamproc.core import limits
from streamproc.core.hash128 import hash_bytes_python
from streamproc.eventtime.spec import Tumbling
from streamproc.operators.accumulate import PartialAggregator
from streamproc.operators.partials import decode_partial
from streamproc.operators.plan import Agg, TablePlan
from streamproc.operators.windowtable import WindowTable
from streamproc.state import changelog
from streamproc.state.memory import MemoryStore
from streamproc.state.overlay import Change, Overlay

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


ENGINES = ("streamproc", "faust", "quix", "flink", "kstreams")
"""The columns of the README's comparison."""


def test_figures_of_the_readme_were_measured() -> None:
    """Those of ours are the median, least and most of the last five correct lines; the peers' their last one."""
    lines = [json.loads(line) for line in (ROOT / "benchmarks" / "results.jsonl").read_text().splitlines()]
    measured: dict[str, list[int]] = {}
    for of in lines:
        if of["correct"] and of["transport"] == "kafka":
            measured.setdefault(of["name"], []).append(
                max(of["records_per_worker_cpu_s"], of.get("records_per_worker_cpu_s_warm") or 0)
            )
    ours: list[tuple[str, str, str, str]] = re.findall(
        r"^\| `(\w+)` \| [^|]+ \| ([\d,]+) \| ([\d,]+)–([\d,]+) \|$", README.read_text(), re.M
    )
    peers: list[tuple[str, str]] = re.findall(r"^\| `(\w+)` ((?:\| [\d,]+ ){5})\|$", README.read_text(), re.M)
    assert ours
    assert peers
    for name, *shown in ours:
        five = sorted(measured[name][-5:])
        assert [int(figure.replace(",", "")) for figure in shown] == [five[2], five[0], five[4]], name
    for job, figures in peers:
        last = [measured[f"peers-{job}-{engine}"][-1] for engine in ENGINES]
        assert [int(figure.replace(",", "")) for figure in re.findall(r"[\d,]+", figures)] == last, job


def test_every_decision_has_its_page_in_the_list_and_every_section() -> None:
    folder = ROOT / "docs" / "adr"
    listed = (folder / "README.md").read_text()
    pages = sorted(folder.glob("0*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        assert f"]({page.name})" in listed
        sections = re.findall(r"^## (.+)$", page.read_text(), re.M)
        assert sections == ["Context", "Options", "Choice", "What would change our mind"], page.name


# ---- formats, read by what docs/commit.md says of them and by nothing else

PLAN = TablePlan(
    name="revenue",
    keys={"country": pl.String(), "size": pl.Int64()},
    window=Tumbling(60_000),
    allowed_lateness_ms=0,
    retain_ms=0,
    aggs={
        "n": Agg("count"),
        "total": Agg("sum", "i"),
        "mean": Agg("mean", "f"),
        "least": Agg("min", "f"),
        "last": Agg("max", "t"),
        "kinds": Agg("count_distinct", "t"),
    },
    inputs={"i": pl.Int64(), "f": pl.Float64(), "t": pl.String()},
    post=(),
    partitions=1,
    late_topic="late",
    where="",
)
SMALLEST = Fraction(1, 1 << 1074)


def shipped() -> bytes:
    """A repartition record of three orders in two groups and windows."""
    orders = {
        "country": ["DE", "DE", None],
        "size": [1, 1, 2],
        "i": [5, -7, 1],
        "f": [0.1, 0.2, -1.5],
        "t": ["a", "é", "z"],
    }
    partials = PartialAggregator(PLAN)
    partials.add(pl.DataFrame(orders), np.array([60_000, 60_000, -60_000]))
    (partial,) = partials.drain(source=3, sources=4, epoch=9, watermark=777, idle=False)
    (payload,) = partial.payloads
    return payload


def test_a_repartition_record_reads_as_documented() -> None:
    payload = shipped()
    (length,) = struct.unpack_from("<H", payload)
    assert msgspec.msgpack.decode(payload[2 : 2 + length]) == [1, "revenue", 3, 4, 9, 0, 1, 777, False]
    rows, count = struct.unpack_from("<IH", payload, at := 2 + length)
    at += 6
    columns = []
    for _ in range(count):
        kind, size = struct.unpack_from("<BI", payload, at)
        columns.append((kind, payload[at + 5 : at + 5 + size]))
        at += 5 + size
    assert (rows, at) == (2, len(payload))
    #       start key n  sum      mean        least  last  kinds
    kinds = [0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 1]
    assert [kind for kind, _ in columns] == kinds
    integers = [struct.unpack(f"<{rows}q", body) for kind, body in columns if kind == 0]
    assert integers[:6] == [(60_000, -60_000), (2, 1), (2, 1), (-1, 0), (-2, 1), (2, 1)]
    lengths, values = struct.unpack_from("<II", columns[1][1]), columns[1][1][8:]
    assert msgspec.msgpack.decode(values[: lengths[0]]) == ["DE", 1]
    width = len(columns[9][1]) // rows
    words = [columns[9][1][row * width : (row + 1) * width] for row in range(rows)]
    sums = [
        int.from_bytes(word, "little", signed=True) * (1 << 32 * base) * SMALLEST
        for word, base in zip(words, struct.unpack("<2q", columns[8][1]), strict=True)
    ]
    assert sums == [Fraction(0.1) + Fraction(0.2), Fraction(-1.5)]


def test_rows_and_distinct_values_read_as_documented() -> None:
    state = Overlay(MemoryStore(), "revenue")
    table = WindowTable(PLAN, state)
    table.apply(*decode_partial(shipped()), -1_000_000)
    table.collect(5)
    (first, row), (_, hashes), *_ = state.scan((60_000 + (1 << 63)).to_bytes(8, "big"), None)
    assert msgspec.msgpack.decode(first[8:]) == ["DE", 1]
    form = struct.Struct(">BBQ" "q" "q16s" "qBHH" "Bq" "BI" "q")  # fmt: skip
    version, window, epoch, n, _, total, _, flags, shift, length, _, least, _, size, kinds = form.unpack_from(row)
    assert (version, window, epoch, n, flags, kinds) == (1, 0, 5, 2, 0, 2)
    assert int.from_bytes(total, "big", signed=True) == -2
    digits, last = row[form.size : form.size + length], row[form.size + length :]
    assert int.from_bytes(digits, "big", signed=True) * (1 << shift) * SMALLEST == Fraction(0.1) + Fraction(0.2)
    assert struct.unpack("<d", struct.pack("<q", least)) == (0.1,)
    assert (last.decode(), size) == ("é", 2)
    pairs = {struct.unpack_from("<QQ", hashes, at) for at in (0, 16)}
    assert pairs == {hash_bytes_python(text.encode()) for text in ("a", "é")}
    chunk = (
        state.prefix + first[:8] + b"\xff" + first[8:] + bytes([5]) + (5).to_bytes(8, "big") + (0).to_bytes(2, "big")
    )
    assert state.prefix == crc32c(b"revenue").to_bytes(4, "big")
    assert state.get(chunk[4:]) == hashes


def test_a_changelog_record_reads_as_documented() -> None:
    assert changelog.record(Change(b"k", b"v"), 7) == (b"k", b"v", (("e", bytes(7) + b"\x07"),), None)
    gone = changelog.record(Change(b"k", None, "expire"), 7)
    assert gone == (b"k", None, (("e", bytes(7) + b"\x07"), ("x", b"expire")), None)


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


def line(start: str) -> list[str]:
    return [command for command in commands(README) if command.startswith(start)]


def at_port(command: str, port: int) -> str:
    """The command or URL as printed, but for the port: another worker may run on this machine."""
    return re.sub(r"606[67]", str(port), command)


@pytest.mark.slow
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


@pytest.mark.slow
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
