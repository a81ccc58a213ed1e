from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from schemas.entry_layout import CodecError
from schemas.list_column import list_type, make_list, view_list


def test_a_column_is_its_values_memory_and_comes_back() -> None:
    values = np.array([1, 2, 3, 4], np.uint16)
    column = make_list(values, np.array([0, 1, 1, 4]))
    assert column.type == list_type(np.uint16)
    assert column.to_pylist() == [[1], [], [2, 3, 4]]
    column.validate(full=True)
    found, offsets = view_list(column, np.uint16)
    assert np.shares_memory(found, values)
    assert offsets.tolist() == [0, 1, 1, 4]


def test_a_slice_starts_at_zero() -> None:
    column = make_list(np.arange(5, dtype=np.float32), np.array([0, 1, 3, 5])).slice(1, 1)
    found, offsets = view_list(column, np.float32)
    assert (found.tolist(), offsets.tolist()) == ([1.0, 2.0], [0, 2])


def test_an_empty_column_comes_back() -> None:
    found, offsets = view_list(make_list(np.empty(0, np.uint8), np.zeros(1, np.int64)), np.uint8)
    assert (found.tolist(), offsets.tolist()) == ([], [0])


def test_another_type_or_a_null_is_an_error() -> None:
    with pytest.raises(CodecError, match="expected a list of uint8"):
        view_list(pa.array([[1]], pa.list_(pa.int32())), np.uint8)
    with pytest.raises(CodecError, match="expected a list"):
        view_list(pa.array([1]), np.uint8)
    for values in ([[1], None], [[1, None]]):
        with pytest.raises(CodecError, match="null"):
            view_list(pa.array(values, pa.list_(pa.uint8())), np.uint8)


@pytest.mark.parametrize("offsets", [[0, 9], [2, 1], [-1, 2], [0, 3, 2]])
def test_offsets_that_leave_the_values_are_an_error(offsets: list[int]) -> None:
    # Arrow checks some of this when an array is made, but not when one is read.
    bounds = np.zeros(len(offsets), np.int32)
    column = pa.Array.from_buffers(
        list_type(np.uint8),
        len(offsets) - 1,
        [None, pa.py_buffer(bounds)],
        children=[pa.array([1, 2, 3], pa.uint8())],
    )
    bounds[:] = offsets
    with pytest.raises(CodecError, match="offsets"):
        view_list(column, np.uint8)
