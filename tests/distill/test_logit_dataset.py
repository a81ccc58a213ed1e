"""A store is a torch data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from distill.logit_dataset import LogitDataset
from distill.store_reader import LogitStore
from tests.store_factory import make_part, make_store

LOGITS = np.arange(36, dtype=np.float32).reshape(12, 3)


@pytest.fixture
def dataset(tmp_path: Path) -> LogitDataset:
    part = make_part(tmp_path / "rows.arrow", [(f"{row}",) for row in range(12)], [0] * 12, shard_rows=5)
    root = make_store(tmp_path / "store", part.plan, LOGITS, excluded=[1, 6])
    return LogitDataset(LogitStore.open(root))


def test_items_are_the_stored_rows_in_order(dataset: LogitDataset) -> None:
    assert len(dataset) == 10
    assert dataset[1]["row"].item() == 2
    assert torch.equal(dataset[-1]["logits"], torch.from_numpy(LOGITS)[11])
    with pytest.raises(IndexError):
        dataset[10]


def test_a_data_loader_reads_every_row_once(dataset: LogitDataset) -> None:
    batches = list(DataLoader(dataset, batch_size=4, shuffle=True))
    rows = torch.cat([batch["row"] for batch in batches])
    assert sorted(rows.tolist()) == [0, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert torch.equal(torch.cat([batch["logits"] for batch in batches]), torch.from_numpy(LOGITS)[rows])
