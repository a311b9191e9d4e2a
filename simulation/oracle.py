"""The input of a simulated run, and what must come of it, computed in one go; nothing of streamproc's operators is used."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from typing import Any

from simulation.job import HOUR_MS, OUT_OF_ORDER_MS, PARTITIONS, TABLES

__all__ = ["Input"]

T0_MS = 1_690_000_000_000 // (24 * HOUR_MS) * 24 * HOUR_MS
EVENTS, WORDS = 32, 20
"""Of each partition."""
Event = dict[str, Any]


class Input:
    """Events (None: bytes that are no Avro) and words of each partition, in offset order."""

    def __init__(self, seed: int) -> None:
        dice = random.Random(f"input {seed}")
        self.events: list[list[Event | None]] = [self._events(dice, partition) for partition in range(PARTITIONS)]
        self.words = [self._words(dice, partition) for partition in range(PARTITIONS)]

    @staticmethod
    def _events(dice: random.Random, partition: int) -> list[Event | None]:
        """Twelve hours of events: some twice, some out of order, some beyond all lateness, some without a usable time."""
        found: list[Event | None] = []
        for at in range(EVENTS):
            time_ms = T0_MS + 16 * HOUR_MS + at * 12 * HOUR_MS // EVENTS
            if dice.random() < 0.15:
                time_ms -= dice.choice([5 * 60_000, 20 * 60_000, 2 * HOUR_MS])
            event = {"id": f"{partition}-{at}", "country": dice.choice(["DE", "FR", "IT", "US"]),
                     "amount": float(dice.randrange(100)), "at": time_ms}  # fmt: skip
            found.append(event)
            if dice.random() < 0.1:
                known = [event for event in found if event is not None]
                found.append(dict(dice.choice(known)))
            if dice.random() < 0.03:
                found.append(None if dice.random() < 0.5 else {**event, "id": f"{partition}-{at}-timeless", "at": None})
        # Far behind all of it, so that every window but its own is final.
        end_ms = T0_MS + 10 * 24 * HOUR_MS
        return [*found, {"id": f"{partition}-end", "country": "ZZ", "amount": 1.0, "at": end_ms}]

    @staticmethod
    def _words(dice: random.Random, partition: int) -> list[dict[str, Any]]:
        """One hangs: an agent that does so several times in a row ends its worker, as it should."""
        kinds = ["good"] * 25 + ["flaky"] * 2 + ["bad"]
        found = [
            {"key": f"{partition}{dice.choice('abcde')}", "n": at, "kind": dice.choice(kinds)} for at in range(WORDS)
        ]
        dice.choice(found)["kind"] = "stuck"
        return found

    def tables(self) -> tuple[dict[str, dict[Any, Any]], dict[str, list[tuple[int, int]]]]:
        """Rows of every table: (country, window's start) -> (n, amount, kinds); and late records: (partition, offset)."""
        groups: dict[str, dict[Any, list[Event]]] = {name: defaultdict(list) for name in TABLES}
        late: dict[str, list[tuple[int, int]]] = {name: [] for name in TABLES}
        for partition, events in enumerate(self.events):
            watermark_ms, seen = -(1 << 60), set()
            for offset, event in enumerate(events):
                if event is None or event["at"] is None:
                    continue
                before_ms, watermark_ms = watermark_ms, max(watermark_ms, event["at"] - OUT_OF_ORDER_MS - 1)
                if event["id"] in seen:
                    continue
                seen.add(event["id"])
                for name, (size_ms, lateness_ms) in TABLES.items():
                    start_ms = event["at"] // size_ms * size_ms
                    if start_ms + size_ms - 1 + lateness_ms <= before_ms:
                        late[name].append((partition, offset))
                    else:
                        groups[name][event["country"], start_ms].append(event)
        rows = {
            name: {
                key: (len(of), sum(e["amount"] for e in of), len({e["amount"] for e in of}))
                for key, of in table.items()
            }
            for name, table in groups.items()
        }
        return rows, late

    def dead_events(self) -> list[tuple[int, int]]:
        """(partition, offset) of events that cannot be read or have no time."""
        return [
            (partition, offset)
            for partition, events in enumerate(self.events)
            for offset, event in enumerate(events)
            if event is None or event["at"] is None
        ]

    def counts(self) -> dict[str, int]:
        found: defaultdict[str, int] = defaultdict(int)
        for words in self.words:
            for word in words:
                found[word["key"]] += word["kind"] != "bad"
        return {key: count for key, count in found.items() if count}

    def numbers(self) -> dict[str, int]:
        found: defaultdict[str, int] = defaultdict(int)
        for words in self.words:
            for word in words:
                found[word["key"]] += word["n"]
        return dict(found)

    def echoes(self) -> dict[str, list[int]]:
        found: defaultdict[str, list[int]] = defaultdict(list)
        for words in self.words:
            for word in words:
                found[word["key"]].append(word["n"])
        return dict(found)

    def bad_words(self) -> list[tuple[int, int]]:
        return [(p, w["n"]) for p, words in enumerate(self.words) for w in words if w["kind"] == "bad"]

    def word_bytes(self) -> list[list[bytes]]:
        return [[json.dumps(word).encode() for word in words] for words in self.words]
