"""Codec ``compact``: ids in Elias-Fano coding, values in one byte, both compressed with zstd.

Columns of a row with P positions and S exact entries (for dense only ``values``):
    - ``num_entries``: S. ``ids_low``, ``ids_high``: ``schemas.elias_fano``, the latter a zstd frame;
    - ``values``: a zstd frame of P bytes, the lowest code of each position, and S bytes, what each
      entry's code is above it (``schemas.value_code`` has the error bounds);
    - hybrid: ``num_tail``, ``tail_low``, ``tail_high``: the same for the sampled ids, which need no value;
    - sampled: ``draw_counts``: a zstd frame of the counts' low bytes and, above 255 draws, their high
      bytes; ``log_norm``.

Invariants (tests/schemas/test_codec.py):
    1. Ids are exact, values within the bounds of ``schemas.value_code``.
    2. What a row decompresses to is bounded by its uncompressed ``ids_low`` and its positions (dense: by
       positions times vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas import elias_fano
from schemas.bit_planes import Bytes
from schemas.byte_frame import compress, expand
from schemas.codec_fixed import dense_ids
from schemas.codec_packed import join_pieces
from schemas.column_view import view_numbers
from schemas.entry_columns import Columns, draw_fields, entry_field, read_draws, spread_tail
from schemas.entry_layout import CodecError, EntryLayout
from schemas.kept_entries import Draws, Integers, KeptEntries, Offsets, offsets_of
from schemas.list_column import list_type, make_list, view_list
from schemas.value_code import dequantise, quantise, split_base

# Ids that are decoded at once.
_GROUP_IDS = 1 << 16
_HEAD = ("num_entries", "ids_low", "ids_high")
_TAIL = ("num_tail", "tail_low", "tail_high")


def fields(layout: EntryLayout) -> list[pa.Field]:
    """Returns the codec's columns."""
    blob = list_type(np.uint8)
    result = [] if layout.is_dense else _id_fields(_HEAD, "kept" if not layout.is_hybrid else "exact kept")
    meaning = "zstd: per position the lowest code, then per entry what its code is above it; p = (code/255)^6"
    result.append(entry_field("values", blob, meaning, "compressed codes"))
    if layout.is_hybrid:
        result += _id_fields(_TAIL, "sampled tail")
    return [*result, *draw_fields(layout, blob, "zstd: low bytes, then high bytes above 255 draws")]


def _id_fields(names: tuple[str, str, str], which: str) -> list[pa.Field]:
    count, low, high = names
    blob = list_type(np.uint8)
    return [
        entry_field(count, pa.int32(), f"{which} ids of the row", "entries"),
        entry_field(low, blob, f"low bits of the {which} ids, Elias-Fano", "packed bits"),
        entry_field(high, blob, f"zstd: high parts of the {which} ids, unary bitmap", "compressed bits"),
    ]


def encode(entries: KeptEntries, rows: Offsets, layout: EntryLayout) -> dict[str, pa.Array]:
    """Encodes the entries of B rows; see ``schemas.codec.Codec``."""
    columns: dict[str, pa.Array] = {}
    ids, offsets, log_probs = entries.ids, entries.offsets, entries.log_probs
    if entries.num_head is not None:
        mask = entries.head_mask()
        head = offsets_of(entries.num_head)
        _encode_ids(columns, _TAIL, ids[~mask], offsets - head, rows, layout)
        ids, offsets, log_probs = ids[mask], head, log_probs[mask]
    if not layout.is_dense:
        _encode_ids(columns, _HEAD, ids, offsets, rows, layout)
    codes = quantise(log_probs)
    bases, above = split_base(codes, offsets)
    bounds = offsets[rows]
    columns["values"] = join_pieces(
        [
            compress(np.concatenate([bases[rows[i] : rows[i + 1]], above[bounds[i] : bounds[i + 1]]]))
            for i in range(len(rows) - 1)
        ]
    )
    if entries.draws is not None:
        columns["draw_counts"] = _encode_counts(entries.draws, bounds)
        columns["log_norm"] = make_list(entries.draws.log_norm, rows)
    return columns


def decode(
    columns: Columns, rows: Offsets, layout: EntryLayout, log_tail: npt.NDArray[np.float32]
) -> KeptEntries:
    """Decodes the entries of B rows; see ``schemas.codec.Codec``."""
    if layout.is_dense:
        offsets = np.arange(rows[-1] + 1, dtype=np.int64) * layout.vocab
        codes = _decode_values(columns, rows, offsets)
        return KeptEntries(offsets, dense_ids(layout, int(rows[-1])), dequantise(codes))
    ids, offsets = _decode_ids(columns, _HEAD, rows, layout)
    log_probs = dequantise(_decode_values(columns, rows, offsets))
    if layout.is_hybrid:
        return _add_tail(columns, rows, layout, KeptEntries(offsets, ids, log_probs), log_tail)
    draws = None
    if layout.draws is not None:
        bounds = offsets[rows]
        draws = read_draws(columns, _decode_counts(columns, bounds, layout.draws.num_samples), rows, layout)
    return KeptEntries(offsets, ids, log_probs, draws=draws)


def _add_tail(
    columns: Columns,
    rows: Offsets,
    layout: EntryLayout,
    head: KeptEntries,
    log_tail: npt.NDArray[np.float32],
) -> KeptEntries:
    tail_ids, tail = _decode_ids(columns, _TAIL, rows, layout)
    offsets = head.offsets + tail
    log_probs, tau = spread_tail(head.log_probs, head.counts, np.diff(offsets), log_tail)
    entries = KeptEntries(offsets, head.ids, log_probs, num_head=head.counts, tau=tau)
    mask = entries.head_mask()
    ids = np.empty(len(mask), np.int32)
    ids[mask] = head.ids
    ids[~mask] = tail_ids
    return KeptEntries(offsets, ids, log_probs, num_head=head.counts, tau=tau)


def _encode_ids(
    columns: dict[str, pa.Array],
    names: tuple[str, str, str],
    ids: Integers,
    offsets: Offsets,
    rows: Offsets,
    layout: EntryLayout,
) -> None:
    count, low, high = names
    lows, highs = [], []
    for start, stop in pairwise(rows):
        places = offsets[start : stop + 1]
        pair = elias_fano.encode(ids[places[0] : places[-1]], places - places[0], layout.vocab)
        lows.append(pair[0])
        highs.append(compress(pair[1]))
    counts = np.diff(offsets[rows]).astype(np.int32)
    columns[count] = pa.Array.from_buffers(pa.int32(), len(counts), [None, pa.py_buffer(counts)])
    columns[low] = join_pieces(lows)
    columns[high] = join_pieces(highs)


@dataclass(frozen=True, slots=True)
class _Blobs:
    """A column of one blob a row."""

    values: Bytes
    bounds: Offsets

    @classmethod
    def of(cls, columns: Columns, name: str, num_rows: int) -> _Blobs:
        values, bounds = view_list(columns[name], np.uint8)
        if len(bounds) != num_rows + 1:
            raise CodecError(f"column {name} has {len(bounds) - 1} rows, expected {num_rows}")
        return cls(values.view(np.uint8), bounds)

    def row(self, index: int) -> Bytes:
        return self.values[self.bounds[index] : self.bounds[index + 1]]


def _decode_ids(
    columns: Columns, names: tuple[str, str, str], rows: Offsets, layout: EntryLayout
) -> tuple[npt.NDArray[np.int32], Offsets]:
    num_rows = len(rows) - 1
    counts = columns[names[0]]
    if counts.type != pa.int32() or counts.null_count or len(counts) != num_rows:
        raise CodecError(f"column {names[0]} is not one int32 a row")
    num_ids = view_numbers(counts, np.int32).astype(np.int64)
    lows, highs = (_Blobs.of(columns, name, num_rows) for name in names[1:])
    num_positions = np.diff(rows)
    sizes = [
        elias_fano.check_sizes(lows.row(i), int(num_ids[i]), int(num_positions[i]), layout.vocab)
        for i in range(num_rows)
    ]
    starts = offsets_of(num_ids)
    ids = np.empty(starts[-1], np.int32)
    offsets = np.zeros(rows[-1] + 1, np.int64)
    for first, last in _group_rows(num_ids, num_positions, layout.vocab):
        group = range(first, last)
        found, places = elias_fano.decode(
            [lows.row(i) for i in group],
            [expand(highs.row(i), sizes[i]) for i in group],
            num_ids[first:last],
            num_positions[first:last],
            layout.vocab,
        )
        ids[starts[first] : starts[last]] = found
        offsets[rows[first] : rows[last] + 1] = places + starts[first]
    return ids, offsets


def _group_rows(num_ids: Offsets, num_positions: Offsets, vocab: int) -> Iterator[tuple[int, int]]:
    """Cuts rows into groups of the same width of low bits, small enough for the cache.

    Short rows would otherwise spend their time in the overhead of numpy's calls.
    """
    first, size, group_width = 0, 0, -1
    for row, (num, places) in enumerate(zip(num_ids, num_positions, strict=True)):
        width = elias_fano.num_low_bits(int(num), int(places), vocab) if num else group_width
        if row > first and (width != group_width or size + num > _GROUP_IDS):
            yield first, row
            first, size = row, 0
        size, group_width = size + int(num), width
    if len(num_ids) > first:
        yield first, len(num_ids)


def _decode_values(columns: Columns, rows: Offsets, offsets: Offsets) -> Bytes:
    """Returns the codes of all entries, uint8[S]."""
    num_rows = len(rows) - 1
    blobs = _Blobs.of(columns, "values", num_rows)
    bounds = offsets[rows]
    codes = np.empty(offsets[-1], np.uint8)
    bases = np.empty(rows[-1], np.uint8)
    for i in range(num_rows):
        num_positions = int(rows[i + 1] - rows[i])
        plain = expand(blobs.row(i), num_positions + int(bounds[i + 1] - bounds[i]))
        bases[rows[i] : rows[i + 1]] = plain[:num_positions]
        codes[bounds[i] : bounds[i + 1]] = plain[num_positions:]
    codes += np.repeat(bases, np.diff(offsets))
    return codes


def _encode_counts(draws: Draws, bounds: Offsets) -> pa.ListArray:
    counts = draws.counts.astype(np.uint16)
    pieces = []
    for start, stop in pairwise(bounds):
        planes = [counts[start:stop].astype(np.uint8)]
        if draws.num_samples > np.iinfo(np.uint8).max:
            planes.append((counts[start:stop] >> 8).astype(np.uint8))
        pieces.append(compress(np.concatenate(planes)))
    return join_pieces(pieces)


def _decode_counts(columns: Columns, bounds: Offsets, num_samples: int) -> npt.NDArray[np.uint16]:
    blobs = _Blobs.of(columns, "draw_counts", len(bounds) - 1)
    num_planes = 1 if num_samples <= np.iinfo(np.uint8).max else 2
    counts = np.empty(bounds[-1], np.uint16)
    for i in range(len(bounds) - 1):
        size = int(bounds[i + 1] - bounds[i])
        planes = expand(blobs.row(i), num_planes * size).reshape(num_planes, size)
        counts[bounds[i] : bounds[i + 1]] = planes[0]
        if num_planes == 2:
            counts[bounds[i] : bounds[i + 1]] |= planes[1].astype(np.uint16) << 8
    return counts
