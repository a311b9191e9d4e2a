"""aiokafka says the same of a broker that is down hundreds of times a minute; once in a while is enough to be read."""

from __future__ import annotations

import logging

from streamproc.core.clock import Clock
from streamproc.core.limits import LOG_REPEAT_S

__all__ = ["quieten"]

LOGGERS = (
    "aiokafka",  # what its client module calls its logger
    "aiokafka.cluster",
    "aiokafka.conn",
    "aiokafka.consumer.group_coordinator",
)


class Repeats(logging.Filter):
    """Lets a message of one form pass once in `LOG_REPEAT_S`, whatever stands in it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now, form = self._clock.monotonic_s(), str(record.msg)
        if now - self._last.get(form, now - LOG_REPEAT_S) < LOG_REPEAT_S:
            return False
        self._last[form] = now
        return True


def quieten(clock: Clock) -> None:
    """Called by each transport as it starts; a logger gets the filter once."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, Repeats) for known in logger.filters):
            logger.addFilter(Repeats(clock))
