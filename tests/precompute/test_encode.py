"""Rows as record batches."""

from __future__ import annotations

import numpy as np
import pytest

from precompute.encode import LABELS_KEY, encode_rows, shard_schema
from schemas.rows import classification_schema
from tests.precompute.tiny import make_rows


def test_rows_are_cut_in_order_into_batches_of_the_stores_layout() -> None:
    rows = make_rows(7)
    schema = shard_schema(["yes", "no", "où"])
    logits_RC = np.arange(21, dtype=np.float32).reshape(7, 3)
    batches = list(encode_rows(rows, logits_RC, schema, 3))
    assert [batch.num_rows for batch in batches] == [3, 3, 1]
    assert schema.equals(classification_schema(3))
    assert all(batch.schema.equals(schema, check_metadata=True) for batch in batches)
    assert schema.metadata[LABELS_KEY] == '["yes", "no", "où"]'.encode()
    assert [row for batch in batches for row in batch["ordinal"].to_pylist()] == list(range(7))
    assert [row for batch in batches for row in batch["logits"].to_pylist()] == logits_RC.tolist()


def test_logits_of_another_layout_in_memory_are_encoded_the_same() -> None:
    rows, schema = make_rows(4), shard_schema(["a", "b"])
    logits_RC = np.arange(8, dtype=np.float32).reshape(4, 2)
    fortran = list(encode_rows(rows, np.asfortranarray(logits_RC), schema, 4))
    assert fortran[0].equals(next(encode_rows(rows, logits_RC, schema, 4)))


@pytest.mark.parametrize("shape", [(3, 2), (4, 3)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="logits have shape"):
        list(encode_rows(make_rows(4), np.zeros(shape, np.float32), shard_schema(["a", "b"]), 4))
