"""The main job: how punctual were New York's flights in 2013, by carrier and origin, for each hour and each UTC day.

    faust -A agents.flights worker

Event time is the scheduled departure. What was injected into the feed (duplicates, disorder, late, absurd and corrupt
records) is described in `demo/data.py`; the settings below are what that description calls the job's rules.

Settings of the environment: ``STREAMPROC_BROKER`` (default: a log in the folder data/flights, no server),
``STREAMPROC_REDIS`` and ``STREAMPROC_POSTGRES`` (none: the results go there not, only to the tables and the web view).
"""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

import streamproc as sp
from streamproc import sinks
from streamproc.eventtime.spec import Tumbling
from streamproc.operators.pipeline import TableHandle

SCHEMAS = Path(__file__).resolve().parent.parent / "schemas"

app = sp.App("flights", broker=os.environ.get("STREAMPROC_BROKER", "embedded://data/flights"), schemas=str(SCHEMAS))

flights = app.topic(
    "flights",
    value_schema=str(SCHEMAS / "flight.avsc"),
    partitions=4,
    event_time=sp.event_time("scheduled", out_of_orderness="30m", idle_after="5s", bounded=True),
)

stream = (
    app.pipeline(flights)
    .expect(
        {
            # Null passes: a cancelled flight has no delay and is data.
            "dep_delay sane": pl.col("dep_delay").is_between(-120, 2_880),
            "arr_delay sane": pl.col("arr_delay").is_between(-120, 2_880),
        },
        on_fail="dead_letter",
    )
    .dedupe(["time_hour", "carrier", "flight"], within="7d")
    .with_columns(cancelled=pl.col("dep_time").is_null().cast(pl.Int64))
)


def punctuality(name: str, window: Tumbling, allowed_lateness: str) -> TableHandle:
    """The same figures for any window. The whole year stays queryable."""
    return (
        stream.group_by("carrier", "origin")
        .window(window, allowed_lateness=allowed_lateness, retain="400d")
        .agg(
            flights=sp.count(),
            mean_delay=sp.mean("dep_delay"),
            max_delay=sp.max("dep_delay"),
            tails=sp.count_distinct("tailnum"),
            cancelled=sp.sum("cancelled"),
        )
        .with_columns(share_cancelled=pl.col("cancelled") / pl.col("flights"))
        .table(name)
    )


hourly = punctuality("hourly", sp.tumbling("1h"), "30m")
daily = punctuality("daily", sp.tumbling("1d"), "6h")

for table in (hourly, daily):
    table.late.to(f"flights-late-{table.name}")
    if redis_url := os.environ.get("STREAMPROC_REDIS"):
        table.sink(sinks.redis(redis_url), emit="on_update")
    if postgres_dsn := os.environ.get("STREAMPROC_POSTGRES"):
        table.sink(sinks.postgres(postgres_dsn), emit="on_update")

if __name__ == "__main__":
    app.main()
