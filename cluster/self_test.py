"""What self-tests of all stores share: the sample, the tolerance, and what is told of the outcome.

Invariants (tests/cluster/test_store_self_test.py):
    1. The sample depends on the seed and the store's rows alone, and covers the store evenly.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from schemas.errors import DataError
from schemas.fields import Dtype, Frozen

Rows = npt.NDArray[np.int64]

# Relative to the largest logit. On one machine, batches of other rows gave the same bits (tiny BERTs and
# MiniLM, all three dtypes); other kernels and devices add up in another order. In float32 each rounding is
# 6e-8, so that this allows for a thousand of them; in half precision one is 5e-4 (float16) or 4e-3
# (bfloat16), and ten are allowed. Neighbouring rows differed by 4 % at least, by a third as a rule.
TOLERANCES: dict[Dtype, float] = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}


class SelfTest(Frozen):
    """What a self-test found.

    Attributes:
        device: Where the teacher ran.
        largest_difference: Between a stored logit and the same one computed again.
        worst_row: Example id of the row that has it.
        tolerance: What a difference may be: absolute, from the relative tolerance and the largest logit.
        num_differing: Sampled rows beyond the tolerance.
        num_shifted_forward: Of those, rows whose logits are stored with the row after.
        num_shifted_back: Rows whose logits are stored with the row before.
    """

    store: str
    teacher: str
    device: str
    dtype: str
    num_rows: int
    largest_difference: float
    worst_row: str
    tolerance: float
    num_differing: int
    num_shifted_forward: int
    num_shifted_back: int
    _unit: ClassVar[str] = "row"

    def raise_if_failed(self) -> None:
        """Says what is wrong.

        Raises:
            DataError: A row is beyond the tolerance.
        """
        if not self.num_differing:
            return
        shifts = (("after", self.num_shifted_forward), ("before", self.num_shifted_back))
        told = [
            f"{count} of them are stored with the {self._unit} {where}" for where, count in shifts if count
        ]
        shift = f"; {' and '.join(told)}: the store is shifted" if told else ""
        raise DataError(
            f"store {self.store}: {self.num_differing} of {self.num_rows} rows are not what teacher "
            f"{self.teacher} gives; the largest difference is {self.largest_difference:.3g} (tolerance "
            f"{self.tolerance:.3g}), at {self.worst_row}{shift}; delete the store and make it again"
        )


def sample_positions(num_stored: int, num_rows: int, seed: int) -> Rows:
    """Draws one position of each of ``num_rows`` equal stretches of a store.

    Returns:
        Ascending, distinct positions among the stored rows, int64 ``[K]``, K = min(num_rows, num_stored).
    """
    num_rows = min(num_rows, num_stored)
    bounds = np.arange(num_rows + 1, dtype=np.int64) * num_stored // num_rows
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:])
