"""Batches of similar length under a token budget.

Invariants (tests/precompute/test_batching.py):
    1. Every index occurs in exactly one batch, and the cut depends on the lengths alone.
    2. ``len(batch) * longest <= tokens_per_batch``, except for a single row that is longer than
       the budget by itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def cut_batches(lengths: npt.NDArray[np.integer], tokens_per_batch: int) -> list[npt.NDArray[np.int64]]:
    """Sorts rows by length, longest first, and cuts them into batches.

    The longest batch comes first, so that a batch that does not fit into memory fails at once.
    Rows of equal length keep their order.

    Args:
        lengths: Tokens of each row, ``[R]``.
        tokens_per_batch: Budget of one batch, padding to its longest row included.

    Returns:
        Row indices of each batch.

    Raises:
        ValueError: The budget is below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}")
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").astype(np.int64)
    batches = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        num_rows = max(1, tokens_per_batch // longest)
        batches.append(order[start : start + num_rows])
        start += num_rows
    return batches
