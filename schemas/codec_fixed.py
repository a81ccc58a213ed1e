"""Codec ``fixed``: ids of fixed width, float16 values, no compression; what is stored is what is used.

Columns: those of ``schemas.entry_columns`` and, except for dense, ``ids`` (uint16 up to 65536 tokens of
vocabulary, else uint32).

Invariants (tests/schemas/test_codec.py):
    1. Decoding shares the memory of ids and log-probabilities (hybrid: of ids).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.entry_columns import (
    Columns,
    check_bounds,
    decode_plain,
    encode_plain,
    entry_field,
    plain_fields,
)
from schemas.entry_layout import CodecError, EntryLayout
from schemas.kept_entries import Integers, KeptEntries, Offsets
from schemas.list_column import list_type, make_list, view_list


def fields(layout: EntryLayout) -> list[pa.Field]:
    """Returns the codec's columns."""
    if layout.is_dense:
        return plain_fields(layout)
    ids = entry_field(
        "ids", list_type(layout.id_dtype), "kept token ids, position after position", "token id"
    )
    return [*plain_fields(layout), ids]


def encode(entries: KeptEntries, rows: Offsets, layout: EntryLayout) -> dict[str, pa.Array]:
    """Encodes the entries of B rows; see ``schemas.codec.Codec``."""
    columns = encode_plain(entries, rows, layout)
    if not layout.is_dense:
        columns["ids"] = make_list(entries.ids.astype(layout.id_dtype), entries.offsets[rows])
    return columns


def decode(
    columns: Columns, rows: Offsets, layout: EntryLayout, log_tail: npt.NDArray[np.float32]
) -> KeptEntries:
    """Decodes the entries of B rows; see ``schemas.codec.Codec``."""
    entries = decode_plain(columns, rows, layout, log_tail)
    if layout.is_dense:
        return KeptEntries(entries.offsets, dense_ids(layout, int(rows[-1])), entries.log_probs)
    ids, bounds = view_list(columns["ids"], layout.id_dtype)
    check_bounds("ids", bounds, entries.offsets[rows])
    check_ids(ids, layout)
    return KeptEntries(entries.offsets, ids, entries.log_probs, entries.num_head, entries.tau, entries.draws)


def dense_ids(layout: EntryLayout, num_positions: int) -> Integers:
    """Returns all ids for each position."""
    return np.tile(np.arange(layout.vocab, dtype=layout.id_dtype), num_positions)


def check_ids(ids: Integers, layout: EntryLayout) -> None:
    """Checks that ids lie in the vocabulary.

    Raises:
        CodecError: One does not.
    """
    if len(ids) and int(ids.max()) >= layout.vocab:
        raise CodecError(f"kept id {ids.max()} is out of range; the vocabulary has {layout.vocab} tokens")
