"""Log-probabilities in one byte: the sixth root of p, rounded to 1/255.

``code = max(1, round(255 p^(1/6)))``. Steps are fine where p is large and coarse, relative to p, where it is
small, so that they spend bits on what a loss that is linear in p sees.

Error bounds, |.| of what is decoded against p:
    - ``p^(1/6)`` by at most 1/510, so p by at most about ``p^(5/6) / 85``;
    - ``log p`` by at most about ``1 / (85 p^(1/6))``: 0.012 at p = 1, 0.037 at 1e-3, 0.12 at 1e-6;
    - p below 3.6e-15 decodes to 3.6e-15.

A row's codes are stored relative to the lowest of their position, which most of them are close to.

Invariants (tests/schemas/test_value_code.py):
    1. The bounds hold for all p in (0, 1].
    2. Any byte decodes to a finite value at or below 0.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from schemas.bit_planes import Bytes
from schemas.kept_entries import Offsets

ROOT: Final = 6
LEVELS: Final = 255
# log p of each code; code 0 is never written.
TABLE: Final = (ROOT * np.log(np.maximum(np.arange(256), 1) / LEVELS)).astype(np.float32)
TABLE.flags.writeable = False


def quantise(log_probs: npt.NDArray[np.floating]) -> Bytes:
    """Returns the codes, uint8[S] in 1 to 255, of log-probabilities[S] at or below 0."""
    roots = np.exp(log_probs.astype(np.float64) / ROOT)
    return np.clip(np.rint(LEVELS * roots), 1, LEVELS).astype(np.uint8)


def dequantise(codes: Bytes) -> npt.NDArray[np.float32]:
    """Returns the log-probabilities, float32[S], of codes."""
    return TABLE.take(codes)


def split_base(codes: Bytes, offsets: Offsets) -> tuple[Bytes, Bytes]:
    """Splits codes into the lowest of each position and what each is above it.

    Args:
        codes: uint8[S].
        offsets: int64[P + 1].

    Returns:
        uint8[P] (0 for a position without entries) and uint8[S].
    """
    counts = np.diff(offsets)
    bases = np.zeros(len(counts), np.uint8)
    filled = counts > 0
    if filled.any():
        bases[filled] = np.minimum.reduceat(codes, offsets[:-1][filled])
    return bases, codes - np.repeat(bases, counts)
