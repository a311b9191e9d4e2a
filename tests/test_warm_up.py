"""What `warm_up` loads is all that real partials need: a kernel compiled in mid-run holds the event loop for seconds."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import random, sys
import numpy as np, polars as pl
from numba.core.registry import CPUDispatcher
from streamproc.core.types import NO_WATERMARK
from streamproc.eventtime.spec import Tumbling
from streamproc.eventtime.windows import assign
from streamproc.operators.accumulate import PartialAggregator
from streamproc.operators.dedupe import DedupeOperator
from streamproc.operators.partials import decode_partial
from streamproc.operators.plan import Agg, Dedupe, TablePlan
from streamproc.operators.windowtable import WindowTable
from streamproc.runtime.warm import warm_up
from streamproc.state.memory import MemoryStore
from streamproc.state.overlay import Overlay

def signatures():
    kernels = {
        (name, each): kernel for name, module in list(sys.modules.items()) if name.startswith("streamproc.")
        for each, kernel in vars(module).items() if isinstance(kernel, CPUDispatcher)
    }
    return {name: list(map(str, kernel.signatures)) for name, kernel in kernels.items()}

warm_up(pipelines=True)
before = signatures()
random_ = random.Random(1)
keys = {"s": pl.String(), "b": pl.Boolean(), "u": pl.UInt64(), "d": pl.Date()}
inputs = {"i": pl.Int32(), "f": pl.Float32(), "w": pl.UInt64(), "t": pl.String()}
aggs = {f"{kind}_{column}": Agg(kind, column) for kind in ("sum", "mean", "min", "max") for column in "ifw"}
aggs |= {f"u_{column}": Agg("count_distinct", column) for column in inputs} | {"n": Agg("count"), "nf": Agg("count", "f")}
for more in ({}, {"t": Agg("max", "t")}):
    plan = TablePlan("t", keys, Tumbling(10), 5, 0, aggs | more, inputs, (), 3, "", "")
    aggregator, table = PartialAggregator(plan), WindowTable(plan, Overlay(MemoryStore(), "t"))
    for epoch, rows in enumerate((1, 1_000, 0, 300), 1):
        some = lambda make, null: [None if null and random_.random() < 0.1 else make() for _ in range(rows)]
        frame = pl.DataFrame({
            "s": some(lambda: random_.choice("abc") * random_.randrange(300), True), "b": some(lambda: True, True),
            "u": some(lambda: random_.randrange(1 << 64), False), "d": some(lambda: None, True),
            "i": some(lambda: random_.randrange(9), epoch > 2), "f": some(random_.random, epoch > 2),
            "w": some(lambda: random_.randrange(1 << 64), True), "t": some(lambda: "x" * random_.randrange(9), True),
        }, schema=keys | inputs)
        for piece in (frame[: rows // 2], frame[rows // 2 :], pl.concat([frame, frame], rechunk=False)):
            aggregator.add(piece, assign(np.array([random_.randrange(50) for _ in range(len(piece))], np.int64), plan.window))
        for partial in aggregator.drain(0, 1, epoch, 0, False):
            for payload in partial.payloads:
                table.apply(*decode_partial(payload), 10 * epoch)
        table.advance(10 * epoch, epoch)
        table.collect(epoch)
operator = DedupeOperator(Dedupe("d", ("id",), 8, "pass", ""), Overlay(MemoryStore(), "d"))
operator.restore()
ids = np.arange(20_000, dtype=np.uint64)
operator.admit(ids, ids, np.arange(20_000), np.full(20_000, NO_WATERMARK, np.int64))
operator.collect(1)
late = {name: [one for one in found if one not in before.get(name, [])] for name, found in signatures().items()}
print({name: found for name, found in late.items() if found})
"""


def test_no_kernel_is_compiled_for_real_records_after_the_warm_up() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "{}"
