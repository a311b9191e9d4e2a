"""streamproc: Faust's agents, Flink's guarantees, columnar speed."""

from streamproc.app import App, Worker
from streamproc.core.errors import UserError
from streamproc.operators.aggregates import count, count_distinct, max, mean, min, sum
from streamproc.operators.pipeline import event_time, tumbling

__all__ = [
    "App",
    "UserError",
    "Worker",
    "count",
    "count_distinct",
    "event_time",
    "max",
    "mean",
    "min",
    "sum",
    "tumbling",
]
