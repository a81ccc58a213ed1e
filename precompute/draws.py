"""Random numbers of a position, from a counter: they depend on seed, example and position alone.

So a shard's bytes do not depend on batches, chunks, devices, or which actor computed it.

Invariants (tests/precompute/test_draws.py):
    1. Numbers of a position do not depend on which others are asked for with it.
    2. Keys of other seeds, examples or positions give other numbers, uniform in [0, 1).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

Keys = npt.NDArray[np.uint64]
# Source: Steele et al., OOPSLA 2014, SplitMix64: the golden gamma and the mixing function.
_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
_MANTISSA_BITS: Final = 53


def position_keys(seed: int, example_id: str, positions: npt.NDArray[np.integer]) -> Keys:
    """Returns the keys of positions of an example.

    Args:
        seed: Of the policy, in [0, 2^63).
        example_id: Of the chunk.
        positions: ``[N]``, at least 0.

    Returns:
        uint64[N].
    """
    stream = np.uint64(xxhash.xxh3_64_intdigest(example_id.encode(), seed=seed))
    return _mix(stream + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)


def draw_uniforms(keys_N: Keys, num: int) -> npt.NDArray[np.float64]:
    """Returns ``num`` uniform numbers in [0, 1) for each key, float64[N, num].

    The first n of them do not depend on ``num``.
    """
    counters = np.arange(1, num + 1, dtype=np.uint64) * _GAMMA
    bits = _mix(keys_N[:, None] + counters[None, :]) >> np.uint64(64 - _MANTISSA_BITS)
    return bits.astype(np.float64) * 2.0**-_MANTISSA_BITS


def _mix(state: Keys) -> Keys:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
