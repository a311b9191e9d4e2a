"""The worker's side of `make profile`: where its main thread spends CPU time, looked at by the kernel's profiling timer.

A sampler that hooks calls (pyinstrument's own, cProfile) costs most where most calls are, and one that goes by the clock on
the wall counts what other processes do. This one costs nothing between two looks and stands still while we wait.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

__all__ = ["SESSION", "THREADS", "Sampler"]

SESSION: Final = ".pyisession"
"""How the file of a sampled run ends."""
THREADS: Final = ".threads.json"
"""What is put behind its name for the file that says which part of the CPU time was the main thread's."""
_INTERVAL_S: Final = 0.001
"""Of CPU time; a kernel that ticks more slowly looks less often, which the weights of the looks make up for."""


class Sampler:
    """With the methods of `cProfile.Profile` that a measured app calls, all of them on the main thread."""

    def __init__(self) -> None:
        self._looks: list[tuple[list[str], float]] = []
        self._names: dict[CodeType, str] = {}
        self._last_s = self._main_s = self._all_s = 0.0

    def enable(self) -> None:
        self._last_s = self._main_s = time.thread_time()
        self._all_s = time.process_time()
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL_S, _INTERVAL_S)

    def disable(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        self._main_s, self._all_s = time.thread_time() - self._main_s, time.process_time() - self._all_s

    def dump_stats(self, path: str) -> None:
        """Both files; the first is what pyinstrument loads and draws."""
        from pyinstrument.session import Session

        Session(
            frame_records=self._looks, start_time=0.0, duration=self._main_s, min_interval=_INTERVAL_S,
            max_interval=_INTERVAL_S, sample_count=len(self._looks), start_call_stack=[""], target_description="worker",
            cpu_time=self._all_s, sys_path=[], sys_prefixes=[],
        ).save(path)  # fmt: skip
        Path(path + THREADS).write_text(json.dumps({"main_s": self._main_s, "all_s": self._all_s}))

    def _look(self, _signal: int, frame: FrameType | None) -> None:
        now_s, stack = time.thread_time(), list[str]()
        while frame is not None:
            stack.append(self._name(frame.f_code))
            frame = frame.f_back
        stack.reverse()
        self._looks.append((stack, now_s - self._last_s))
        self._last_s = now_s

    def _name(self, code: CodeType) -> str:
        """As pyinstrument names a frame."""
        name = self._names.get(code)
        if name is None:
            name = self._names[code] = f"{code.co_qualname}\0{code.co_filename}\0{code.co_firstlineno}"
        return name
