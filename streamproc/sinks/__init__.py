"""Sinks that users declare on a table: `hourly.sink(sinks.redis(url), sinks.postgres(dsn))`.

The client libraries are extras and are imported with the first sink that is declared.
"""

from streamproc.sinks.postgres import postgres
from streamproc.sinks.redis import redis

__all__ = ["postgres", "redis"]
