"""Free memory goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

HOLES = """
import psutil
from streamproc.core.memory import release_free_memory

BLOCK, BLOCKS = 64 << 10, 2_000
blocks = [bytes(BLOCK) for _ in range(BLOCKS)]
kept = blocks[::50] + blocks[-1:]
del blocks
resident = psutil.Process().memory_info
before = resident().rss
release_free_memory()
print(before - resident().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators give memory back themselves")
def test_holes_between_blocks_in_use_go_back_to_the_system() -> None:
    ran = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=60)
    assert int(ran.stdout) > 60 << 20  # of 128 MB, of which a fiftieth is in use


def test_without_glibc_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamproc.core.memory._TRIM", None)
    from streamproc.core.memory import release_free_memory

    release_free_memory()
