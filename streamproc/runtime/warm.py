"""Loading the compiled kernels before the first record, in a thread, so that no record and no heartbeat waits for them."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np

from streamproc.avro import recordbatch
from streamproc.avro import warm as avro
from streamproc.core.types import NO_WATERMARK
from streamproc.operators import windowtable
from streamproc.operators.dedupe import DedupeOperator
from streamproc.operators.plan import Dedupe
from streamproc.state.memory import MemoryStore
from streamproc.state.overlay import Overlay

__all__ = ["warm_up"]

_IDS: Final = 4_096
"""So many that the table of a dedupe step grows."""


@cache
def warm_up(*, pipelines: bool) -> None:
    """Load, or once per machine compile, what reading records needs; with ``pipelines`` their operators too.

    Takes some tenths of a second, with nothing cached on disk some tens of seconds. numba compiles under a lock of its
    own, so it may run beside the event loop; done once per process.
    """
    recordbatch.warm_up()
    avro.warm_up()
    if pipelines:
        windowtable.warm_up(Overlay(MemoryStore(), "warm-up"))
        _warm_up_dedupe()


def _warm_up_dedupe() -> None:
    operator = DedupeOperator(Dedupe("warm-up", ("id",), 8, "pass", ""), Overlay(MemoryStore(), "warm-up"))
    operator.restore()
    ids = np.arange(1, _IDS + 1, dtype=np.uint64)
    operator.admit(ids, ids, np.zeros(_IDS, np.int64), np.full(_IDS, NO_WATERMARK, np.int64))
    operator.collect(1)
