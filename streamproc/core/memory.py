"""Memory of the process that is free and that its allocator keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

__all__ = ["release_free_memory"]


def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return None


_TRIM = _malloc_trim()


def release_free_memory() -> None:
    """Hand free pages inside the heaps of glibc back to the system; nothing where there is no glibc.

    RocksDB and NumPy allocate by blocks of some kilobytes to a megabyte, from many threads. glibc returns only what is free
    at the end of a heap, so that the resident size of a worker grew to the sum of the peaks of its arenas
    (https://man7.org/linux/man-pages/man3/malloc_trim.3.html).
    """
    if _TRIM is not None:
        _TRIM(0)
