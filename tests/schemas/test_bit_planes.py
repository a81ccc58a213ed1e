from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.bit_planes import pack, plane_bytes, unpack
from schemas.entry_layout import CodecError


@given(st.integers(0, 32), st.integers(0, 70), st.integers(0, 2**32))
@settings(deadline=None)
def test_integers_of_any_width_come_back(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**width, count, np.uint64)
    planes = pack(values, width)
    assert len(planes) == plane_bytes(count, width)
    np.testing.assert_array_equal(unpack(planes, count, width), values)


def test_the_layout_is_byte_planes_then_bit_planes() -> None:
    # 10 bits: 0x2A5 = 10 1010 0101, 0x1FF = 01 1111 1111; low bytes, then bit 8 of each, then bit 9.
    assert pack(np.array([0x2A5, 0x1FF]), 10).tolist() == [0xA5, 0xFF, 0b10, 0b01]


@pytest.mark.parametrize(("size", "count", "width"), [(3, 2, 8), (2, 2, 9), (0, 1, 1), (8, 1, 33)])
def test_planes_of_another_size_are_an_error(size: int, count: int, width: int) -> None:
    with pytest.raises(CodecError, match="do not take"):
        unpack(np.zeros(size, np.uint8), count, width)
