"""Every `await` of the code under test as a place to die at.

The sources of `SCOPE` are compiled anew with each ``await x`` written as ``await passing(step, x)`` (likewise `async for`
and `async with`), and the new code is put into the functions that exist. So no `await` can be forgotten: a new one is a
new step, and a set of runs that never died there fails. `uninstall` puts the old code back.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import sys
import types
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamproc.core.errors import UserError

__all__ = ["SCOPE", "Instrumented", "Listener", "install", "listening", "require_mutated"]

SCOPE = ("runtime", "commit", "state", "sinks", "transport/embedded")
"""Packages of streamproc whose awaits are steps."""
OUTSIDE = {
    "sinks/redis.py": "spoken to a real server only: `make chaos`",
    "sinks/redis_writer.py": "likewise",
    "sinks/postgres.py": "likewise",
    "sinks/postgres_writer.py": "likewise",
    "sinks/postgres_pool.py": "likewise",
    "sinks/postgres_target.py": "likewise",
    "sinks/shared.py": "connections to those servers",
    "runtime/inspect.py": "questions of the web view",
    "transport/embedded/group.py": "the simulation has a coordinator of its own, which can lose members",
}
"""Files of the scope without steps, and why."""
UNREACHED = {
    "Producer.create_topic": "Faust's reply and leader topics, which are not made",
    "Consumer.create_topic": "likewise",
    "Producer.flush": "Faust's, at a stop with messages of its own waiting",
    "Producer.send": "a user's send outside of any agent",
    "Producer.send_and_wait": "likewise",
    "Topic.send": "likewise",
    "Consumer.earliest_offsets": "Faust's own tables, which are not there",
    "Consumer.highwaters": "likewise",
    "Consumer.wait_empty": "Faust's shutdown when it holds records of its own",
    "Runtime.crash": "a service's failure, which is a bug",
    "Runtime.partition_count: await self._require_topic": "a send to a topic that was not declared",
    "Runtime._require_topic: await self.transport.create_topics([replace": "an agent that names no topic",
    "Runtime._watch_membership: await self.app.crash": "a rebalance callback that fails, which is a bug",
    "Agent.on_start: await super()": "an agent over an in-memory channel",
    "Agent.on_stop: await super()": "likewise",
    "EmbeddedTransport._expire": "the broker's own",
    "read_between: await changed.wait()": "a reader that waits for an open transaction; ours read up to the stable offset",
}
"""Steps (function, or function and text) that a simulated run does not come by, and why."""
ENDLESS = {
    "Runtime._watch_membership: await membership.failed()": "a membership does not fail",
    "SinkFeed._run: await self._feed(wake)": "a feed goes on until it is cancelled",
    "AgentWork._start.run: await instance.spec.run": "an agent goes on until it is cancelled",
    "Agent._run: await result": "likewise",
}
"""Steps that a worker can die before but not behind, and why."""
Listener = Callable[[str], Awaitable[None] | None]
"""Told of each step: ``name`` before it and ``name, after`` behind it. It returns something to wait for, for ever perhaps."""
_listener: Listener | None = None


@dataclass(frozen=True)
class Instrumented:
    """What is in place, and how to take it out again."""

    steps: tuple[str, ...]
    """Where a run can die."""
    all_steps: tuple[str, ...]
    """With those of `UNREACHED`."""
    _old: Mapping[types.FunctionType, types.CodeType]

    @property
    def points(self) -> list[str]:
        """Before and behind each step."""
        endless = {step for step in self.steps if any(name in step for name in ENDLESS)}
        return [
            point
            for step in self.steps
            for point in (step, f"{step}, after")
            if point.removesuffix(", after") == point or step not in endless
        ]

    def uninstall(self) -> None:
        for function, code in self._old.items():
            function.__code__ = code


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """``listener`` is told of the steps that are come by meanwhile. They must be installed."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def install(mutations: Mapping[str, Callable[[str], str]] | None = None) -> Instrumented:
    """Put the steps in. ``mutations``: file (as ``runtime/epoch.py``) -> what to make of its source first."""
    root = Path(__file__).parents[2]
    changes = dict(mutations or {})
    steps: list[str] = []
    every: list[str] = []
    codes: dict[str, dict[tuple[str, int], types.CodeType]] = {}
    paths = sorted({path for part in SCOPE for path in (root / part).rglob("*.py")} | {root / name for name in changes})
    for path in paths:
        name = str(path.relative_to(root))
        if name in OUTSIDE and name not in changes:  # it may need a package that is not installed
            continue
        importlib.import_module("streamproc." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
        source = path.read_text()
        if name in changes:
            source = changes[name](source)
        weaver = _Weaver(name) if name.startswith(SCOPE) and name not in OUTSIDE else None
        tree = ast.parse(source)
        if weaver is not None:
            tree = ast.fix_missing_locations(weaver.visit(tree))
            steps += weaver.steps
            every += weaver.every
        elif name not in changes:
            continue
        codes[str(path)] = _functions(compile(tree, str(path), "exec"))
    old: dict[types.FunctionType, types.CodeType] = {}
    for function in [found for found in gc.get_objects() if isinstance(found, types.FunctionType)]:
        of = codes.get(function.__code__.co_filename)
        if of is not None and function.__module__ and function.__module__.startswith("streamproc."):
            _replace(function, of, old)
    for path in map(Path, codes):
        module = sys.modules[
            "streamproc." + str(path.relative_to(root)).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        ]
        module.__dict__.update(_sp_await=_await, _sp_for=_For, _sp_with=_With)
    return Instrumented(tuple(steps), tuple(every), old)


def _replace(
    function: types.FunctionType,
    codes: Mapping[tuple[str, int], types.CodeType],
    old: dict[types.FunctionType, types.CodeType],
) -> None:
    code = function.__code__
    new = codes.get((code.co_qualname, code.co_firstlineno)) or codes.get((code.co_qualname, -1))
    if new is None or new.co_freevars != code.co_freevars:
        return
    old[function] = code
    # `types.coroutine` marks a function by a flag of its code.
    function.__code__ = new.replace(co_flags=new.co_flags | code.co_flags & inspect.CO_ITERABLE_COROUTINE)


def _functions(module: types.CodeType) -> dict[tuple[str, int], types.CodeType]:
    """Code of every function by qualified name and first line, and by name alone (line -1) where that is unique."""
    found: dict[tuple[str, int], types.CodeType] = {}
    named: defaultdict[str, list[types.CodeType]] = defaultdict(list)
    todo = [module]
    while todo:
        for inner in todo.pop().co_consts:
            if isinstance(inner, types.CodeType):
                found[inner.co_qualname, inner.co_firstlineno] = inner
                named[inner.co_qualname].append(inner)
                todo.append(inner)
    found.update({(name, -1): codes[0] for name, codes in named.items() if len(codes) == 1})
    return found


class _Weaver(ast.NodeTransformer):
    def __init__(self, file: str) -> None:
        self._file, self._within = file, list[str]()
        self._seen: defaultdict[str, int] = defaultdict(int)
        self.steps: list[str] = []
        self.every: list[str] = []

    def _scope(self, node: Any) -> Any:
        self._within.append(node.name)
        self.generic_visit(node)
        self._within.pop()
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _scope

    def visit_Await(self, node: ast.Await) -> Any:
        step = self._step("await", node.value)
        self.generic_visit(node)
        node.value = self._call("_sp_await", step, node.value)
        return node

    def visit_AsyncFor(self, node: ast.AsyncFor) -> Any:
        step = self._step("async for", node.iter)
        self.generic_visit(node)
        node.iter = self._call("_sp_for", step, node.iter)
        return node

    def visit_AsyncWith(self, node: ast.AsyncWith) -> Any:
        for item in node.items:
            item.context_expr = self._call("_sp_with", self._step("async with", item.context_expr), item.context_expr)
        self.generic_visit(node)
        return node

    def _call(self, name: str, step: str, value: ast.expr) -> ast.Call:
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), [ast.Constant(step), value], []), value)

    def _step(self, kind: str, value: ast.expr) -> str:
        text = " ".join(ast.unparse(value).split())
        step = f"{self._file} {'.'.join(self._within)}: {kind} {text[:60]}"
        self._seen[step] += 1
        if self._seen[step] > 1:
            step = f"{step} #{self._seen[step]}"
        self.every.append(step)
        at = step.removeprefix(self._file).lstrip()
        if not any(at.startswith(name if ":" in name else f"{name}:") for name in UNREACHED):
            self.steps.append(step)
        return step


async def _await(step: str, what: Awaitable[Any]) -> Any:
    tell = _listener
    if tell is not None and (wait := tell(step)) is not None:
        await wait
    result = await what
    if tell is not None and (wait := tell(step + ", after")) is not None:
        await wait
    return result


class _For:
    def __init__(self, step: str, source: Any) -> None:
        self._step, self._source = step, source

    def __aiter__(self) -> AsyncIterator[Any]:
        self._at = self._source.__aiter__()
        return self

    async def __anext__(self) -> Any:
        return await _await(self._step, self._at.__anext__())


class _With:
    def __init__(self, step: str, manager: Any) -> None:
        self._step, self._manager = step, manager

    async def __aenter__(self) -> Any:
        return await _await(self._step, self._manager.__aenter__())

    async def __aexit__(self, *failure: Any) -> Any:
        return await self._manager.__aexit__(*failure)


def require_mutated(name: str, source: str, old: str, new: str) -> str:
    """``source`` with its only ``old`` made ``new``; `UserError` if the code has changed under the mutation."""
    if source.count(old) != 1:
        raise UserError(
            f"The mutation {name!r} no longer fits: its text is found {source.count(old)} times.",
            remedy="Write it anew against the code of today.",
        )
    return source.replace(old, new)
