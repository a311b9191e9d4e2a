"""One result in both ways of writing an agent: flights per origin and UTC day.

    faust -A agents.totals worker

``totals_by_column`` is a pipeline's table, ``totals_by_record`` is counted record by record. They are equal, row for
row. The pipeline accepts however late a record is (the per-record agent knows no lateness), and neither drops
duplicates.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import streamproc as sp

SCHEMAS = Path(__file__).resolve().parent.parent / "schemas"

app = sp.App("totals", broker=os.environ.get("STREAMPROC_BROKER", "embedded://data/flights"), schemas=str(SCHEMAS))

flights = app.topic(
    "flights",
    value_schema=str(SCHEMAS / "flight.avsc"),
    partitions=4,
    event_time=sp.event_time("scheduled", out_of_orderness="30m", idle_after="5s", bounded=True),
)

by_column = (
    app.pipeline(flights)
    .group_by("origin")
    .window(sp.tumbling("1d"), allowed_lateness="400d", retain="400d")
    .agg(flights=sp.count())
    .table("totals_by_column")
)

by_record = app.Table("totals_by_record", default=int)


@app.agent(flights)
async def count_by_record(stream: Any) -> None:
    """The key holds the UTC day, as the pipeline's window does."""
    async for flight in stream:
        by_record[flight.origin, flight.scheduled.date().isoformat()] += 1


if __name__ == "__main__":
    app.main()
