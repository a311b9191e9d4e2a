"""Medians of the rounds, as a table for the terminal and as a chart for a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from rich import box
from rich.table import Table

from benchmarks.peers import own
from benchmarks.peers.engines import ENGINES

__all__ = ["Summary", "chart", "differs", "summaries", "table", "wrong"]

TITLES: Final = {own.NAME: own.TITLE, **{engine.name: engine.title for engine in ENGINES}}
WHAT: Final = {
    "pipeline": "dedupe, filter, windows with count and sum",
    "count": "count per user, 100,000 users, state on disk",
    "forward": "decode, filter, encode, produce",
}


@dataclass(frozen=True)
class Summary:
    """All rounds of one job on one engine."""

    job: str
    engine: str
    lines: Sequence[dict[str, Any]]

    @property
    def title(self) -> str:
        versions = self.lines[-1]["versions"]
        title = TITLES[self.engine]
        return f"{title} {versions[title]}" if title in versions else title

    def median(self, field: str) -> float | None:
        """Of the rounds that have the field, and that were right if any was: a wrong run may have done half of the work."""
        right = [line for line in self.lines if line["correct"]]
        found = [line[field] for line in right or self.lines if line.get(field) is not None]
        return statistics.median(found) if found else None

    @property
    def speed(self) -> float:
        """Records per worker CPU-second."""
        return self.median("records_per_worker_cpu_s") or 0.0

    @property
    def best(self) -> float:
        """That, or after the warm-up if that is better: what a peer is compared by."""
        return max(self.speed, self.median("records_per_worker_cpu_s_warm") or 0.0)

    @property
    def correct(self) -> bool:
        return all(line["correct"] for line in self.lines)

    @property
    def verdict(self) -> str:
        """For the table: how many rounds were right."""
        right = sum(line["correct"] for line in self.lines)
        return "yes" if self.correct else f"{right} of {len(self.lines)}" if right else "NO"


def summaries(lines: Iterable[dict[str, Any]]) -> list[Summary]:
    """By job and engine, in the order in which they came."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["job"], line["engine"]), []).append(line)
    return [Summary(job, engine, runs) for (job, engine), runs in found.items()]


def table(found: Sequence[Summary]) -> Table:
    """A row for each engine of each job; ``ours`` says how many times as fast we are, whole run and after warm-up."""
    result = Table(
        "job", "engine", "records", "records/CPU-s", "least–most", "warm", "wall s", "RSS MB", "correct", "ours",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for column in result.columns[2:]:
        column.justify = "right"
    for summary in found:
        speeds = [line["records_per_worker_cpu_s"] for line in summary.lines]
        result.add_row(
            summary.job, summary.title, f"{summary.lines[-1]['records']:,}", f"{summary.speed:,.0f}",
            f"{min(speeds):,}–{max(speeds):,}", _number(summary.median("records_per_worker_cpu_s_warm")),
            f"{summary.median('wall_s'):,.1f}", f"{summary.median('rss_mb'):,.0f}", summary.verdict,
            _times(summary, found),
        )  # fmt: skip
    return result


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _times(summary: Summary, found: Sequence[Summary]) -> str:
    ours = [one.speed for one in found if one.job == summary.job and one.engine == own.NAME and one.verdict != "NO"]
    if not ours or summary.engine == own.NAME or summary.verdict == "NO":
        return ""
    whole, warm = ours[0] / summary.speed, ours[0] / summary.best
    return f"{whole:,.1f}×" if summary.best == summary.speed else f"{whole:,.1f}× ({warm:,.1f}× warm)"


def differs(found: Sequence[Summary]) -> list[str]:
    """What each engine does differently, once."""
    told = {f"{TITLES[one.engine]}: {one.lines[-1]['differs']}" for one in found if one.lines[-1]["differs"]}
    return sorted(told)


def wrong(found: Sequence[Summary]) -> list[str]:
    """What was not as the oracle has it, round by round."""
    return [
        f"WRONG: {one.job} on {one.title}, round {line.get('round', 1)}: {'; '.join(line['wrong'])}"
        for one in found
        for line in one.lines
        if not line["correct"]
    ]


WIDTH: Final = 900
LABEL: Final = 210
BAR: Final = 20
ROW: Final = 27
HEAD: Final = 44
LEFT_MARGIN: Final = 16
BARS_WIDTH: Final = WIDTH - LABEL - 250
STYLE: Final = """
  text { font: 13px system-ui, sans-serif; fill: #24292f } .title { font-size: 15px; font-weight: 600 }
  .dim { fill: #57606a } .ours { fill: #0969da } .peer { fill: #8c959f } .warm { stroke: #24292f; stroke-width: 2 }
  .back { fill: #ffffff }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .dim { fill: #8d96a0 } .warm { stroke: #e6edf3 } .back { fill: #0d1117 } }
"""


def chart(found: Sequence[Summary]) -> str:
    """An SVG: a bar for each engine and job, on a logarithmic scale; a line where a run after its warm-up got to."""
    scale = _scale(found)
    parts: list[str] = []
    y = HEAD
    for job in dict.fromkeys(one.job for one in found):
        parts.append(_text(LEFT_MARGIN, y, f"{job}: {WHAT.get(job, '')}", "title"))
        y += 14
        for one in (one for one in found if one.job == job):
            parts.append(_bar(one, y, scale, _times(one, found)))
            y += ROW
        y += HEAD - 8
    last = found[-1].lines[-1]
    parts.append(
        _text(LEFT_MARGIN, y - 8, f"{last['date'][:10]}, {last['machine']}; median of {_rounds(found)}", "dim")
    )
    head = "Records per worker CPU-second, exactly-once, logarithmic; a line marks what follows the warm-up"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 8}" role="img" aria-label="{head}">'
        f"<style>{STYLE}</style>"
        f'<rect class="back" width="{WIDTH}" height="{y + 8}"/>\n'
        + _text(LEFT_MARGIN, 20, head, "dim")
        + "\n".join(parts)
        + "</svg>\n"
    )


def _rounds(found: Sequence[Summary]) -> str:
    many = max(len(one.lines) for one in found)
    return f"{many} round{'s' if many > 1 else ''}"


def _scale(found: Sequence[Summary]) -> tuple[float, float]:
    """Powers of ten that hold every bar."""
    speeds = [value for one in found for value in (one.speed, one.best) if value]
    lowest, highest = math.floor(math.log10(min(speeds))), math.ceil(math.log10(max(speeds)))
    return lowest - 0.5, max(highest, lowest + 1)


def _at(speed: float, scale: tuple[float, float]) -> float:
    low, high = scale
    return BARS_WIDTH * max(0.0, (math.log10(max(speed, 1.0)) - low) / (high - low))


def _bar(one: Summary, y: int, scale: tuple[float, float], times: str) -> str:
    width = _at(one.speed, scale)
    kind = "ours" if one.engine == own.NAME else "peer"
    middle = y + BAR - 5
    parts = [
        _text(LEFT_MARGIN, middle, one.title),
        f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{width:.0f}" height="{BAR}" rx="2"/>',
    ]
    if one.best > one.speed:
        x = LABEL + _at(one.best, scale)
        parts.append(f'<line class="warm" x1="{x:.0f}" x2="{x:.0f}" y1="{y}" y2="{y + BAR}"/>')
    label = (
        f"{one.speed:,.0f}"
        + (f"   ours {times}" if times else "")
        + ("" if one.correct else f"   NOT CORRECT ({one.verdict})")
    )
    parts.append(_text(LABEL + _at(one.best, scale) + 8, middle, label))
    return "\n".join(parts)


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{named}>{escape(text)}</text>\n'
