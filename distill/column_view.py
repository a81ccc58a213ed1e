"""Arrow columns as numpy views of the same memory.

``pyarrow``'s own ``to_numpy`` imports pandas, which costs a trainer half a second and 40 MB.

Invariants (tests/distill/test_column_view.py):
    1. A view respects the column's offset, shares its memory, and is read-only where that is mapped.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Number = TypeVar("Number", bound=np.generic)


def view_numbers(column: pa.Array, dtype: type[Number]) -> npt.NDArray[Number]:
    """Returns an array of fixed-width numbers without nulls as ``dtype[R]``."""
    return _view(column, np.dtype(dtype).itemsize).view(dtype).reshape(len(column))


def view_bytes(column: pa.FixedSizeBinaryArray) -> npt.NDArray[np.uint8]:
    """Returns an array of fixed-size binary values without nulls as ``uint8[R, width]``."""
    width = column.type.byte_width
    return _view(column, width).reshape(len(column), width)


def _view(column: pa.Array, width: int) -> npt.NDArray[np.uint8]:
    buffer = column.buffers()[1]
    if buffer is None or not len(column):
        return np.empty(0, np.uint8)
    return np.frombuffer(buffer, np.uint8, len(column) * width, column.offset * width)
