"""Arrow list columns of numbers, one list per row, as flat numpy arrays with row offsets.

Shapes: B rows, M values of all of them.

Invariants (tests/schemas/test_list_column.py):
    1. ``view_list`` shares the column's memory and respects slices.
    2. Offsets that leave their array, or decrease, are a ``CodecError``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.column_view import view_numbers
from schemas.entry_layout import CodecError
from schemas.kept_entries import Offsets

_MAX_LIST_VALUES = 2**31 - 1


def list_type(dtype: npt.DTypeLike) -> pa.ListType:
    """Returns ``list<dtype>`` without nulls."""
    return pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False))


def make_list(values: npt.NDArray[np.generic], offsets: Offsets) -> pa.ListArray:
    """Returns a list column that shares the memory of its values.

    Args:
        values: Numbers of all rows, ``[M]``.
        offsets: int64[B + 1], from 0 to M.

    Raises:
        CodecError: There are 2^31 values or more; take fewer rows to a record batch.
    """
    if len(values) > _MAX_LIST_VALUES:
        raise CodecError(
            f"a record batch holds at most {_MAX_LIST_VALUES} values a column, not {len(values)}; "
            "take fewer rows to a batch"
        )
    contiguous = np.ascontiguousarray(values)
    flat = pa.Array.from_buffers(
        pa.from_numpy_dtype(contiguous.dtype), len(contiguous), [None, pa.py_buffer(contiguous)]
    )
    bounds = pa.py_buffer(np.ascontiguousarray(offsets, dtype=np.int32))
    return pa.Array.from_buffers(
        list_type(contiguous.dtype), len(offsets) - 1, [None, bounds], children=[flat]
    )


def view_list(column: pa.ListArray, dtype: npt.DTypeLike) -> tuple[npt.NDArray[Any], Offsets]:
    """Returns values and row offsets of a list column without copying the values.

    Args:
        column: Its type must be ``list_type(dtype)``; no nulls.
        dtype: Of the values.

    Returns:
        Values ``[M]``, and int64[B + 1] offsets from 0 to M.

    Raises:
        CodecError: Another type, nulls, or offsets that are none.
    """
    if not pa.types.is_list(column.type) or column.type.value_type != pa.from_numpy_dtype(dtype):
        raise CodecError(f"a column is {column.type}, expected a list of {np.dtype(dtype)}")
    if column.null_count or column.values.null_count:
        raise CodecError("a list column has null values")
    if not len(column):
        return np.empty(0, dtype), np.zeros(1, np.int64)
    bounds = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, 4 * column.offset)
    offsets = bounds.astype(np.int64)
    if offsets[0] < 0 or offsets[-1] > len(column.values) or (offsets[1:] < offsets[:-1]).any():
        raise CodecError("offsets of a list column decrease or leave its values")
    values = column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    return view_numbers(values, np.dtype(dtype).type), offsets - offsets[0]
