from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.byte_frame import MAX_FRAME_BYTES, compress, expand
from schemas.entry_layout import CodecError


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_bytes_come_back(data: bytes) -> None:
    values = np.frombuffer(data, np.uint8)
    assert expand(compress(values), len(values)).tobytes() == data


@pytest.mark.parametrize("size", [0, 1, 99, 101, MAX_FRAME_BYTES + 1, -1])
def test_a_frame_of_another_size_is_an_error(size: int) -> None:
    with pytest.raises(CodecError):
        expand(compress(np.zeros(100, np.uint8)), size)


def test_a_frame_that_claims_more_than_is_expected_allocates_only_that() -> None:
    bomb = compress(np.zeros(50_000_000, np.uint8))
    assert len(bomb) < 10_000
    before = pa.total_allocated_bytes()
    with pytest.raises(CodecError, match="damaged"):
        expand(bomb, 64)
    assert pa.total_allocated_bytes() - before < 1_000_000


@given(st.binary(min_size=1, max_size=60), st.integers(1, 1000))
@settings(deadline=None)
def test_what_is_no_frame_is_an_error(data: bytes, size: int) -> None:
    try:
        found = expand(np.frombuffer(data, np.uint8), size)
    except CodecError:
        return
    assert len(found) == size
