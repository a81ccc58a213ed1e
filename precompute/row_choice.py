"""Which rows of its source a part uses: ``skip``, then ``limit``, then one share of the folds.

Invariants (tests/precompute/test_row_choice.py):
    1. The folds of a source hold every row once; ``rest`` is what ``held_out`` leaves.
    2. The same recipe chooses the same rows on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.corpus import Fold, PartBase, RetrievedPart

Cut = int | dict[str, Any] | None
"""What of a part's source is used, as its ``meta.json`` says it; None: all, a number: a limit alone."""


def choose_rows(num_rows: int, part: PartBase) -> npt.NDArray[np.int64]:
    """Returns the numbers of the rows that a part uses, int64, ascending.

    Args:
        num_rows: Rows of the source.
        part: Its ``skip``, ``limit`` and ``fold``.
    """
    stop = num_rows if part.limit is None else min(num_rows, part.skip + part.limit)
    rows: npt.NDArray[np.int64] = np.arange(part.skip, stop, dtype=np.int64)
    if part.fold is None:
        return rows
    held_out = _fold_mask(len(rows), part.fold)
    return rows[held_out if part.fold.take == "held_out" else ~held_out]


def describe_cut(part: PartBase) -> Cut:
    """Returns what of its source a part uses, for its description on disk."""
    if not part.skip and part.fold is None and not isinstance(part, RetrievedPart):
        return part.limit
    fold = part.fold.model_dump(mode="json") if part.fold is not None else None
    cut = {"skip": part.skip, "limit": part.limit, "fold": fold}
    if isinstance(part, RetrievedPart):
        cut |= {"top": part.top, "source": describe_cut(part.source)}
    return cut


def _fold_mask(num_rows: int, fold: Fold) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = np.zeros(num_rows, dtype=np.bool_)
    # The raw stream of a bit generator is fixed for ever; the methods of Generator are not.
    keys = np.random.Philox(fold.seed).random_raw(num_rows)
    mask[np.argsort(keys, kind="stable")[fold.index :: fold.of]] = True
    return mask
