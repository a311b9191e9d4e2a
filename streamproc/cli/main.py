"""The command group, and its promise: an error of streamproc is printed as its message, and the exit code is 1."""

from __future__ import annotations

from typing import Any

import click

from streamproc.cli.lag import lag
from streamproc.cli.reset import reset
from streamproc.cli.topics import topics
from streamproc.cli.worker import worker
from streamproc.core.errors import InvariantBroken, StreamprocError

__all__ = ["main"]


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InvariantBroken:
            raise  # a bug of ours: the traceback belongs into the report
        except StreamprocError as error:
            click.secho(f"streamproc: {error}", err=True, fg="red")
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="streamproc")
def main() -> None:
    """Stateful stream processing on Kafka: run applications and look after them."""


for _command in (worker, topics, lag, reset):
    main.add_command(_command)
