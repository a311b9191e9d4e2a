"""What a machine lacks is skipped with one loud line at the end; under ``CI=true`` it is an error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def _kafka() -> str | None:
    if os.environ.get("KAFKA_BOOTSTRAP"):
        return None
    missing = [tool for tool in ("java", "mvn") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found" if missing else None


def _browser() -> str | None:
    return None if any(shutil.which(name) for name in CHROMIUM) else "Chromium not found"


SLOW_FILES = {
    "test_attack_runtime.py",
    "test_bad_input.py",
    "test_cli.py",
    "test_demo.py",
    "test_docs.py",
    "test_faust_keeps_working.py",
    "test_flights_data.py",
    "test_law.py",
    "test_oracle.py",
    "test_totals.py",
    "test_web_api.py",
    "test_web_security.py",
    "test_web_workers.py",
}
"""Whole apps, worker processes or the full year of flights: not part of test-fast."""
NEEDS: dict[str, Callable[[], str | None]] = {"kafka": _kafka, "browser": _browser}
_lacking: dict[str, tuple[str, int]] = {}


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    for marker, reason in ((marker, find()) for marker, find in NEEDS.items()):
        if reason is None:
            continue
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked:
            _lacking[marker] = (reason, len(marked))
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_deselected(items: Iterable[pytest.Item]) -> None:
    """Tests that were not asked for are not missed."""
    for marker in list(_lacking):
        reason, count = _lacking[marker]
        gone = sum(1 for item in items if item.get_closest_marker(marker))
        if count - gone > 0:
            _lacking[marker] = (reason, count - gone)
        else:
            del _lacking[marker]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, (reason, count) in _lacking.items():
        terminalreporter.write_line(f"NOT RUN: {count} {marker} tests, because {reason}.", red=True, bold=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _lacking and os.environ.get("CI") == "true":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
