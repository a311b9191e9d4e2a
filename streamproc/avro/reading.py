"""The records of a batch, sorted by writer schema, each group read the way its schema pair asks for.

A way is found once per writer schema: a program for the compiled kernel, the resolved tree for the plain decoder where
the kernel cannot take it, or the reason why no record of that schema can be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from streamproc.avro import kernel
from streamproc.avro.columns import ColumnType, Mask
from streamproc.avro.faults import Malformed
from streamproc.avro.program import NotCompilable, Program, compile_program
from streamproc.avro.registry import Registry, UnknownSchema
from streamproc.avro.resolve import Fields, Unresolvable, resolve
from streamproc.avro.schema import Schema
from streamproc.avro.strict import Shape, decode_record, items_allowed, shaped
from streamproc.avro.wire import HEADER_BYTES
from streamproc.core import limits
from streamproc.core.batch import BUFFER_SLACK, I64, U8, RawBatch
from streamproc.core.errors import invariant

__all__ = ["BadRecord", "Group", "RawColumn", "Reading"]


class BadRecord(NamedTuple):
    """A record that becomes a dead letter: its index in the batch, why, and its schema id if it had one."""

    row: int
    reason: str
    schema_id: int | None


class RawColumn(NamedTuple):
    """One column as `kernel.run` writes it."""

    raw: I64
    valid: Mask


@dataclass
class Group:
    """The good records of one writer schema in a batch; what they hold is in one of three places."""

    schema_id: int
    rows: I64
    buffer: U8
    columns: dict[str, RawColumn] = field(default_factory=dict)
    """From the kernel."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Beside ``columns``: storage values of columns that the writer does not have."""
    values: dict[str, list[Any]] | None = None
    """From the plain decoder: storage values of every column."""
    records: list[Any] | None = None
    """From the plain decoder of a `Reading` with a shape of its own: whole records."""


@dataclass(frozen=True)
class _Compiled:
    program: Program
    columns: tuple[str, ...]
    defaults: dict[str, Any]


class Reading:
    """Reads the batches of one topic into groups.

    ``types`` are the columns wanted, None for whole records by the plain decoder alone. With a ``shape`` the plain
    decoder makes whole records in that shape, without it storage values of the columns.
    """

    def __init__(
        self, reader: Schema, registry: Registry, types: Mapping[str, ColumnType] | None, shape: Shape | None = None
    ) -> None:
        self._reader, self._registry = reader, registry
        self._compile, self._types = types is not None, types or {}
        self._shape, self._whole = shape or Shape(), shape is not None
        self._ways: dict[int, _Compiled | Fields | str] = {}

    def read(self, batch: RawBatch) -> tuple[list[Group], list[BadRecord]]:
        """Groups in no order, rows ascending within each; the bad records ascending."""
        buffer = _with_slack(batch)
        ids = np.empty(len(batch), np.int64)
        whole = kernel.split(buffer, *_spans(batch), ids)
        invariant(whole, f"A record of {batch.tp} lies outside of its buffer.")
        groups: list[Group] = []
        bad: list[BadRecord] = []
        for schema_id in _distinct(ids):
            rows = np.flatnonzero(ids == schema_id)
            if schema_id <= kernel.NO_VALUE:
                bad.extend(BadRecord(row, _unframed(batch, row, schema_id), None) for row in rows.tolist())
                continue
            way = self._way(schema_id)
            begins, ends = _payloads(batch, rows)
            if isinstance(way, str):
                bad.extend(BadRecord(row, way, schema_id) for row in rows.tolist())
            elif isinstance(way, _Compiled):
                groups.append(_run(way, schema_id, rows, buffer, begins, ends, bad))
            else:
                groups.append(self._run_plain(way, schema_id, rows, buffer, begins, ends, bad))
        bad.sort()
        return groups, bad

    def _way(self, schema_id: int) -> _Compiled | Fields | str:
        way = self._ways.get(schema_id)
        if way is None:
            way = self._find_way(schema_id)
            # Unknown ids come from the bytes: a hostile topic must not fill the memory with them.
            if len(self._ways) < limits.AVRO_SCHEMAS_MAX:
                self._ways[schema_id] = way
        return way

    def _find_way(self, schema_id: int) -> _Compiled | Fields | str:
        """How to read records of one writer schema: program, tree for the plain decoder, or the reason for not."""
        try:
            tree = resolve(self._registry.schema_by_id(schema_id), self._reader)
        except UnknownSchema as error:
            return str(error)
        except Unresolvable as error:
            return f"schema {schema_id} does not resolve to the reader's: {error}"
        columns = tuple(name for name in self._types if name not in tree.defaults)
        if not self._compile or any(self._types[name].kind == "other" for name in columns):
            return tree
        try:
            program = compile_program(tree, {name: i for i, name in enumerate(columns)})
        except NotCompilable:
            return tree
        return _Compiled(program, columns, self._defaults(tree))

    def _defaults(self, tree: Fields) -> dict[str, Any]:
        fields = {f.name: f for f in self._reader.root.fields}
        return {
            name: shaped(Shape(), fields[name].type, value, name)
            for name, value in tree.defaults.items()
            if name in self._types
        }

    def _run_plain(
        self, tree: Fields, schema_id: int, rows: I64, buffer: U8, begins: I64, ends: I64, bad: list[BadRecord]
    ) -> Group:
        good: list[int] = []
        records: list[Any] = []
        for row, begin, end in zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True):
            try:
                records.append(decode_record(tree, buffer[begin:end].tobytes(), self._shape))
            except Malformed as error:
                bad.append(BadRecord(row, str(error), schema_id))
            else:
                good.append(row)
        group = Group(schema_id, np.array(good, np.int64), buffer)
        if self._whole:
            group.records = records
        else:
            group.values = {name: [record[name] for record in records] for name in self._types}
        return group


def _run(way: _Compiled, schema_id: int, rows: I64, buffer: U8, begins: I64, ends: I64, bad: list[BadRecord]) -> Group:
    program, n = way.program, len(rows)
    out = np.empty((len(way.columns), n), np.int64)
    valid = np.empty((len(way.columns), n), np.bool_)
    kept, faults = np.empty(n, np.int64), np.empty((n, 3), np.int64)
    good = kernel.run(
        program.ops, program.table, program.loops, buffer, begins, ends, items_allowed(0), out, valid, kept, faults
    )
    if good < n:
        for i in np.flatnonzero(faults[:, 0]).tolist():
            fault, pc, value = faults[i].tolist()
            bad.append(BadRecord(int(rows[i]), program.reason(fault, pc, value), schema_id))
        rows = rows[kept[:good]]
    columns = {name: RawColumn(out[i, :good], valid[i, :good]) for i, name in enumerate(way.columns)}
    return Group(schema_id, rows, buffer, columns, way.defaults)


def _distinct(ids: I64) -> list[int]:
    """The schema ids of a batch; nearly always one, which is quick to see."""
    if len(ids) and (ids == ids[0]).all():
        return [int(ids[0])]
    found: list[int] = np.unique(ids).tolist()
    return found


def _spans(batch: RawBatch) -> tuple[I64, I64]:
    return np.ascontiguousarray(batch.value_start), np.ascontiguousarray(batch.value_len)


def _payloads(batch: RawBatch, rows: I64) -> tuple[I64, I64]:
    """Where the Avro bytes of the rows begin and end."""
    starts, lengths = _spans(batch)
    if len(rows) < len(batch):
        starts, lengths = starts[rows], lengths[rows]
    return starts + HEADER_BYTES, starts + lengths


def _unframed(batch: RawBatch, row: int, code: int) -> str:
    if code == kernel.WRONG_MAGIC:
        return f"wrong magic byte {batch.buffer[batch.value_start[row]]}"
    if code == kernel.SHORT:
        return f"truncated header of {batch.value_len[row]} bytes"
    return "null value" if code == kernel.NO_VALUE else "no value"


def _with_slack(batch: RawBatch) -> U8:
    """The batch's buffer with `BUFFER_SLACK` behind its last record, whoever made it; addressable by 31 bits."""
    ends = batch.value_start + np.maximum(batch.value_len, 0)
    buffer = np.require(batch.buffer, requirements=["C", "W"])  # One kind of array, or numba compiles for another.
    if len(ends) and int(ends.max()) + BUFFER_SLACK > len(buffer):
        buffer = np.concatenate([buffer, np.zeros(BUFFER_SLACK, np.uint8)])
    invariant(len(buffer) < 1 << 31, f"A batch of {batch.tp} is larger than 2 GiB.")
    return buffer
