"""Benchmarks ``memory`` and ``restore``: one row a window for every single order, so that there is much state.

    faust -A benchmarks.memory_job worker

It notes in the file ``first`` of its folder when the first orders of this start were committed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import streamproc as sp
from benchmarks.marks import MeasuredApp, Settings, settings, settled

__all__ = ["FIRST", "TABLE", "WINDOW_MS", "app", "build"]

TABLE: Final = "spending"
WINDOW_MS: Final = 5 * 60_000
FIRST: Final = "first"
"""Holds the time of the first commit with orders, ms since the epoch."""


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, _done)
    orders = app.orders(idle="hold")
    (
        app.pipeline(orders)
        .group_by("order_id")
        # An order that comes again does so minutes later where orders are few: none of them is to be late.
        .window(sp.tumbling(f"{WINDOW_MS}ms"), allowed_lateness="3h")
        .agg(orders=sp.count(), amount=sp.sum("amount"))
        .table(TABLE)
    )
    return app


async def _done(app: MeasuredApp) -> bool:
    note = Path(app.told.folder) / FIRST
    if not note.exists() and any(app.runtime.counts().values()):
        note.write_text(str(app.clock.now_ms()))
    return await settled(app)


app = build(settings())
