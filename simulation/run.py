"""One seed: the job under faults, then everything it left compared with the oracle."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from simulation.job import PARTITIONS, SCHEMAS, TABLES, build
from simulation.oracle import Input
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.operators.partials import decode_partial
from streamproc.testing.simulation import steps
from streamproc.testing.simulation.cluster import Cluster, scratch
from streamproc.testing.simulation.loop import virtual_loop
from streamproc.testing.simulation.nemesis import Nemesis
from streamproc.testing.simulation.watch import Broken
from streamproc.transport.contract import OutRecord

__all__ = ["Result", "run_seed"]

PATIENCE = 8
"""How many fifths of a second a portion of the input waits for a commit."""


@dataclass
class Result:
    """What a seed left."""

    seed: int
    failure: str | None = None
    told: list[str] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)
    died: set[str] = field(default_factory=set)
    faults: dict[str, int] = field(default_factory=dict)
    epochs: int = 0
    virtual_s: float = 0.0


def run_seed(seed: int, targets: Sequence[str] = (), *, calm: bool = False) -> Result:
    """``targets``: steps that workers are to die at, beside what the seed draws. The steps must be installed."""
    dice = random.Random(seed)
    loop = virtual_loop(seed)
    result = Result(seed)
    with scratch() as folder:
        input, failed = Input(seed), set[Any]()
        idle = seed % 5 == 4
        cluster = Cluster(
            lambda: build(failed, idle=idle, standbys=seed % 2), loop, dice, Path(folder), rocksdb=seed % 8 == 0
        )
        nemesis = None if calm else Nemesis(cluster, targets, meddled="events")
        try:
            with steps.listening(cluster.at_step):
                loop.run(_scenario(cluster, input, nemesis, idle))
        except AssertionError as failure:
            result.failure = str(failure) or repr(failure)
        except (
            Exception
        ) as failure:  # of the harness's own calls, into a log that a fault has left in a state of its own
            result.failure = repr(failure)
        if cluster.watch.broken:
            result.failure = "; ".join(cluster.watch.broken[:3]) + (f"; {result.failure}" if result.failure else "")
        result.told, result.reached, result.died = cluster.told, cluster.reached, cluster.died
        result.faults, result.epochs, result.virtual_s = (
            cluster.weather.counts,
            cluster.watch.epochs,
            loop.time() - 1_000,
        )
    return result


async def _scenario(cluster: Cluster, input: Input, nemesis: Nemesis | None, idle: bool) -> None:
    await cluster.open()
    try:
        for topic in ("events", "words"):
            await cluster.create(topic, PARTITIONS)
        for _ in range(2):
            cluster.start()
        feeding = asyncio.create_task(_feed(cluster, input, nemesis))
        if nemesis is not None:
            await nemesis.torment(feeding)
        await feeding
        if nemesis is not None:
            await nemesis.make_peace()
        await cluster.settle()
        await cluster.check_changelogs()
        if idle:
            await _compare_sums(cluster, input)
        else:
            await _compare_tables(cluster, input)
        await _compare_agents(cluster, input)
    finally:
        await cluster.close()
    if cluster.watch.broken:
        raise Broken(cluster.watch.broken[0])


async def _feed(cluster: Cluster, input: Input, nemesis: Nemesis | None) -> None:
    """The input, in small portions over some thirty seconds; the order between partitions is drawn. A portion waits for
    a commit of what was there before, for a while: what is fed to nobody ends in one epoch, which few faults can hit."""
    encoder = Encoder(load_schema(SCHEMAS / "event.avsc"), 1)
    queues: list[tuple[str, int, list[OutRecord]]] = []
    for partition in range(PARTITIONS):
        events = [
            OutRecord(None, b"\x00no avro", (), None)
            if event is None
            else OutRecord(None, encoder.encode(event), (), event["at"])
            for event in input.events[partition]
        ]
        queues.append(("events", partition, events))
        words = [OutRecord(word["key"].encode(), json.dumps(word).encode()) for word in input.words[partition]]
        queues.append(("words", partition, words))
    dice = random.Random(cluster.dice.random())
    while queues:
        topic, partition, records = queue = dice.choice(queues)
        count = dice.randrange(1, 12)
        if nemesis is not None:
            await nemesis.feeding.wait()
        await cluster.send(topic, partition, *records[:count])
        del records[:count]
        if not records:
            queues.remove(queue)
        before = cluster.watch.epochs
        await asyncio.sleep(dice.uniform(0.0, 1.2))
        for _ in range(PATIENCE):
            if cluster.watch.epochs > before:
                break
            await asyncio.sleep(0.2)


async def _compare_sums(cluster: Cluster, input: Input) -> None:
    """Each event once: in its window, or late where it was read, or late where its window was."""
    events = {event["id"] for events in input.events for event in events if event is not None and event["at"]}
    for name in TABLES:
        rows = cluster.sinks["redis"].rows[name].values() if name == "hourly" else cluster.rows(name)
        counted = sum(cast(int, row["n"]) for row in rows)
        letters = await cluster.records(f"late-{name}")
        records = sum("sp-topic" in headers for _, _, _, headers in letters)
        merged = sum(int(decode_partial(value or b"")[1].integers(2)[0]) for _, _, value, headers in letters
                     if "sp-topic" not in headers)  # fmt: skip
        cluster.watch.require(
            counted + records + merged == len(events),
            f"{name}: {counted} counted, {records} + {merged} late, instead of {len(events)} events",
        )


async def _compare_tables(cluster: Cluster, input: Input) -> None:
    require = cluster.watch.require
    rows, late = input.tables()
    for name in TABLES:
        found = {
            (row["country"], int(row["window_start"].timestamp() * 1000)): (row["n"], row["amount"], row["kinds"])
            for row in cluster.rows(name)
        }
        wrong = {key: (value, rows[name].get(key)) for key, value in found.items() if rows[name].get(key) != value}
        require(not wrong, f"table {name}: {_some(wrong)}")
        gone = {key for key in rows[name].keys() - found.keys() if name != "hourly" or key[0] == "ZZ"}
        require(not gone, f"table {name} lacks {_some(gone)}")
        for sink in cluster.sinks.values():
            if name not in sink.rows and name == "daily":
                continue
            expected = {key: value for key, value in rows[name].items() if name == "hourly" or key[0] != "ZZ"}
            sunk = {key: (row["n"], row["amount"], row["kinds"]) for key, row in sink.rows[name].items()}
            require(sunk == expected, f"sink {sink.name}, table {name}: {_difference(sunk, expected)}")
        letters = [(p, int(headers["sp-offset"])) for p, _, _, headers in await cluster.records(f"late-{name}")]
        require(sorted(letters) == late[name], f"late {name}: {_difference(_counted(letters), _counted(late[name]))}")


async def _compare_agents(cluster: Cluster, input: Input) -> None:
    require = cluster.watch.require
    counts = input.counts()
    found_counts = cluster.values("counts", [*counts, "finally"])
    require(found_counts == counts, f"counts: {_difference(found_counts, counts)}")
    numbers = input.numbers()
    found_numbers = cluster.values("numbers", list(numbers))
    require(found_numbers == numbers, f"numbers: {_difference(found_numbers, numbers)}")
    sent: defaultdict[str, list[int]] = defaultdict(list)
    for _, key, value, _ in await cluster.records("out"):
        sent[(key or b"").decode()].append(json.loads(value or b""))
    wanted = {key: list(range(1, count + 1)) for key, count in counts.items()}
    require(sent == wanted, f"out: {_difference(sent, wanted)}")
    echoed: defaultdict[str, list[int]] = defaultdict(list)
    for _, key, value, _ in await cluster.records("echo"):
        echoed[(key or b"").decode()].append(json.loads(value or b""))
    said = input.echoes()
    require(echoed == said, f"echo: {_difference(echoed, said)}")
    dead = [(p, json.loads(value or b"")["n"]) for p, _, value, _ in await cluster.records("sim-words-dead-letters")]
    require(dead == input.bad_words(), f"dead words: {dead} instead of {input.bad_words()}")
    events = [(p, int(headers["sp-offset"])) for p, _, _, headers in await cluster.records("sim-events-dead-letters")]
    require(events == input.dead_events(), f"dead events: {events} instead of {input.dead_events()}")


def _counted(found: list[Any]) -> dict[Any, int]:
    return {key: found.count(key) for key in found}


def _difference(found: Any, expected: Any) -> str:
    keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    return _some({key: (found.get(key), "instead of", expected.get(key)) for key in keys})


def _some(what: Any) -> str:
    items = list(what.items()) if isinstance(what, dict) else list(what)
    return ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
