"""What a user's Polars expression may be, and how it is evaluated: row by row, whole numbers exact, NaN never 'sane'.

A batch ends where a fetch happened to end, so an expression whose value for one record depends on another record would
break the law that results are a function of the records. Three things hold that off:

1. an allow-list over the serialised expression: what is not known to be row-wise is refused by name;
2. a trial on sample rows (nulls, extremes, NaN): f(a ++ b) must be f(a) ++ f(b);
3. guards, built from the same tree, that mark the records whose value cannot be trusted (see `RowExpr`).
"""

from __future__ import annotations

import difflib
import io
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import Any, Final, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
from numpy.typing import NDArray

from streamproc.core.errors import UserError

__all__ = ["DATA_ERRORS", "Mask", "RowExpr", "Value", "check", "evaluate", "guarded", "require_columns", "select"]

Tree: TypeAlias = Any
"""A node of the serialised expression: a string, or a dict of one entry, its kind and body."""
Mask: TypeAlias = NDArray[np.bool_]

DATA_ERRORS: Final = (
    pl.exceptions.ComputeError,
    pl.exceptions.InvalidOperationError,
    pl.exceptions.OutOfBoundsError,
    pl.exceptions.PanicException,
)
"""What Polars raises when a *value* (not the plan) is wrong: a strict cast, a time out of range (even a panic)."""

_NOT_ROW_WISE: Final = "One record's value would depend on other records of its batch."
_UNKNOWN: Final = "is used, and is not known to look at one record only."


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FUNCTIONS: Final = _words(
    """Abs AsStruct Atan2 Ceil Clip Coalesce Exp Erf Erfc FillNull Floor Log Log1p MaxHorizontal MeanHorizontal
    MinHorizontal Negate Replace ReplaceStrict Round RoundSF Sign SumHorizontal Truncate"""
)
_GROUPS: Final[dict[str, frozenset[str]]] = {
    "Bitwise": _words("CountOnes CountZeros LeadingOnes LeadingZeros TrailingOnes TrailingZeros"),
    "Boolean": _words(
        """AllHorizontal AnyHorizontal IsBetween IsClose IsFinite IsIn IsInfinite IsNan IsNotNan IsNotNull IsNull
        Not"""
    ),
    "BinaryExpr": _words("Contains EndsWith Get Head Size Slice StartsWith Tail"),
    "ListExpr": _words("Concat Contains CountMatches Get Join Length Max Mean Min Sum"),
    "Pow": _words("Cbrt Generic Sqrt"),
    "StringExpr": _words(
        """ConcatHorizontal Contains ContainsAny CountMatches EndsWith EscapeRegex Extract Find Format Head HexEncode
        JsonPathMatch LenBytes LenChars Lowercase Normalize PadEnd PadStart Replace ReplaceMany Reverse Slice Split
        StartsWith StripChars StripCharsEnd StripCharsStart StripPrefix StripSuffix Strptime Tail Titlecase ToInteger
        Uppercase ZFill"""
    ),
    "StructExpr": _words("FieldByName"),
    "TemporalExpr": _words(
        """BaseUtcOffset Century Combine ConvertTimeZone DSTOffset Date Day DaysInMonth Hour IsLeapYear IsoYear
        Microsecond Millennium Millisecond Minute Month MonthEnd MonthStart Nanosecond OffsetBy OrdinalDay Quarter
        Replace ReplaceTimeZone Round Second Time TimeStamp ToString TotalDays TotalHours TotalMicroseconds
        TotalMilliseconds TotalMinutes TotalNanoseconds TotalSeconds Truncate Week WeekDay Year"""
    ),
    "Trigonometry": _words(
        "ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh Cos Cosh Cot Degrees Radians Sin Sinh Tan Tanh"
    ),
}
_CASTS: Final = _words(
    """Boolean Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Float32 Float64 String Binary Date Time Datetime
    Duration"""
)
_EXACT: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "Plus": operator.add,
    "Minus": operator.sub,
    "Multiply": operator.mul,
    "FloorDivide": operator.floordiv,
    "TruncDivide": lambda left, right: left.truncdiv(right),
}
"""Arithmetic that wraps in 64 bits and is exact for two 64-bit operands in 128."""
_INT_BOUNDS: Final = {
    **{f"Int{bits}": (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in (8, 16, 32, 64, 128)},
    **{f"UInt{bits}": (0, (1 << bits) - 1) for bits in (8, 16, 32, 64, 128)},
}
_TICK_NS: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000}
_PARTS_NS: Final = {"TotalNanoseconds": 1, "TotalMicroseconds": 1_000, "TotalMilliseconds": 1_000_000}
"""Parts of a duration that may be finer than its unit."""


@dataclass(frozen=True)
class RowExpr:
    """A checked expression with its guards (None: cannot happen). Guards are boolean, never null, and row-wise as well.

    ``overflow`` is true where a whole number inside the expression left its type: each ``+ - * // **``, negation,
    ``abs``, sum or mean across columns, ``list.sum`` and count of a duration's parts on integers, booleans, times and
    durations, literals included, is done again in 128 bits (powers in floating point, which tells a wrapped value from a
    right one by its size). ``nan`` is true where a
    floating-point value inside it is NaN. In both, the branch of a `when` that is not taken does not count. Not
    covered: what the user asked to wrap (``cast(..., wrap_numerical=True)``), and changes of a time's unit, which give
    null.
    """

    expr: pl.Expr
    columns: frozenset[str]
    dtype: pl.DataType
    overflow: pl.Expr | None
    nan: pl.Expr | None


def check(
    expr: pl.Expr,
    columns: Mapping[str, pl.DataType],
    *,
    what: str,
    where: str | None,
    trial: bool = True,
    total: bool = False,
) -> RowExpr:
    """Judge ``expr`` over a stream of ``columns``. ``what`` names the step in messages (``filter``, ``column "x"``).

    With ``total`` it may not fail on any sample row either (there is nowhere to put the record it fails on). ``trial``
    False skips the sample rows, for an expression that was judged before. Raises `UserError` with place and remedy.
    """
    if not isinstance(expr, pl.Expr):
        raise UserError(
            f"{what} is {expr!r}, not an expression.", remedy='Write for example pl.col("x") > 0.', where=where
        )
    tree = _tree(expr, what, where)
    names = frozenset(_names(tree, what, where))
    require_columns(names, columns, what=what, where=where)
    try:
        nothing = pl.DataFrame(schema={**columns})
        dtype = nothing.select(expr).dtypes[0]
        wide = sorted({str(t) for t in _types(tree, nothing) if t in (pl.Int128, pl.UInt128)})
        overflow, nan = _taint(tree, nothing, _own_overflow), _taint(tree, nothing, _own_nan)
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{what} does not fit its columns: {str(error).splitlines()[0]}.",
            remedy=f"Mend the expression; it reads {_typed(names, columns)}.",
            where=where,
        ) from error
    _require_supported(tree, nothing, what, where)
    if wide:
        raise UserError(f"{what} needs {wide[0]}.", remedy="Cast the unsigned operand to pl.Int64 first.", where=where)
    checked = RowExpr(expr, names, dtype, overflow, nan)
    if trial:
        _try_on_samples(checked, columns, what, where, total)
    return checked


def require_columns(names: Iterable[str], columns: Iterable[str], *, what: str, where: str | None) -> None:
    """Raise `UserError` with the nearest names if one of ``names`` is not among ``columns``."""
    there = [name for name in columns if not name.startswith("__")]
    for name in sorted(names):
        if name not in there:
            near = difflib.get_close_matches(name, there, n=3, cutoff=0.6)
            hint = (
                f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There are {', '.join(there) or 'none'}."
            )
            raise UserError(f"{what}: there is no column {name!r}.", remedy=hint, where=where)


class Value(NamedTuple):
    """A checked expression over one batch. Masks are None when they would be all false."""

    value: pl.Series
    """As long as the batch; null where ``failed``."""
    failed: Mask | None
    """Rows whose value makes Polars raise."""
    overflow: Mask | None
    nan: Mask | None


def evaluate(frame: pl.DataFrame, expressions: Sequence[RowExpr]) -> list[Value]:
    """The expressions over ``frame`` (which has at least one column), in one pass unless a value makes Polars raise.

    Then each is evaluated for itself and, since it is row-wise, the batch is halved until the rows at fault stand
    alone: about 2 · log2(rows) evaluations for each of them.
    """
    wanted = [(expression.expr, expression.dtype) for expression in expressions]
    for expression in expressions:
        wanted += [(guard, pl.Boolean()) for guard in (expression.overflow, expression.nan) if guard is not None]
    try:
        columns = select(frame, [expr for expr, _ in wanted])
        failures: list[Mask | None] = [None] * len(columns)
    except DATA_ERRORS:
        halved = [_halve(frame, expr, dtype) for expr, dtype in wanted]
        columns = [value for value, _ in halved]
        failures = [mask if mask.any() else None for _, mask in halved]
    guards = zip(columns[len(expressions) :], failures[len(expressions) :], strict=True)
    found: list[Value] = []
    for at, expression in enumerate(expressions):
        failed, marks = failures[at], list[Mask | None]()
        for guard in (expression.overflow, expression.nan):
            mark, unknown = (None, None) if guard is None else next(guards)
            marks.append(None if mark is None else _true(mark))
            # What cannot be vouched for has no value.
            failed = unknown if failed is None else failed if unknown is None else failed | unknown
        found.append(Value(columns[at], failed, *marks))
    return found


def select(frame: pl.DataFrame, exprs: Sequence[pl.Expr]) -> list[pl.Series]:
    """Row-wise expressions over ``frame`` (which has at least one column), each as long as it.

    Polars takes a column of one row for a constant, and raises to a constant power by another way that rounds
    otherwise; so a row that is alone is computed beside its double.
    """
    alone = frame.height == 1
    if alone:  # by way of a second row, or the double would be a constant too
        frame = pl.concat([frame, frame.clear(1)], rechunk=True)[[0, 0]]
    # The first column beside them makes a literal as long as the batch.
    named = [expr.alias(f"__{at}") for at, expr in enumerate(exprs)]
    columns = frame.select(pl.first().alias("__rows"), *named).get_columns()[1:]
    return [column[:1] for column in columns] if alone else columns


def _halve(frame: pl.DataFrame, expr: pl.Expr, dtype: pl.DataType) -> tuple[pl.Series, Mask]:
    try:
        return select(frame, [expr])[0], np.zeros(frame.height, np.bool_)
    except DATA_ERRORS:
        if frame.height < 2:
            return pl.Series([None] * frame.height, dtype=dtype), np.ones(frame.height, np.bool_)
    half = frame.height // 2
    left, right = _halve(frame[:half], expr, dtype), _halve(frame[half:], expr, dtype)
    return pl.concat([left[0], right[0]]), np.concatenate([left[1], right[1]])


def _true(guard: pl.Series) -> Mask | None:
    mask: Mask = guard.fill_null(False).to_numpy()
    return mask if mask.any() else None


def guarded(checked: RowExpr) -> pl.Expr:
    """The expression with null in place of an overflowed value: for results, where there is no record to put aside."""
    return checked.expr if checked.overflow is None else pl.when(~checked.overflow).then(checked.expr)


# --- the allow-list ---------------------------------------------------------------------------------------------------


def _tree(expr: pl.Expr, what: str, where: str | None) -> Tree:
    try:
        return json.loads(expr.meta.serialize(format="json"))
    except (pl.exceptions.ComputeError, TypeError, ModuleNotFoundError) as error:
        # A Python function in the expression is the one thing that does not serialise.
        raise UserError(
            f"{what} calls a Python function: it would run once a record, and nothing says that it is deterministic.",
            remedy="Write it with Polars's own functions, or as an agent.",
            where=where,
        ) from error


def _names(node: Tree, what: str, where: str | None) -> Iterable[str]:
    """Columns that the expression reads. Refuses whatever is not known to be row-wise."""
    if reason := _fault(node):
        fault, remedy = reason
        raise UserError(f"{what} is not row-wise: {fault}", remedy=remedy, where=where)
    kind, body = _open(node)
    if kind == "Column":
        yield body
    for child in _children(node):
        yield from _names(child, what, where)


def _fault(node: Tree) -> tuple[str, str] | None:
    """Why this node (not its children) is refused, and the remedy; None if it is row-wise."""
    kind, body = _open(node)
    if kind in ("Column", "BinaryExpr", "Ternary", "Alias"):
        return None
    if kind == "Literal":
        return _literal_fault(body)
    if kind == "Cast":
        name, _ = _open(body["dtype"].get("Literal", "?") if isinstance(body["dtype"], dict) else "?")
        return None if name in _CASTS else (f"a cast to {name}.", "Cast to a number, text, boolean, date or time.")
    if kind == "Function":
        return _function_fault(body["function"])
    if kind == "Selector":
        return "it names several columns at once.", 'Name each column: pl.col("x").'
    if kind == "RenameAlias":
        return "it renames its result.", "Give the new name in with_columns(name=...)."
    if kind == "AnonymousFunction":
        return "it calls a Python function.", "Write it with Polars's own functions, or as an agent."
    name = _open(body)[0] if kind == "Agg" else kind
    return f"{_snake(name)} {_UNKNOWN}", _instead(_snake(name))


def _literal_fault(body: Tree) -> tuple[str, str] | None:
    form, value = _open(body)
    if form == "Series":
        return "a Series is among its values.", "Give a plain list or a single value."
    if form not in ("Dyn", "Scalar"):
        return f"a literal of the kind {form} is used.", "Give a single value."
    kind, number = _open(value)
    if kind == "Float" or kind.startswith("Float"):
        remedy = "Use is_nan(), is_finite(), or a one-sided comparison."
        return ("NaN or infinity is among its values.", remedy) if number is None else None
    if kind in ("Int", "Int128", "UInt128", "UInt64") and not -(1 << 63) <= int(number) < 1 << 63:
        return f"{number} does not fit 64 bits.", "Use a smaller number or a float."
    return None


def _function_fault(function: Tree) -> tuple[str, str] | None:
    name, args = _open(function)
    if name in _FUNCTIONS:
        return None
    if name in _GROUPS:
        inner, options = _open(args)
        if inner == "Strptime" and options[1]["format"] is None:
            return "a time format is guessed from the first value.", 'Give it: str.to_datetime("%Y-%m-%d %H:%M:%S").'
        if inner in _GROUPS[name]:
            return None
        name = inner
    elif name == "Random":
        method, _ = _open(args["method"])
        return f"{_snake(method)} is random.", "Leave it out: a replay must give the same result."
    elif name == "RollingExpr":
        name = f"Rolling{args['function'] if isinstance(args['function'], str) else _open(args['function'])[0]}"
    return f"{_snake(name)} {_UNKNOWN}", _instead(_snake(name))


def _instead(name: str) -> str:
    if name in ("sum", "min", "max", "mean", "count", "n_unique", "len"):
        return "Aggregate with group_by(...).window(...).agg(...)."
    return "Use functions of the record alone, or do it in an agent."


# --- the guards -------------------------------------------------------------------------------------------------------

_SIDES: Final = ("left", "right")
_Own: TypeAlias = Callable[[Tree, pl.DataFrame], pl.Expr | None]


def _taint(node: Tree, nothing: pl.DataFrame, own: _Own) -> pl.Expr | None:
    """True where ``own`` holds for this node or for one whose value reaches it."""
    kind, body = _open(node)
    if own is _own_nan and _asks_for_nan(kind, body):
        return None
    parts = [_taint(child, nothing, own) for child in _children(node)]
    if kind == "Ternary" and (parts[1] is not None or parts[2] is not None):
        no = pl.lit(False)
        then, other = (no if part is None else part for part in parts[1:])
        parts = [parts[0], pl.when(_expr(body["predicate"])).then(then).otherwise(other)]
    elif kind == "BinaryExpr" and body["op"] in ("And", "Or"):
        # false & x is false and true | x is true, whatever x is: a wrong x does no harm there.
        decides = body["op"] == "Or"
        free = [_expr(body[side]).ne_missing(decides) for side in ("right", "left")]
        both = None if parts[0] is None or parts[1] is None else parts[0] & parts[1]
        parts = [None if part is None else part & other for part, other in zip(parts, free, strict=True)] + [both]
    found = [part for part in (*parts, own(node, nothing)) if part is not None]
    return pl.any_horizontal(found) if found else None


def _asks_for_nan(kind: str, body: Tree) -> bool:
    """``is_nan``, ``is_not_nan``, and the test inside ``fill_nan``: the user knows of NaN and says what it means."""
    if kind == "Function":
        return body["function"] in ({"Boolean": "IsNan"}, {"Boolean": "IsNotNan"})
    if kind != "BinaryExpr" or body["op"] != "Or" or not all(_open(body[side])[0] == "Function" for side in _SIDES):
        return False
    left, right = (body[side]["Function"] for side in _SIDES)
    tests = (left["function"], right["function"])
    return tests == ({"Boolean": "IsNotNan"}, {"Boolean": "IsNull"}) and left["input"] == right["input"]


def _own_nan(node: Tree, nothing: pl.DataFrame) -> pl.Expr | None:
    if _open(node)[0] in ("Literal", "Ternary", "Alias"):
        return None  # a literal is never NaN; the others only hand on a value
    expr = _expr(node)
    return expr.is_nan().fill_null(False) if nothing.select(expr).dtypes[0].is_float() else None


def _own_overflow(node: Tree, nothing: pl.DataFrame) -> pl.Expr | None:
    """True where this one operation wrapped, its operands being right."""
    kind, body = _open(node)
    exact: Callable[..., Any]
    if kind == "BinaryExpr" and body["op"] in _EXACT:
        operands, exact = [body["left"], body["right"]], _EXACT[body["op"]]
    elif kind != "Function":
        return None
    elif body["function"] in ("Negate", "Abs"):
        operands, exact = body["input"], _minus if body["function"] == "Negate" else operator.abs
    elif _open(body["function"])[0] == "SumHorizontal":
        operands, exact = body["input"], lambda *terms: pl.sum_horizontal(terms)
    else:
        return _function_overflow(node, body["function"], body["input"], nothing)
    exprs = [_expr(operand) for operand in operands]
    dtypes = [nothing.select(expr).dtypes[0] for expr in (*exprs, _expr(node))]
    if any(map(_never_wraps, dtypes)) or dtypes[-1] == pl.Boolean:
        return None
    times = dtypes[-1].is_temporal()
    # Units meet in nanoseconds when times are added; a duration that is multiplied keeps its own.
    scaled = times and kind == "BinaryExpr" and body["op"] in ("Plus", "Minus")
    *wide, result = (_wide(expr, dtype, scaled) for expr, dtype in zip((*exprs, _expr(node)), dtypes, strict=True))
    off = (exact(*wide) - result).abs()
    return (off >= _tick_ns(dtypes[-1]) if scaled else off > 0).fill_null(False)


def _never_wraps(dtype: pl.DataType) -> bool:
    """Decimals raise when they overflow; the others have no bound, or are no numbers."""
    return dtype.is_float() or dtype.is_decimal() or dtype in (pl.Null, pl.String, pl.Binary)


def _function_overflow(node: Tree, function: Tree, operands: Sequence[Tree], nothing: pl.DataFrame) -> pl.Expr | None:
    """True where a function other than plain arithmetic wrapped."""
    group, name = _open(function)
    if function == {"Pow": "Generic"}:
        return _power_overflow(node, operands, nothing)
    exprs = [_expr(operand) for operand in operands]
    dtypes = [nothing.select(expr).dtypes[0] for expr in exprs]
    if function == {"ListExpr": "Sum"}:
        inner = dtypes[0].inner if isinstance(dtypes[0], pl.List) else None
        if not isinstance(inner, pl.DataType) or not inner.is_integer():
            return None
        wide = exprs[0].cast(pl.List(pl.Int128)).list.sum()
        return (wide != _expr(node).cast(pl.Int128)).fill_null(False)
    if group == "MeanHorizontal" and all(dtype.is_integer() for dtype in dtypes):
        wide = pl.sum_horizontal(expr.cast(pl.Int128) for expr in exprs)
        return (wide != pl.sum_horizontal(exprs).cast(pl.Int128)).fill_null(False)
    part, options = _open(name)
    if group == "TemporalExpr" and part in _PARTS_NS and not options["fractional"]:
        finer = _tick_ns(dtypes[0]) // _PARTS_NS[part]
        wide = exprs[0].cast(pl.Int64).cast(pl.Int128) * finer
        return (wide != _expr(node).cast(pl.Int128)).fill_null(False) if finer > 1 else None
    return None


def _minus(number: pl.Expr) -> pl.Expr:
    return 0 - number  # Polars has no negation in 128 bits


def _require_supported(node: Tree, nothing: pl.DataFrame, what: str, where: str | None) -> None:
    """Refuse what its types make wrong: arithmetic on lists and structs (whole numbers in them wrap, and no guard looks
    there), and a cast from text to a time (Polars accepts it in a plan and fails on every value)."""
    kind, body = _open(node)
    if kind == "BinaryExpr" and body["op"] in (*_EXACT, "TrueDivide", "Modulus"):
        dtype = nothing.select(_expr(node)).dtypes[0]
        if dtype.is_nested():
            remedy = "Take the parts out first: list.get(...), struct.field(...)."
            raise UserError(f"{what} does arithmetic on {dtype}.", remedy=remedy, where=where)
    if kind == "Cast" and nothing.select(_expr(body["expr"])).dtypes[0] == pl.String:
        dtype = nothing.select(_expr(node)).dtypes[0]
        if dtype.is_temporal():
            remedy = 'Give the format: str.to_datetime("%Y-%m-%d %H:%M:%S"), str.to_date(...), str.to_time(...).'
            raise UserError(f"{what} casts text to {dtype}.", remedy=remedy, where=where)
    for child in _children(node):
        _require_supported(child, nothing, what, where)


def _power_overflow(node: Tree, operands: Sequence[Tree], nothing: pl.DataFrame) -> pl.Expr | None:
    expr = _expr(node)
    if not nothing.select(expr).dtypes[0].is_integer():
        return None
    base, exponent = (_expr(operand).cast(pl.Float64) for operand in operands)
    near = base**exponent
    # A wrapped value is off by a multiple of its whole range, so by more than half of what it should be.
    off: pl.Expr = (near - expr.cast(pl.Float64)).abs() > near.abs() * 0.25
    return (near.is_infinite() | off).fill_null(False)


def _wide(expr: pl.Expr, dtype: pl.DataType, scaled: bool) -> pl.Expr:
    number = (expr.cast(pl.Int64) if dtype.is_temporal() else expr).cast(pl.Int128)
    return number * _tick_ns(dtype) if scaled else number


def _tick_ns(dtype: pl.DataType) -> int:
    """Length of one unit of a time's physical value; 1 for a plain number."""
    if isinstance(dtype, pl.Datetime | pl.Duration):
        return _TICK_NS[dtype.time_unit or "us"]
    return 86_400_000_000_000 if dtype == pl.Date else 1


def _types(node: Tree, nothing: pl.DataFrame) -> Iterable[pl.DataType]:
    yield nothing.select(_expr(node)).dtypes[0]
    for child in _children(node):
        yield from _types(child, nothing)


# --- the trial --------------------------------------------------------------------------------------------------------


def _try_on_samples(
    checked: RowExpr, columns: Mapping[str, pl.DataType], what: str, where: str | None, total: bool
) -> None:
    frame = _samples({name: columns[name] for name in sorted(checked.columns)})
    alone = [_halve(frame[row : row + 1], checked.expr, checked.dtype) for row in range(frame.height)]
    failed = np.concatenate([mask for _, mask in alone])
    if failed.all():
        raise UserError(
            f"{what} raises for every record.", remedy=f"Polars says: {_complaint(frame, checked)}", where=where
        )
    if total and failed.any():
        row = frame.drop("__row").row(int(failed.argmax()), named=True)
        raise UserError(
            f"{what} raises for {row}.",
            remedy="Make it give null instead: cast(..., strict=False), or a when(...) that keeps such rows out.",
            where=where,
        )
    good = frame.filter(pl.Series(~failed))
    whole, broke = _halve(good, checked.expr, checked.dtype)
    one_by_one = pl.concat([value for value, mask in alone if not mask[0]])
    if broke.any() or whole.dtype != one_by_one.dtype or not whole.equals(one_by_one, null_equal=True):
        raise UserError(f"{what} is not row-wise. {_NOT_ROW_WISE}", remedy=_instead(""), where=where)


def _complaint(frame: pl.DataFrame, checked: RowExpr) -> str:
    try:
        select(frame, [checked.expr])
    except DATA_ERRORS as error:
        return str(error).splitlines()[0]
    return "nothing"


def _samples(columns: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Some thirty rows in which values meet in changing company: columns step through their values at unlike paces."""
    rows = np.arange(31)  # a prime, so that every pace below it visits every value
    series = [pl.Series("__row", rows, dtype=pl.UInt32)]
    for at, (name, dtype) in enumerate(columns.items()):
        values = _sample_values(dtype)
        series.append(
            pl.Series(name, [values[int(i)] for i in (rows * (2 * at + 1) + rows // 7) % len(values)], dtype=dtype)
        )
    return pl.DataFrame(series)


def _sample_values(dtype: pl.DataType) -> list[Any]:
    if dtype.is_integer():
        low, high = _INT_BOUNDS[str(dtype)]
        return [0, 1, None, 2, 7, 60, 100, low, high, high // 2 + 1, *([-1, -7] if low < 0 else [])]
    if dtype.is_float():
        return [0.0, 1.5, None, -1.0, float("nan"), float("inf"), float("-inf"), -0.0, 1e300, 1e-300, 7.0]
    if isinstance(dtype, pl.Datetime):
        zone = None if dtype.time_zone is None else ZoneInfo(dtype.time_zone)
        years = (1970, 2013, 2024, 1900, 9999)
        return [None, *(datetime(year, 2, 28, 23, 59, 59, tzinfo=zone) for year in years)]
    samples: dict[Any, list[Any]] = {
        pl.Boolean: [True, False, None],
        pl.String: ["", "a", None, "B", "12", "-3", "1.5", "2024-02-29", "2024-02-29 12:00:00", "ñandú", "x" * 40],
        pl.Binary: [b"", b"a", None, b"\x00\xff"],
        pl.Date: [date(1970, 1, 1), None, date(2024, 2, 29), date(1900, 1, 1), date(9999, 12, 31)],
        pl.Time: [time(0), None, time(23, 59, 59)],
        pl.Duration: [timedelta(0), None, timedelta(days=-1), timedelta(hours=3)],
    }
    return samples.get(dtype.base_type(), [None])


# --- the tree ---------------------------------------------------------------------------------------------------------


def _open(node: Tree) -> tuple[str, Any]:
    """Kind and body of a node."""
    if isinstance(node, str):
        return node, None
    if isinstance(node, dict) and len(node) == 1:
        return next(iter(node.items()))
    return "?", node


def _children(node: Tree) -> list[Tree]:
    kind, body = _open(node)
    match kind:
        case "BinaryExpr":
            return [body["left"], body["right"]]
        case "Function":
            return list(body["input"])
        case "Ternary":
            return [body["predicate"], body["truthy"], body["falsy"]]
        case "Cast":
            return [body["expr"]]
        case "Alias":
            return [body[0]]
    return []


def _expr(node: Tree) -> pl.Expr:
    return pl.Expr.deserialize(io.StringIO(json.dumps(node)), format="json")


def _snake(name: str) -> str:
    return "".join(
        f"_{c.lower()}" if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name)
    )


def _typed(names: Iterable[str], columns: Mapping[str, pl.DataType]) -> str:
    return ", ".join(f"{name} ({columns[name]})" for name in sorted(names)) or "no column"
