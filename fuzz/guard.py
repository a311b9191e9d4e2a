"""Buffers that lie against a page which nobody may touch: a read outside kills the process, so no such read is missed."""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

import numpy as np

from streamproc.core.batch import U8

__all__ = ["guarded"]

_PAGE: Final = mmap.PAGESIZE
_PROT_NONE: Final = 0
_libc: Final = ctypes.CDLL(None, use_errno=True)


def guarded(data: bytes | bytearray | U8, *, at_end: bool) -> U8:
    """A writable copy of ``data`` that ends, or with ``at_end`` false begins, at a page that cannot be read.

    The memory lives as long as the array.
    """
    size = len(data)
    pages = max(-(-size // _PAGE), 1)
    memory = np.frombuffer(mmap.mmap(-1, (pages + 2) * _PAGE), np.uint8)
    for page in (0, pages + 1):
        _forbid(memory.ctypes.data + page * _PAGE)
    start = (pages + 1) * _PAGE - size if at_end else _PAGE
    place = memory[start : start + size]
    place[:] = np.frombuffer(data, np.uint8)
    return place


def _forbid(address: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), _PROT_NONE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, "mprotect failed")
