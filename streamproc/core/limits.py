"""Every queue, buffer, retry and wait on a network has its bound here, with its unit in its name and why it is there."""

from __future__ import annotations

from typing import Final

INTERNAL_BATCH_BYTES_MAX: Final = 512 * 1024
"""A record batch that we produce stays below this (half a broker's default limit of 1 MiB)."""
FETCH_PARTITION_BYTES_MAX: Final = 2 << 20
"""Asked of a broker per partition and fetch; a larger single record still comes whole."""
FETCH_ANSWER_BYTES_MAX: Final = 8 << 20
"""Asked of a broker per fetch: the memory of one answer is used again by the next, that of a larger one is the system's to
clear each time (a tenth of all CPU with 64 partitions)."""
FETCH_SMALL_BYTES: Final = 64 << 10
FETCH_PAUSE_S: Final = 0.02
"""From one fetch to the next while many answers stay below `FETCH_SMALL_BYTES`: a batch costs a millisecond however few
records it has, and brokers answer as soon as they have one."""
FETCH_BURST: Final = 8
"""So many small answers in a row come without a pause: the commits of a table's readers come one by one, but soon."""
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
SINK_QUEUE_BYTES_MAX: Final = 64 << 20
"""Rows of committed epochs that wait for one sink of one task; beyond it, as beyond `SINK_QUEUE_EPOCHS_MAX`, its sources
pause. The one epoch that goes over it is kept too: it is committed."""
SINK_CATCH_UP_BYTES_MAX: Final = 8 << 20
"""Rows handed to a sink at a time while it is rebuilt or caught up, then to the end of an epoch: a table may be larger
than the memory."""
SINK_TIMEOUT_S: Final = 10.0
"""One answer of Redis or Postgres."""
DELETE_RETENTION_MS: Final = 7 * 24 * 3600 * 1000
"""`delete.retention.ms` of compacted internal topics: how long a tombstone is kept for a store or sink that is behind."""
RECORD_FAILURES_MAX: Final = 3
"""How often a record may fail its agent, unless the agent or the app says ``tries``, before ``on_fail`` is done."""
TASK_INBOX_BYTES_MAX: Final = 16 << 20
"""Fetched bytes that wait for one task; beyond it the source is paused until half of it is worked off."""
REFUSED_EPOCHS_MAX: Final = 3
"""How often in a row the broker may refuse a task's epoch before the worker stops and says why."""
EARLY_COMMITS_MAX: Final = 4
"""Commits of one table's owner within one interval that do not wait for its end: its upstream tasks commit one by one."""
PACED_TASKS_MIN: Final = 16
"""So many tasks of a worker commit at the interval whatever waits for them."""
PACE_S_PER_TASK: Final = 1 / 16
"""By so much each task beyond `PACED_TASKS_MIN` lengthens the epochs of tasks that are behind: some 15 commits a second, of
3 ms of CPU each and, of a table's readers, 0.05 ms for every partition that is told the watermark."""
TASK_RESTART_S_MAX: Final = 5.0
"""Longest pause between two starts of a failing task."""
SINK_CLOSE_S: Final = 3.0
"""How long a closing task waits for its sinks to apply what is committed; the next owner catches them up otherwise."""
SINK_CONNECTIONS_MAX: Final = 4
"""Connections of one worker to one Redis or Postgres, shared by all its tasks and tables."""
REDIS_SLICE_ROWS_MAX: Final = 2_000
"""Rows of one atomic step in Redis: a few milliseconds in which the server serves nobody else."""
REDIS_FIELDS_MAX: Final = 3_500
"""Columns of one row: a Lua call takes about 8,000 arguments, two to a field."""
REDIS_SCAN_COUNT: Final = 1_000
"""Keys looked at per step when a rebuild lists a partition's rows."""
POSTGRES_COPY_ROWS: Final = 2_000
"""Rows of one COPY: a large epoch on a slow line is many answers within `SINK_TIMEOUT_S`, not one that never comes."""
POSTGRES_READ_ROWS_MAX: Final = 10_000
"""Rows fetched at a time when a rebuild lists a partition's rows."""
MARKER_WAIT_S: Final = 0.003
"""Between two tries while the last transaction's markers are on their way: a matter of milliseconds."""
FETCH_WAIT_MS_FULL: Final = 20
"""How long a broker may hold a fetch open that leaves out partitions whose buffers are full: they may drain meanwhile."""
FETCH_OUTAGE_S: Final = 30.0
"""How long no broker answers a fetch before `Fetcher.get` says so; the fetch itself goes on trying."""
PRODUCE_REQUEST_BYTES_MAX: Final = 8 << 20
"""Record batches of several partitions in one request to one broker."""
TRANSACTION_LANES: Final = 4
"""Connections per broker that a worker's tasks share: a broker serves the requests of one connection in order."""
READ_BUFFER_BYTES_MAX: Final = 4 << 20
"""Record sets that one restore fetches ahead."""
READ_LANES: Final = 4
"""Connections per broker that restores share."""
MEMBERSHIP_CHECK_S: Final = 1.0
"""How often the group client is asked whether it has failed."""
SESSION_TIMEOUT_S: Final = 10.0
"""A member that is not heard of for this long loses its partitions."""
HEARTBEAT_S: Final = 1.0
"""How soon a member hears of a rebalance."""
REBALANCE_TIMEOUT_S: Final = 60.0
"""What `on_revoked` may take; above `BARRIER_TIMEOUT_S` and `RETRY_TOTAL_S` together."""
STORE_MEMTABLE_BYTES: Final = 8 << 20
"""RocksDB's write buffer, per task: small, so that sorted batches are merged while in the processor's cache."""
STORE_CACHE_BYTES: Final = 64 << 20
"""Blocks of RocksDB held in memory, shared by all tasks of a worker."""
STORE_OPEN_FILES_MAX: Final = 256
"""Table files that one task's RocksDB keeps open."""
TABLE_KEPT_BYTES_MAX: Final = 128 << 20
"""Committed values of an app's tables that a worker holds in memory, in equal shares for every table and partition."""
RESTORE_WRITE_BYTES_MAX: Final = 4 << 20
"""Changelog rows of one WriteBatch while restoring; a crash repeats at most this much."""
CHANGELOG_RECORD_BYTES_MAX: Final = INTERNAL_BATCH_BYTES_MAX - 4_096
"""Key and value of one changelog record; the rest of a batch is its own head and the record's headers."""
DEDUPE_BYTES_MAX: Final = 1 << 30
"""Memory for the ids that one dedupe step of one task remembers: 18 million; half as much again while it grows."""
DEDUPE_CHUNK_BYTES_MAX: Final = 256 << 10
"""Ids that one row of dedupe state holds."""
AGENT_CANCEL_S: Final = 1.0
"""How long a given-up agent may take to leave; what it does afterwards reaches nothing."""
DECOMPRESSED_BATCH_BYTES_MAX: Final = 64 << 20
"""What one compressed record batch may unpack to: some kilobytes of hostile bytes must not fill the memory."""
AVRO_ITEMS_MAX: Final = 1 << 16
"""Items in all arrays and maps of one record, unless the record has more bytes: items of no size must be bounded too."""
AVRO_DEPTH_MAX: Final = 64
"""Nested records, arrays and maps of one record: a recursive type must not exhaust the stack."""
INTERNAL_MESSAGE_BYTES_MAX: Final = 8 << 20
"""`max.message.bytes` of internal topics: a dead letter is a record of the user's plus our headers."""
REVOKE_S: Final = 9.0
"""How long a rebalance waits for the tasks to commit and close; what does not fit is redone by the next owner."""
TICK_S: Final = 0.2
"""How often idleness is looked at."""
TRIM_INTERVAL_S: Final = 10.0
"""How often repartition topics are trimmed behind the committed positions."""
FREE_MEMORY_INTERVAL_S: Final = 0.5
"""How often a worker hands memory that is free to the system: some 150 MB each time behind a table of ten million keys, for
6 ms."""
BARRIER_TIMEOUTS_MAX: Final = 3
"""How often in a row an agent may hold up a commit before the worker stops and names its line."""
DISTINCT_CACHE_BYTES_MAX: Final = 256 << 20
"""Sets of distinct values that one table keeps in memory per task; a set that is not there is read from the store."""
TABLE_ROWS_CACHE_BYTES_MAX: Final = 16 << 20
"""Decoded rows of earlier epochs that one table of a pipeline keeps in memory per task; others are read from the store."""
DISTINCT_CHUNK_BYTES_MAX: Final = 256 * 1024
"""One stored chunk of a set of distinct values: a record well below `INTERNAL_BATCH_BYTES_MAX`."""
REASONS_COUNTED_MAX: Final = 100
"""Reasons for dead letters that a source counts one by one; a reason may hold a value, and hostile input many of them."""
AVRO_SCHEMAS_MAX: Final = 4_096
"""Writer schema ids that one decoder remembers, known or not; a further one is looked up for every batch."""
COMPACT_BYTES_MIN: Final = 1 << 20
"""A partition of the embedded log with less than this behind its last compaction is left alone at start."""
COMPACT_AT_START_S: Final = 0.5
"""No further partition is compacted at start once this much of the budget to the first record is gone."""
WEB_ROWS_MAX: Final = 1_000
"""Rows in one answer of the web view; a list goes on by its cursor."""
WEB_ROWS: Final = 100
"""Rows in an answer when the question does not say how many."""
WEB_SCAN_ROWS_MAX: Final = 5_000
"""Stored rows looked at for one answer, whatever it filters by: an answer may end earlier and say where to go on."""
WEB_SLICE_ROWS: Final = 250
"""Stored rows decoded between two breaths of the event loop: a few milliseconds in which no batch is processed."""
WEB_WINDOWS_MAX: Final = 500
"""Windows of one chart."""
WEB_TEXT_MAX: Final = 1_000
"""Characters of one parameter."""
WEB_VALUE_CHARS_MAX: Final = 20_000
"""JSON of one value of an `app.Table` in a list; a longer one is told by its length, the point query gives it whole."""
WEB_SIDE_RECORDS: Final = 100
"""Dead letters or late records shown of one topic."""
WEB_SIDE_BYTES_MAX: Final = 8 << 20
"""Records of one side topic read for one answer: each may hold megabytes, of which the view shows the size only."""
WEB_WORKER_TIMEOUT_S: Final = 3.0
"""One answer of another worker to a forwarded question."""
WEB_STREAMS_MAX: Final = 32
"""Pages that one worker keeps up to date at a time."""
WEB_EVENT_INTERVAL_S: Final = 1.0
"""How often a live page is told what is new; also how old a shared answer may be."""
WEB_SEND_TIMEOUT_S: Final = 10.0
"""How long a live page may take to read an event before it is given up."""
WEB_PATIENCE_S: Final = 0.5
"""How long an answer waits for the broker before it gives the last facts it has."""
WARM_UP_QUIET_S: Final = 2.0
"""How long loading the compiled kernels may take before the log says that they are being compiled."""
GROUP_OFFSETS_WAIT_S: Final = 5.0
"""How long a starting task waits for the group's offsets to show what its commit record says."""
TABLE_TEXT_BYTES_MAX: Final = CHANGELOG_RECORD_BYTES_MAX // 4
"""Text in one row of a pipeline's table: its key and what min and max keep. A record with more than its share is a dead
letter; the rest of a changelog record is for the other aggregates, or for a chunk of distinct values."""
LOG_REPEAT_S: Final = 5.0
"""How often the client library may repeat one complaint about a broker that does not answer."""
RESTORE_TELL_S: Final = 2.0
"""How often a restore that takes its time says in the log how far it is."""
STANDBY_POLL_S: Final = 1.0
"""How often a standby looks for new rows: what is younger is restored by the task that takes over."""
STANDBY_BYTES_PER_S_MAX: Final = 32 << 20
"""Changelog that one standby reads, so that catching up does not starve the tasks that run here."""
STANDBY_READS_MAX: Final = 2
"""Standbys of a worker that read at a time; each holds `READ_BUFFER_BYTES_MAX` and `RESTORE_WRITE_BYTES_MAX`."""
STANDBY_FRESH_MS: Final = 60_000
"""How often an idle standby notes that it is up to date, so that its store does not grow too old to go on."""
STANDBY_FAILURES_QUIET: Final = 3
"""Failures of a standby in a row before the log says so: a marker under way or a broker that moves is none."""
STANDBY_RETRY_S_MAX: Final = 30.0
"""Longest pause of a standby that fails."""
