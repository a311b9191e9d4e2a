"""`streamproc worker`: `faust -A … worker` with our messages."""

from __future__ import annotations

from collections.abc import Sequence

import click

from streamproc.cli.apps import APP, load_app

__all__ = ["worker"]


@click.command(context_settings={"ignore_unknown_options": False})
@APP
@click.option("--web-port", type=click.IntRange(1, 65_535), help="Port of the web view (6066).")
@click.option("--without-web", is_flag=True, help="No web view.")
@click.option("--datadir", type=click.Path(file_okay=False), help="Folder of the local state.")
@click.option("--loglevel", "-l", default="info", show_default=True)
@click.argument("faust_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- FAUST OPTIONS]")
def worker(
    application: str, web_port: int | None, without_web: bool, datadir: str | None, loglevel: str,
    faust_options: Sequence[str],
) -> None:  # fmt: skip
    """Run a worker of an application until SIGTERM or Ctrl-C; start as many as there are partitions.

    What follows `--` goes to Faust's own worker command.
    """
    load_app(application, datadir=datadir)  # what is wrong with it is said before Faust looks at it
    from faust.cli.faust import cli

    arguments = ["-A", application, *(("--datadir", datadir) if datadir else ()), "worker", "-l", loglevel]
    arguments += [*(("--web-port", str(web_port)) if web_port else ()), *(("--without-web",) if without_web else ())]
    cli.main(args=[*arguments, *faust_options], prog_name="faust")
