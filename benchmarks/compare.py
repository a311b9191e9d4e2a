"""All that a run left, against the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import numpy as np

from benchmarks import distinct_job, oracle, pipeline_job, results
from benchmarks.marks import Settings
from benchmarks.orders import Orders
from streamproc.transport.contract import Transport

__all__ = ["compare", "compare_windows"]


async def compare(name: str, told: Settings, transport: Transport, input_: Orders) -> list[str]:
    """What differs, in words, after a run of benchmark ``name``; none: every row and record is as it should be."""
    match name:
        case "agent":
            wanted = oracle.orders_per_user(input_.parquet)
            return oracle.differences("changelog", wanted, await results.agent_rows(told, transport))
        case "count":
            wanted = oracle.orders_per_user(input_.parquet)
            return oracle.differences("changelog", wanted, await results.count_rows(told, transport))
        case "forward":
            return await _compare_forwarded(told, transport, input_)
        case "distinct":
            wanted = oracle.buyers_by_country(input_.parquet)
            return await compare_windows(distinct_job, {"orders": int, "buyers": int}, wanted, told, transport)
    wanted = oracle.revenue_by_country(input_.parquet)
    return await compare_windows(pipeline_job, {"orders": int, "revenue": float}, wanted, told, transport)


async def compare_windows(
    job: ModuleType, columns: Mapping[str, type], wanted: oracle.Rows, told: Settings, transport: Transport
) -> list[str]:
    """Every row of the table, as its changelog has it, and of both sinks."""
    return [
        *oracle.differences("changelog", wanted, await results.window_rows(job, columns, told, transport)),
        *oracle.differences("Redis", wanted, await results.redis_rows(told.redis, job.TABLE, columns)),
        *oracle.differences("Postgres", wanted, await results.postgres_rows(told.postgres, job.TABLE, columns)),
    ]


async def _compare_forwarded(told: Settings, transport: Transport, input_: Orders) -> list[str]:
    """Every record of the output topic, byte for byte and in its order."""
    places = np.array(oracle.completed(input_.parquet), np.int64)
    wrong = []
    for partition in range(told.partitions):
        mine = places[input_.partitions[places] == partition].tolist()
        wanted = [input_.record(place) for place in mine]
        got = await results.forwarded(told, transport, partition)
        wrong += oracle.differences_in_order(f"partition {partition}", wanted, got)
    return wrong
