"""streamproc: Faust's agents, Flink's guarantees, columnar speed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "App": "app",
    "UserError": "core.errors",
    "Worker": "app",
    "event_time": "operators.pipeline",
    "tumbling": "operators.pipeline",
}


def __getattr__(name: str) -> Any:
    """Names are imported when they are asked for: a layer below `app` must not pull in the whole of Faust."""
    if name not in __all__:
        raise AttributeError(f"module 'streamproc' has no attribute {name!r}")
    return getattr(import_module(f"streamproc.{_HOME.get(name, 'operators.aggregates')}"), name)
