"""Every queue, buffer, retry and wait on a network has its bound here, with its unit in its name and why it is there."""

from __future__ import annotations

from typing import Final

INTERNAL_BATCH_BYTES_MAX: Final = 512 * 1024
"""A record batch that we produce stays below this (half a broker's default limit of 1 MiB)."""
FETCH_PARTITION_BYTES_MAX: Final = 1 << 20
"""Asked of a broker per partition and fetch; a larger single record still comes whole."""
FETCH_WAIT_MS_MAX: Final = 200
"""How long a broker may hold a fetch open when it has nothing."""
FETCH_BUFFER_BYTES_MAX: Final = 64 << 20
"""Record sets fetched and not yet processed, per worker: beyond it nothing more is asked for."""
REQUEST_TIMEOUT_S: Final = 10.0
"""One answer of a broker."""
RETRY_TOTAL_S: Final = 12.0
"""How long a retriable answer (coordinator moved, not leader, concurrent transactions) is asked again within a commit."""
RETRY_BACKOFF_S: Final = 0.05
"""First pause between two tries; it doubles up to `RETRY_BACKOFF_S_MAX`."""
RETRY_BACKOFF_S_MAX: Final = 2.0
TRANSACTION_TIMEOUT_MS: Final = 15_000
"""Above what a commit may take (`RETRY_TOTAL_S`), below what a reader can wait for a dead task's open transaction."""
BARRIER_TIMEOUT_S: Final = 8.0
"""How long a commit waits for records that an agent holds; below the rebalance time-out."""
EPOCH_BYTES_MAX: Final = 64 << 20
"""Uncommitted state and outputs of one task that force a commit before its interval is over."""
SINK_QUEUE_EPOCHS_MAX: Final = 16
"""Committed epochs that wait for one sink of one task; beyond it the task's sources pause (back-pressure)."""
SINK_TIMEOUT_S: Final = 10.0
"""One answer of Redis or Postgres."""
DELETE_RETENTION_MS: Final = 7 * 24 * 3600 * 1000
"""`delete.retention.ms` of compacted internal topics: how long a tombstone is kept for a store or sink that is behind."""
RECORD_FAILURES_MAX: Final = 3
"""How often a record may fail its agent before it becomes a dead letter."""
