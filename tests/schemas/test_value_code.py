from __future__ import annotations

import numpy as np
import pytest

from schemas.value_code import TABLE, dequantise, quantise, split_base


def test_the_stated_bounds_hold_from_one_down_to_the_lowest_value() -> None:
    log_probs = np.linspace(0, -33, 100_001)
    found = dequantise(quantise(log_probs)).astype(np.float64)
    roots = np.exp(log_probs / 6)
    assert np.abs(np.exp(found / 6) - roots).max() <= 1 / 510 + 1e-6
    large = log_probs > np.log(1e-6)
    errors = np.abs(np.exp(found) - np.exp(log_probs))[large]
    assert (errors <= 1.06 * roots[large] ** 5 / 85 + 1e-9).all()
    assert (np.abs(found - log_probs) <= 1.06 / (85 * roots))[large].all()
    assert np.abs(found - log_probs)[log_probs > np.log(1e-3)].max() < 0.04


@pytest.mark.parametrize(
    ("log_prob", "code"), [(0.0, 255), (6 * np.log(0.5), 128), (-200.0, 1), (-np.inf, 1)]
)
def test_codes_by_hand(log_prob: float, code: int) -> None:
    assert quantise(np.array([log_prob])).tolist() == [code]


def test_any_byte_is_a_finite_log_probability() -> None:
    found = dequantise(np.arange(256, dtype=np.uint8))
    assert np.isfinite(found).all()
    assert found.max() == 0
    assert not TABLE.flags.writeable


def test_codes_are_stored_above_the_lowest_of_their_position() -> None:
    codes = np.array([9, 7, 200, 3], np.uint8)
    bases, above = split_base(codes, np.array([0, 0, 3, 4, 4]))
    assert bases.tolist() == [0, 7, 3, 0]
    assert above.tolist() == [2, 0, 193, 0]
