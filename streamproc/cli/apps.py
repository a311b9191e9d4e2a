"""From what is written on the command line to an app, its log, and the groups that it declares."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import click
from mode.utils.imports import import_from_cwd

from streamproc.app import App
from streamproc.core.errors import UserError
from streamproc.runtime.topology import Group
from streamproc.transport.contract import Transport

__all__ = ["APP", "declared_groups", "load_app", "opened"]

APP = click.argument("application", metavar="MODULE[:APP]")
"""As after `faust -A`: a module on the path or in this folder; ``app`` in it, unless another name is given."""


def load_app(name: str, *, datadir: str | None = None) -> App:
    """Import the app with all that it declares. `UserError` if there is none; what the module itself raises goes on."""
    if datadir is not None:
        os.environ["APP_DATADIR"] = datadir  # Faust reads it when the app is made
    found = _found(name)
    if not isinstance(found, App):
        raise UserError(
            f"{name} holds no streamproc.App{f', but a {type(found).__name__}' if found is not None else ''}.",
            remedy="Name the variable it is in: MODULE:VARIABLE.",
        )
    found.finalize()
    conf: Any = found.conf  # a setting whose value may be a callable: its type reads as a method's
    if conf.autodiscover:
        found.discover()
    return found


def _found(name: str) -> Any:
    module, _, variable = name.partition(":")
    try:
        found = import_from_cwd(module)
    except ModuleNotFoundError as error:
        # A module that the user's own code lacks is another matter.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"There is no module {module}.",
            remedy="Give it as Python imports it, from the folder it is in: agents.orders.",
        ) from None
    return getattr(found, variable or "app", None)


@asynccontextmanager
async def opened(app: App) -> AsyncIterator[Transport]:
    """The app's log, without running the app. An embedded log cannot be opened beside its worker: `UserError`."""
    transport = app.make_transport()
    await transport.start()
    try:
        yield transport
    finally:
        await transport.stop()


async def declared_groups(app: App, transport: Transport, counts: Mapping[str, int] | None = None) -> list[Group]:
    """What the app's tasks are, for topics as they are; ``counts`` speaks for those that do not exist yet."""
    known: dict[str, int] = {}
    for spec in app.declared_topics():
        count = await transport.partitions(spec.name) or spec.partitions or (counts or {}).get(spec.name)
        if count:
            known[spec.name] = count
    return app.build_groups(known)
