"""Rows of one shard as Arrow record batches.

Invariants:
    1. Every batch has exactly ``shard_schema``, and rows come in ordinal order
       (tests/precompute/test_encode.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.records import FORMAT_VERSION, StoreIdentity
from schemas.rows import classification_schema
from schemas.token_generation import FORMAT_KEY, read_generation

LABELS_KEY = b"tmkd.native_labels"


def shard_schema(native_labels: Sequence[str]) -> pa.Schema:
    """Returns the layout of a teacher's shards, its label names in the metadata."""
    names = json.dumps(list(native_labels), ensure_ascii=False)
    return classification_schema(len(native_labels)).with_metadata(
        {FORMAT_KEY: FORMAT_VERSION.encode(), LABELS_KEY: names.encode()}
    )


def store_schema(identity: StoreIdentity, *, store: str) -> pa.Schema:
    """Returns the layout of a store's shards, whatever its level.

    Raises:
        DamagedStoreError: The generation of a token-level store lacks what its layout follows from.
    """
    if identity.level == "token":
        return read_generation(identity, store=store).shard_schema()
    return shard_schema(identity.native_labels)


def encode_rows(
    rows: pa.Table, logits_RC: npt.NDArray[np.float32], schema: pa.Schema, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Cuts rows and their logits into record batches.

    Args:
        rows: R rows with ``ordinal``, ``example_id`` and ``text_hash``.
        logits_RC: Raw logits in the teacher's native order, ``[R, C]``.
        schema: From ``shard_schema``.
        batch_rows: Rows of one record batch.

    Raises:
        ValueError: ``logits_RC`` has not the shape that rows and schema ask for.
    """
    num_labels = schema.field("logits").type.list_size
    if logits_RC.shape != (rows.num_rows, num_labels):
        raise ValueError(f"logits have shape {logits_RC.shape}, expected {(rows.num_rows, num_labels)}")
    flat = pa.array(np.ascontiguousarray(logits_RC, dtype=np.float32).reshape(-1))
    logits = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("logits").type)
    keys = rows.select(["ordinal", "example_id", "text_hash"]).combine_chunks()
    for start in range(0, rows.num_rows, batch_rows):
        part = keys.slice(start, batch_rows)
        # Slices are copied to arrays of their own: a writer may put whole parents into the file.
        columns = [pa.concat_arrays(part.column(i).chunks) for i in range(part.num_columns)]
        yield pa.record_batch([*columns, logits.slice(start, part.num_rows)], schema=schema)
