"""Deliberate breaks of the protocol, one rule of `docs/commit.md` or `docs/semantics.md` each: the simulation must see each.

A mutant is a change of source text. `make simulate-mutants` applies one at a time and runs seeds until one fails. If the
code has changed so that a text is not found exactly once, the mutant says so instead of testing nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from streamproc.testing.simulation.steps import require_mutated

__all__ = ["MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """``edits``: (file below ``streamproc/``, text, what it becomes)."""

    name: str
    rule: str
    edits: tuple[tuple[str, str, str], ...]

    def changes(self) -> Mapping[str, Callable[[str], str]]:
        """For `steps.install`."""
        return {file: partial(self._apply, file) for file in {file for file, _, _ in self.edits}}

    def _apply(self, file: str, source: str) -> str:
        for at, old, new in self.edits:
            if at == file:
                source = require_mutated(self.name, source, old, new)
        return source


EPOCH, START, TASK, AGENTS = "runtime/epoch.py", "runtime/start.py", "runtime/task.py", "runtime/agentwork.py"
FEED, OWNER, RESTORE, LOG = (
    "runtime/sinkfeed.py",
    "runtime/ownerwork.py",
    "state/restore.py",
    "transport/embedded/log.py",
)
PRODUCE = "    offsets = await parts.producer.produce(records)\n"
END = "    await parts.producer.end(commit=True)\n"
MOVE = "        await self.writer.apply(rows, held=self._held, moved=moved)\n        self._held = moved\n"
GIVEN_UP = (
    '        self.overlays = _Shut(f"Agent {self.spec.name} was given up")\n'
    "        if self.runner is not None:\n            self.runner.cancel()\n"
)
CLAIM = "        await self.writer.apply(None, held=decision.held, moved=decision.claim)\n        self._held = decision.claim\n"
REPLAYED = 'if row.epoch >= from_epoch and row.tombstone != "expire":'
MERGED = '            if change.tombstone != "expire":\n'

_ALL = (
    Mutant("commit-record-outside", "the commit record is part of its epoch's transaction", (
        (EPOCH, PRODUCE, "    alone = {parts.commits: records.pop(parts.commits)}\n" + PRODUCE),
        (EPOCH, END, END + "    await parts.producer.produce(alone)\n" + END),
    )),
    Mutant("refused-produce-ignored", "a refused batch means no commit", (
        (EPOCH, PRODUCE, "    try:\n        offsets = await parts.producer.produce(records)\n"
                         "    except Exception:\n        offsets = {}\n        parts.producer._failed = False\n"),
    )),
    Mutant("store-before-commit", "the WriteBatch follows EndTxn", (
        (EPOCH, END, ""),
        (EPOCH, "    parts.applied = applied\n", "    parts.applied = applied\n" + END),
    )),
    Mutant("positions-before-fence", "the commit record is read behind the fence", (
        (START, "    await parts.producer.fence()\n", ""),
        (START, "    if not first:\n        await _require_group_offsets(parts, record)\n",
                "    await parts.producer.fence()\n"),
    )),
    Mutant("ledger-outside", "rows and ledger move in one step", (
        (FEED, MOVE, "        await self.writer.apply(None, held=self._held, moved=moved)\n        self._held = moved\n"
                     "        await self.writer.apply(rows, held=moved, moved=moved)\n"),
    )),
    Mutant("ledger-by-offset", "epochs are compared, offsets never", (
        (FEED, "self._replay(transport, hint, from_epoch)",
               "self._replay(transport, max(hint, record.changelogs.get(self.table.changelog, 0)), 0)"),
    )),
    Mutant("ledger-not-claimed", "the owner claims the ledger before it writes", (
        (FEED, CLAIM, "        self._held = decision.held or decision.claim\n"),
    )),
    Mutant("behind-taken-for-done", "a ledger that is behind is caught up", (
        (FEED, "        if isinstance(decision, CatchUp):\n", "        if False:\n"),
    )),
    Mutant("newer-claim-ignored", "an older incarnation is refused by the ledger", (
        ("commit/ledger.py", "    if found.incarnation > incarnation:\n", "    if False:\n"),
    )),
    Mutant("rebuild-not-marked", "a rebuild that dies half-way is begun again", (
        ("commit/ledger.py", "    if found.epoch == REBUILDING:\n", "    if False:\n"),
        ("commit/ledger.py", "    unfinished = Ledger(log_id, incarnation, REBUILDING, 0)\n",
                             "    unfinished = Ledger(log_id, incarnation, epoch - 1, 0)\n"),
    )),
    Mutant("fenced-swallowed", "ProducerFenced closes the task", (
        (EPOCH, END, "    try:\n        await parts.producer.end(commit=True)\n"
                     "    except Exception as failure:\n"
                     "        if type(failure).__name__ != 'ProducerFenced':\n            raise\n"),
    )),
    Mutant("unknown-outcome-believed", "an EndTxn without an answer is settled by the next fence", (
        (EPOCH, END, "    try:\n        await parts.producer.end(commit=True)\n"
                     "    except Exception as failure:\n"
                     "        if type(failure).__name__ != 'UnknownOutcome':\n            raise\n"
                     "        parts.producer._failed = False\n"),
    )),
    Mutant("barrier-lets-a-batch-start", "behind the barrier nothing is handed out", (
        (AGENTS, "        self._gate = False\n        for instance in self._instances:\n            instance.cut()\n", ""),
        (TASK, "            done = await commit(self._parts, self.record)\n",
               "            going = asyncio.ensure_future(commit(self._parts, self.record))\n"
               "            while not going.done():\n"
               "                if self._inbox and work.ready():\n"
               "                    self._process(self._inbox.popleft())\n"
               "                await asyncio.sleep(0.001)\n"
               "            done = going.result()\n"),
    )),
    Mutant("take-past-the-barrier", "what `take` buffers is not handed out until yielded", (
        (AGENTS, "            while values := list(islice(instance.it, max_)):\n                yield values\n",
                 "            held = vars(self).get('_held', []) + list(instance.it)\n"
                 "            while len(held) >= max_:\n                yield held[:max_]\n                del held[:max_]\n"
                 "            self._held = held\n"),
    )),
    Mutant("agents-go-on-too-early", "agents go on when the overlay is dropped, not before", (
        (EPOCH, END, "    work.release()\n" + END),
    )),
    Mutant("aborted-ranges-read", "what an aborted transaction wrote is never read", (
        (LOG, "                self._mark(db, opened, state, commit=False)\n",
              "                if state.open:\n"
              "                    self._insert(db, state.open.batches, state.producer_id, True, self._clock.now_ms())\n"
              "                self._mark(db, opened, state, commit=False)\n"),
    )),
    Mutant("expire-taken-for-delete", "a row that left by retention stays in the sinks", (
        (FEED, REPLAYED, "if row.epoch >= from_epoch:"),
        (FEED, MERGED, "            if True:\n"),
        (FEED, "        if not live:\n            return None\n        frame = self.work.results(live)\n",
               "        import polars as pl\n\n        layout = self.work.table.rows.layout\n"
               "        fresh = layout.encode(layout.fresh())\n"
               "        gone = [(key, fresh) for key, value in rows.items() if value is None and is_row(key)]\n"
               "        if not live and not gone:\n            return None\n"
               "        frame = self.work.results(live + gone)\n"
               "        if gone:\n"
               "            seen = pl.Series([True] * len(live) + [False] * len(gone))\n"
               "            frame = frame.with_columns(__visible=seen)\n"),
    )),
    Mutant("expired-before-its-sink", "a row leaves only when every sink has its last change", (
        ("operators/windowtable.py", " or self._final_epoch(start) > sinks_epoch", ""),
    )),
    Mutant("uncommitted-values-kept", "what a table keeps in memory over its epochs is committed", (
        ("state/objects.py", "        super().clear()\n        self._read, self._deleted",
                             "        self._kept.add(list(super().keys()), list(super().values()), 0)\n"
                             "        super().clear()\n        self._read, self._deleted"),
    )),
    Mutant("half-of-a-failed-record", "an epoch that failed leaves nothing", (
        (TASK, "        for overlay in self._parts.overlays.values():\n            overlay.drop()\n        self._open_work()\n",
               "        self._open_work()\n"),
    )),
    Mutant("purged-window-made-again", "a purged window is never made again", (
        ("operators/windowtable.py", "        late = {start for start in found if self._is_late(start, watermark)}\n",
                                     "        late = set()\n"),
    )),
    Mutant("idle-by-the-owner-s-clock", "only an upstream task knows that it is idle", (
        (OWNER, '        """An upstream task is never idled by its owner\'s clock: only it knows."""\n',
                "        for source, state in self._clock.states().items():\n            if source >= 0:\n"
                "                self._clock.update(source, state.watermark, monotonic_ms % 3 == source)\n"),
    )),
    Mutant("one-position-for-all-agents", "each agent has a position of its own", (
        (AGENTS, "                tp: record.positions[spec.name][tp_name(tp)]\n",
                 "                tp: min(of[tp_name(tp)] for of in record.positions.values())\n"),
    )),
    Mutant("watermark-not-committed", "the watermark is committed with the epoch", (
        (EPOCH, "        watermarks=work.watermarks(),\n", "        watermarks={},\n"),
    )),
    Mutant("incarnation-kept", "each start is an incarnation of its own", (
        (EPOCH, "last.incarnation + 1 if starting else last.incarnation", "last.incarnation"),
    )),
    Mutant("restore-stops-early", "a restore goes up to its target", (
        (RESTORE, "                tell(self.applied[topic])\n", "                tell(self.applied[topic])\n"
                  "            if records > 2:\n                break\n"),
    )),
    Mutant("applied-too-far", "a store's position is that of what it holds", (
        (EPOCH, "            applied[table.changelog] = at + 1\n", "            applied[table.changelog] = at + 4\n"),
    )),
    Mutant("old-store-kept", "a store older than its tombstones is wiped", (
        (RESTORE, "    if age_ms > limits.DELETE_RETENTION_MS // 2:\n", "    if False:\n"),
    )),
    Mutant("store-ahead-kept", "a store is not believed ahead of the commit record", (
        (EPOCH, "    await parts.producer.send_offsets(least_positions(positions), parts.group)\n",
                "    await parts.producer.send_offsets(least_positions(positions), parts.group)\n"
                "    early = Writes()\n    for overlay in parts.overlays.values():\n        overlay.writes(early)\n"
                "    meta = parts.store.meta()\n    if meta is not None:\n        parts.store.write(early, meta)\n"),
    )),
    Mutant("group-offsets-not-compared", "the group's offsets are those of the commit record", (
        (START, "    if not first:\n        await _require_group_offsets(parts, record)\n", ""),
    )),
    Mutant("group-offsets-not-sent", "the group's offsets go with the commit record", (
        (EPOCH, "    await parts.producer.send_offsets(least_positions(positions), parts.group)\n", ""),
    )),
    Mutant("state-of-no-record-kept", "no commit record but a changelog that is not empty stops the worker", (
        ("commit/start.py", "        if held:\n", "        if False:\n"),
    )),
    Mutant("ledger-ahead-believed", "a ledger above the commit record: the log has lost data", (
        ("commit/ledger.py", "    if found.epoch > epoch:\n", "    if False:\n"),
    )),
    Mutant("ledger-of-another-log-taken-over", "a ledger of another log stops the worker", (
        ("commit/ledger.py", "    if found.epoch == 0:\n", "    if True:\n"),
    )),
    Mutant("rebuild-leaves-strays", "a rebuilt sink holds no row that is neither live nor past", (
        (FEED, "        if identity:\n            since_ms", "        if False:\n            since_ms"),
    )),
    Mutant("rebuild-drops-the-past", "a rebuilt sink keeps what left the state by retention", (
        (FEED, "            since_ms = min(start for *_, start in identity)\n", "            since_ms = 0\n"),
    )),
    Mutant("rebuild-writes-nothing", "a sink without a ledger is given all live rows", (
        (FEED, "            await self.writer.apply(rows, held=self._held, moved=self._held)\n            starts =",
               "            starts ="),
    )),
    Mutant("hint-too-far", "a replay for a sink starts where its ledger stands", (
        (FEED, "                hint = last.applied.get(self.table.changelog, 0)\n",
               "                hint = last.applied.get(self.table.changelog, 0) + 6\n"),
    )),
    Mutant("failed-step-forgotten", "what a sink did not take is given to it again", (
        (FEED, "                self._at_once = max(len(epochs) // 2, 1)\n",
               "                self._at_once = max(len(epochs) // 2, 1)\n                for _ in epochs:\n"
               "                    self._queue_bytes -= self._queue.popleft().size_bytes\n"),
    )),
    Mutant("full-disk-ignored", "a WriteBatch that failed is made up for from the log", (
        (EPOCH, "    parts.store.write(writes, StoreMeta(record.log_id, record.epoch, applied, parts.clock.now_ms()))\n",
                "    try:\n        parts.store.write(writes, StoreMeta(record.log_id, record.epoch, applied, "
                "parts.clock.now_ms()))\n    except OSError:\n        pass\n"),
    )),
    Mutant("barrier-does-not-wait", "the barrier waits for what is handed out", (
        (AGENTS, "            if self.failure is None:\n                await asyncio.wait_for(self._all_idle.wait(), "
                 "limits.BARRIER_TIMEOUT_S)\n", "            await asyncio.sleep(0)\n"),
    )),
    Mutant("barrier-time-out-ignored", "an epoch whose agent holds a record for too long is given up", (
        (AGENTS, "            if slow is None:  # in the very moment\n                return\n", "            return\n"),
    )),
    Mutant("given-up-agent-goes-on", "each epoch that failed makes the agents anew, and the old ones touch nothing", (
        (AGENTS, GIVEN_UP, "        pass\n"),
    )),
    Mutant("stale-batches-kept", "what was fetched before a restart is forgotten", (
        (TASK, "        self._inbox.clear()\n        self._paused.clear()\n", "        self._paused.clear()\n"),
    )),
    Mutant("trimmed-past-the-commit", "repartition topics are trimmed behind the committed positions only", (
        ("runtime/runtime.py", "                    at = task.committed_position(task.work.tp)\n",
                               "                    at = task.work.resume_at()[task.work.tp]\n"),
    )),
    Mutant("id-of-the-owner", "a task's transactional id is the same with every owner", (
        (TASK, '{env.group.name}:{self.id.partition}")', '{env.group.name}:{self.id.partition}:{id(env)}")'),
    )),
    Mutant("tasks-not-closed", "a task's old instance is closed before its next one starts", (
        ("runtime/runtime.py", "        self.app.on_rebalance_start()\n        await self.close_tasks()\n",
                               "        self.app.on_rebalance_start()\n"),
        ("runtime/runtime.py", "        self.app.consumer_generation_id = generation\n        await self.close_tasks()\n",
                               "        self.app.consumer_generation_id = generation\n"),
    )),
    Mutant("standby-left-open", "a standby lets go of its store before its task starts there", (
        ("runtime/runtime.py", "        await self.standbys.keep(wanted)\n", ""),
    )),
    Mutant("outputs-kept", "what a failed epoch sent is not sent again", (
        (AGENTS, "        self.overlays, self._outputs, self._output_bytes = overlays, {}, 0\n",
                 "        self.overlays = overlays\n"),
    )),
    Mutant("dead-letter-without-its-tries", "a record is set aside when it has failed N times, not before", (
        (AGENTS, "        hopeless = suspect is not None and suspect.offset == offset and "
                 "suspect.failures >= instance.spec.tries\n",
                 "        hopeless = suspect is not None and suspect.offset == offset\n"),
    )),
    Mutant("dedupe-not-kept", "what was seen is state like any other", (
        ("operators/dedupe.py", "        for key, value in self._state.scan(b\"\", None):\n            start, _, _ =",
                                "        for key, value in ():\n            start, _, _ ="),
    )),
    Mutant("aborted-epoch-replayed-from-its-end", "an epoch that failed is read again from its beginning", (
        (TASK, "        self.work.release()\n        self._resume()\n", "        self.work.release()\n"),
    )),
)  # fmt: skip
MUTANTS = {mutant.name: mutant for mutant in _ALL}
