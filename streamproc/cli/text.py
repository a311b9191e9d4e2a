"""Plain columns: nothing is cut or wrapped, whatever is behind the pipe."""

from __future__ import annotations

from collections.abc import Sequence

import click

__all__ = ["print_columns"]


def print_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned, two spaces between; numbers (with their commas) to the right."""
    lines = [titles, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(titles))]
    right = [bool(rows) and all(_number(row[at]) for row in rows) for at in range(len(titles))]
    for line in lines:
        cells = (
            cell.rjust(width) if to_the_right else cell.ljust(width)
            for cell, width, to_the_right in zip(line, widths, right, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def _number(text: str) -> bool:
    return text in ("none", "?") or text.replace(",", "").isdigit()
