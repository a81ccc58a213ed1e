"""Arrow columns as numpy views of the same memory, and the other way round.

``pyarrow``'s own ``to_numpy`` and ``pa.array`` import pandas, which costs a trainer half a second and 40 MB.

Invariants (tests/schemas/test_column_view.py):
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


def wrap_integers(values: npt.NDArray[np.int64]) -> pa.Int64Array:
    """Returns contiguous integers as an Arrow array that shares their memory."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])


def _view(column: pa.Array, width: int) -> npt.NDArray[np.uint8]:
    buffer = column.buffers()[1]
    if buffer is None or not len(column):
        return np.empty(0, np.uint8)
    return np.frombuffer(buffer, np.uint8, len(column) * width, column.offset * width)
