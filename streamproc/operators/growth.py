"""Arrays of an entry a group or a row that grow by doubling, so that their ends are reached seldom."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["grown"]

S = TypeVar("S", bound=np.generic)


def grown(array: NDArray[S], entries: int) -> NDArray[S]:
    """``array`` itself if it has room for ``entries``, else its contents in a longer one (a power of two), zeros behind."""
    if entries <= len(array):
        return array
    wider = np.zeros((1 << (entries - 1).bit_length(), *array.shape[1:]), array.dtype)
    wider[: len(array)] = array
    return wider
