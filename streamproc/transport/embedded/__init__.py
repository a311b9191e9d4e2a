"""The embedded transport: a log for one process in one SQLite file, with the same record batches and transactions."""

from __future__ import annotations

from streamproc.transport.embedded.transport import EmbeddedTransport

__all__ = ["EmbeddedTransport"]
