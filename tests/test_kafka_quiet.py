"""A library's complaint is passed on once in a while."""

from __future__ import annotations

import logging

from streamproc.core.limits import LOG_REPEAT_S
from streamproc.transport.kafka.quiet import Repeats


class Hand:
    """A clock moved by hand."""

    now = 0.0

    def now_ms(self) -> int:
        return round(self.now * 1000)

    def monotonic_s(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def says(filter_: Repeats, form: str, *args: object, level: int = logging.ERROR) -> bool:
    return bool(filter_.filter(logging.LogRecord("aiokafka.conn", level, "", 0, form, args, None)))


def test_one_complaint_passes_once_per_interval_and_another_is_not_held_back() -> None:
    clock = Hand()
    repeats = Repeats(clock)
    assert says(repeats, "Unable to connect to %s", "a:1")
    assert not says(repeats, "Unable to connect to %s", "b:2")
    assert says(repeats, "Unable to request metadata")
    assert says(repeats, "Discovered %s", "c", level=logging.INFO)
    assert says(repeats, "Discovered %s", "c", level=logging.INFO)
    clock.now += LOG_REPEAT_S
    assert says(repeats, "Unable to connect to %s", "a:1")
