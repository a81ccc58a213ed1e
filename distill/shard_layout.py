"""What a shard's rows are beyond their keys: the part that differs between levels of stores.

Shapes: R rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.column_view import view_bytes, view_numbers
from schemas.rows import classification_schema


@dataclass(frozen=True, slots=True)
class KeyColumns:
    """The keys of one record batch, as views of the map (read-only).

    Attributes:
        rows: int64[R], row numbers of the part, ascending.
        example_ids: string[R].
        text_hashes: uint8[R, 16].
    """

    rows: npt.NDArray[np.int64]
    example_ids: pa.StringArray
    text_hashes: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BatchColumns(KeyColumns):
    """One record batch of logits.

    Attributes:
        logits_RC: float32[R, C], native label order.
    """

    logits_RC: npt.NDArray[np.float32]


Columns = TypeVar("Columns", bound=KeyColumns)


@dataclass(frozen=True, slots=True)
class ShardLayout(Generic[Columns]):
    """How the rows of a shard lie in Arrow, and what makes them sensible.

    Attributes:
        schema: Of the file; its metadata is not compared.
        split: From a record batch that has this schema to views of its columns.
        find_problem: Says what is wrong with the values of a batch, or None; asked where hashes are
            checked too. None: values are checked where they are decoded.
        find_foreign: Says what is wrong with the metadata of the file's schema, or None.
    """

    schema: pa.Schema
    split: Callable[[pa.RecordBatch], Columns]
    find_problem: Callable[[Columns], str | None] | None = None
    find_foreign: Callable[[Mapping[bytes, bytes]], str | None] | None = None


def view_keys(batch: pa.RecordBatch) -> KeyColumns:
    """Returns views of the keys of a record batch."""
    return KeyColumns(
        rows=view_numbers(batch.column("ordinal"), np.int64),
        example_ids=batch.column("example_id"),
        text_hashes=view_bytes(batch.column("text_hash")),
    )


def logit_layout(num_labels: int) -> ShardLayout[BatchColumns]:
    """Returns the layout of classification shards with C labels."""
    return ShardLayout(classification_schema(num_labels), _split_logits, _find_unreal_logit)


def _split_logits(batch: pa.RecordBatch) -> BatchColumns:
    logits = batch.column("logits")
    values = view_numbers(logits.flatten(), np.float32).reshape(-1, logits.type.list_size)
    keys = view_keys(batch)
    return BatchColumns(keys.rows, keys.example_ids, keys.text_hashes, values)


def _find_unreal_logit(columns: BatchColumns) -> str | None:
    return None if np.isfinite(columns.logits_RC).all() else "has a logit that is not finite"
