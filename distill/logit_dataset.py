"""A logit store as a torch ``Dataset``, for users' own loops.

Invariants:
    1. Items are the store's rows in order, without the excluded ones (tests/distill/test_logit_dataset.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from distill.store_reader import LogitStore


class LogitItem(TypedDict):
    """One row: ``row``, int64 scalar, of the corpus part; ``logits``, float32[C], native label order."""

    row: torch.Tensor
    logits: torch.Tensor


class LogitDataset(Dataset[LogitItem]):
    """The rows of a store that have logits.

    A ``DataLoader`` fetches whole batches through ``__getitems__``: one gather, no Python per row but
    the final split into items.

    Args:
        store: An opened store.
    """

    def __init__(self, store: LogitStore) -> None:
        self.store = store
        self._rows = store.stored_rows()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> LogitItem:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[LogitItem]:
        rows = self._rows[np.asarray(indices, np.int64)]
        logits_BC = torch.from_numpy(self.store.gather(rows))
        numbers = torch.from_numpy(rows)
        return [LogitItem(row=row, logits=logits) for row, logits in zip(numbers, logits_BC, strict=True)]
