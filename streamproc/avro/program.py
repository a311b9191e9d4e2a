"""A resolved schema pair as an int program for the kernel: one compiled kernel runs every schema.

A program is a table of instructions ``[op, column, a, b]`` run in the writer's order. ``column`` is where the value
goes, -1 to skip it. Unions jump into the code of a branch, arrays and maps loop between BLOCK and NEXT; nothing
recurses.

    op      a                     b
    ------  --------------------  -----------------------------------------------------
    NULL    -                     -
    BOOL    -                     -
    INT     conversion            -         conversion: 0 none, 1 to double, 2 to float
    LONG    conversion            -
    FLOAT   -                     -
    DOUBLE  -                     -
    BYTES   1: must be UTF-8      -
    FIXED   size                  -
    ENUM    symbols               first entry in ``table`` of reader symbols, -1: skipped
    UNION   branches              first entry in ``table`` of where branches begin
    JUMP    to                    -
    BLOCK   loop depth            behind the loop
    NEXT    loop depth            its BLOCK
    REFUSE  -                     -
    END     -                     -
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from streamproc.avro.faults import Fault, describe
from streamproc.avro.resolve import Branches, Entries, EnumNode, Fields, FixedNode, Items, Node, Refused, Scalar
from streamproc.avro.schema import AvroType
from streamproc.core import limits
from streamproc.core.batch import I64

__all__ = ["NotCompilable", "Op", "Program", "compile_program"]


class Op(IntEnum):
    END = 0
    NULL = 1
    BOOL = 2
    INT = 3
    LONG = 4
    FLOAT = 5
    DOUBLE = 6
    BYTES = 7
    FIXED = 8
    ENUM = 9
    UNION = 10
    JUMP = 11
    BLOCK = 12
    NEXT = 13
    REFUSE = 14


class NotCompilable(ValueError):
    """The kernel cannot take this schema pair with these columns: the plain decoder will."""


@dataclass(frozen=True)
class Program:
    ops: I64
    """int64[instructions, 4]."""
    table: I64
    paths: tuple[str, ...]
    """Per instruction the field it reads, for reasons."""
    details: dict[int, tuple[str, ...]]
    """Symbols of an ENUM, reason of a REFUSE, by instruction."""
    loops: int
    """Depth of nested arrays and maps."""

    def reason(self, fault: int, pc: int, value: int) -> str:
        """What the kernel's fault at instruction ``pc`` means."""
        kind, details = Fault(fault), self.details.get(pc, ())
        detail: object = int(self.ops[pc, 2])
        if kind is Fault.ENUM_SYMBOL:
            detail = details[value]
        elif kind is Fault.UNRESOLVED:
            detail = details[0]
        return describe(kind, "" if kind is Fault.TRAILING else self.paths[pc], value, detail)


def compile_program(tree: Fields, columns: Mapping[str, int]) -> Program:
    """``tree`` as a program that writes the reader's top-level fields named in ``columns`` to those places.

    Raises `NotCompilable` for recursive types, deep nesting, and columns that are no scalars.
    """
    writer = _Writer()
    writer.fields(tree, columns, 0)
    writer.emit(Op.END, "")
    return Program(
        np.array(writer.ops, np.int64),
        np.array(writer.table or [0], np.int64),
        tuple(writer.paths),
        writer.details,
        writer.loops,
    )


_PRIMITIVE_OPS = {
    "null": Op.NULL,
    "boolean": Op.BOOL,
    "int": Op.INT,
    "long": Op.LONG,
    "float": Op.FLOAT,
    "double": Op.DOUBLE,
    "bytes": Op.BYTES,
    "string": Op.BYTES,
}
_NO_COLUMNS: Mapping[str, int] = {}


class _Writer:
    def __init__(self) -> None:
        self.ops: list[list[int]] = []
        self.table: list[int] = []
        self.paths: list[str] = []
        self.details: dict[int, tuple[str, ...]] = {}
        self.loops = 0

    def emit(self, op: Op, path: str, column: int = -1, a: int = 0, b: int = 0) -> int:
        self.ops.append([op, column, a, b])
        self.paths.append(path)
        return len(self.ops) - 1

    def fields(self, node: Fields, columns: Mapping[str, int], depth: int, loops: int = 0) -> None:
        if node.recursive:
            raise NotCompilable("a recursive type")
        for step in node.steps:
            column = -1 if step.name is None else columns.get(step.name, -1)
            self.node(step.node, column, depth + 1, loops)

    def node(self, node: Node, column: int, depth: int, loops: int) -> None:
        if depth > limits.AVRO_DEPTH_MAX:
            raise NotCompilable("deep nesting")
        match node:
            case Scalar():
                self.scalar(node, column)
            case Branches():
                self.union(node, column, depth, loops)
            case EnumNode():
                self.enum(node, column)
            case FixedNode():
                _no_decimal(node.target)
                self.emit(Op.FIXED, node.path, column, node.size)
            case Refused():
                self.details[self.emit(Op.REFUSE, node.path)] = (node.reason,)
            case Fields() | Items() | Entries() if column >= 0:
                raise NotCompilable("a nested column")
            case Fields():
                self.fields(node, _NO_COLUMNS, depth, loops)
            case Items() | Entries():
                self.loop(node, depth, loops)

    def scalar(self, node: Scalar, column: int) -> None:
        kind = node.target.kind if node.target else node.kind
        a = 0
        if node.kind in ("int", "long"):
            a = {"double": 1, "float": 2}.get(kind, 0)
        elif "string" in (node.kind, kind):
            a = 1
        _no_decimal(node.target)
        self.emit(_PRIMITIVE_OPS[node.kind], node.path, column, a)

    def enum(self, node: EnumNode, column: int) -> None:
        first = -1
        if node.target is not None:
            first = len(self.table)
            self.table.extend(node.mapping)
        self.details[self.emit(Op.ENUM, node.path, column, len(node.symbols), first)] = node.symbols

    def union(self, node: Branches, column: int, depth: int, loops: int) -> None:
        first = len(self.table)
        self.table.extend([0] * len(node.branches))
        self.emit(Op.UNION, node.path, column, len(node.branches), first)
        jumps = []
        for i, branch in enumerate(node.branches):
            self.table[first + i] = len(self.ops)
            self.node(branch, column, depth, loops)
            jumps.append(self.emit(Op.JUMP, node.path))
        for jump in jumps:
            self.ops[jump][2] = len(self.ops)

    def loop(self, node: Items | Entries, depth: int, loops: int) -> None:
        self.loops = max(self.loops, loops + 1)
        block = self.emit(Op.BLOCK, node.path, a=loops)
        if isinstance(node, Entries):
            self.scalar(node.key, -1)
            self.node(node.values, -1, depth + 1, loops + 1)
        else:
            self.node(node.items, -1, depth + 1, loops + 1)
        self.emit(Op.NEXT, node.path, a=loops, b=block)
        self.ops[block][3] = len(self.ops)


def _no_decimal(target: AvroType | None) -> None:
    """Whether a decimal keeps to its precision is judged by the plain decoder."""
    if getattr(target, "logical", None) == "decimal":
        raise NotCompilable("a decimal")
