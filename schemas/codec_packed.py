"""Codec ``packed``: ids of ``ceil(log2 V)`` bits, float16 values, no compression.

Columns: those of ``schemas.entry_columns`` and, except for dense, ``ids``: the row's ids as
``schemas.bit_planes``.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.bit_planes import pack, unpack
from schemas.codec_fixed import check_ids, dense_ids
from schemas.entry_columns import Columns, decode_plain, encode_plain, entry_field, plain_fields
from schemas.entry_layout import EntryLayout
from schemas.kept_entries import KeptEntries, Offsets, offsets_of
from schemas.list_column import list_type, make_list, view_list


def fields(layout: EntryLayout) -> list[pa.Field]:
    """Returns the codec's columns."""
    if layout.is_dense:
        return plain_fields(layout)
    meaning = (
        f"kept token ids of {layout.id_bits} bits: byte planes, lowest first, then bit planes, each padded "
        "to a byte, lowest bit first"
    )
    return [*plain_fields(layout), entry_field("ids", list_type(np.uint8), meaning, "packed token ids")]


def encode(entries: KeptEntries, rows: Offsets, layout: EntryLayout) -> dict[str, pa.Array]:
    """Encodes the entries of B rows; see ``schemas.codec.Codec``."""
    columns = encode_plain(entries, rows, layout)
    if not layout.is_dense:
        bounds = entries.offsets[rows]
        pieces = [pack(entries.ids[start:stop], layout.id_bits) for start, stop in pairwise(bounds)]
        columns["ids"] = join_pieces(pieces)
    return columns


def decode(
    columns: Columns, rows: Offsets, layout: EntryLayout, log_tail: npt.NDArray[np.float32]
) -> KeptEntries:
    """Decodes the entries of B rows; see ``schemas.codec.Codec``."""
    entries = decode_plain(columns, rows, layout, log_tail)
    if layout.is_dense:
        return KeptEntries(entries.offsets, dense_ids(layout, int(rows[-1])), entries.log_probs)
    planes, places = view_list(columns["ids"], np.uint8)
    bounds = entries.offsets[rows]
    pieces = [
        unpack(planes[places[row] : places[row + 1]], int(bounds[row + 1] - bounds[row]), layout.id_bits)
        for row in range(len(rows) - 1)
    ]
    ids = np.concatenate(pieces) if pieces else np.empty(0, layout.id_dtype)
    check_ids(ids, layout)
    return KeptEntries(entries.offsets, ids, entries.log_probs, entries.num_head, entries.tau, entries.draws)


def join_pieces(pieces: list[npt.NDArray[np.uint8]]) -> pa.ListArray:
    """Returns a list column with one piece a row."""
    values = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
    return make_list(values, offsets_of(np.array([len(piece) for piece in pieces], np.int64)))
