"""The columns that the codecs ``fixed`` and ``packed`` share: all but the ids.

Columns: ``num_kept`` (not for dense), ``num_head`` (hybrid), ``log_probs`` float16 of the exact entries,
``draw_counts`` and ``log_norm`` (sampled). Values go into float16 as they are, at least -65504: its
relative error of 2^-11 moves a distribution by a total variation of some 0.0002.

Invariants (tests/schemas/test_codec.py):
    1. Every length is checked against the others before anything is expanded, and what is expanded is
       bounded by the bytes that came in.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.entry_layout import CodecError, EntryLayout
from schemas.kept_entries import Draws, Floats, Integers, KeptEntries, Offsets, offsets_of
from schemas.list_column import list_type, make_list, view_list

Columns = Mapping[str, pa.Array]
_FLOAT16_LOWEST = -65504.0
# Of float16 as int16: -inf. Below it lie the finite numbers with a sign, above it NaN and the positive ones.
_MINUS_INFINITY = np.int16(-1024)


def entry_field(name: str, type_: pa.DataType, meaning: str, units: str) -> pa.Field:
    """Returns a non-nullable field that says what it is."""
    return pa.field(name, type_, nullable=False, metadata={"meaning": meaning, "units": units})


def plain_fields(layout: EntryLayout) -> list[pa.Field]:
    """Returns the shared columns of a layout."""
    fields = []
    if not layout.is_dense:
        meaning = "kept entries of each position"
        fields.append(entry_field("num_kept", list_type(layout.count_dtype), meaning, "entries"))
    if layout.is_hybrid:
        meaning = "of a position's entries the first so many are exact; each further one carries tau"
        fields.append(entry_field("num_head", list_type(layout.count_dtype), meaning, "entries"))
    meaning = "log-softmax at T = 1 over the true vocabulary, not renormalised"
    if layout.is_hybrid:
        meaning += "; of the exact entries only: tau = exp(log_tail) / (num_kept - num_head)"
    fields.append(entry_field("log_probs", list_type(np.float16), meaning, "nats"))
    return [*fields, *draw_fields(layout, list_type(np.uint16), "draws of each entry")]


def draw_fields(layout: EntryLayout, type_: pa.DataType, meaning: str) -> list[pa.Field]:
    """Returns the columns of ``sampled``; none for other policies."""
    if layout.draws is None:
        return []
    norm = "log of the sum of p^tau; an entry's mass is count / num_samples * exp(log_norm) * p^(1 - tau)"
    return [
        entry_field("draw_counts", type_, meaning, "draws"),
        entry_field("log_norm", list_type(np.float32), norm, "nats"),
    ]


def encode_plain(entries: KeptEntries, rows: Offsets, layout: EntryLayout) -> dict[str, pa.Array]:
    """Encodes everything but the ids.

    Args:
        entries: Of N positions.
        rows: int64[B + 1]: the positions of each row.
        layout: Policy and vocabulary.
    """
    columns = {}
    bounds = entries.offsets[rows]
    log_probs = entries.log_probs
    if not layout.is_dense:
        columns["num_kept"] = make_list(entries.counts.astype(layout.count_dtype), rows)
    if entries.num_head is not None:
        columns["num_head"] = make_list(entries.num_head.astype(layout.count_dtype), rows)
        log_probs = log_probs[entries.head_mask()]
        bounds = offsets_of(entries.num_head)[rows]
    columns["log_probs"] = make_list(narrow_log_probs(log_probs), bounds)
    if entries.draws is not None:
        columns["draw_counts"] = make_list(entries.draws.counts.astype(np.uint16), entries.offsets[rows])
        columns["log_norm"] = make_list(entries.draws.log_norm, rows)
    return columns


def decode_plain(
    columns: Columns, rows: Offsets, layout: EntryLayout, log_tail: npt.NDArray[np.float32]
) -> KeptEntries:
    """Decodes everything but the ids, which are left empty; log-probabilities are views, except for hybrid.

    Args:
        columns: Of B rows.
        rows: int64[B + 1]: the positions of each row.
        layout: Policy and vocabulary.
        log_tail: float32[N] of the same positions.

    Raises:
        CodecError: A length or a value is impossible.
    """
    offsets = _read_counts(columns, "num_kept", rows, layout)
    log_probs, bounds = view_list(columns["log_probs"], np.float16)
    check_log_probs(log_probs)
    ids = np.empty(0, layout.id_dtype)
    if layout.is_hybrid:
        head = _read_counts(columns, "num_head", rows, layout)
        check_bounds("log_probs", bounds, head[rows])
        num_head = np.diff(head)
        wide, tau = spread_tail(log_probs, num_head, np.diff(offsets), log_tail)
        return KeptEntries(offsets, ids, wide, num_head=num_head, tau=tau)
    check_bounds("log_probs", bounds, offsets[rows])
    draws = None
    if layout.draws is not None:
        counts, bounds = view_list(columns["draw_counts"], np.uint16)
        check_bounds("draw_counts", bounds, offsets[rows])
        draws = read_draws(columns, counts, rows, layout)
    return KeptEntries(offsets, ids, log_probs, draws=draws)


def read_draws(columns: Columns, counts: Integers, rows: Offsets, layout: EntryLayout) -> Draws:
    """Returns the draws of a sampled layout, given the counts of its entries."""
    policy = layout.draws
    if policy is None:
        raise CodecError(f"policy {layout.policy.kind} has no draws")
    log_norm, bounds = view_list(columns["log_norm"], np.float32)
    check_bounds("log_norm", bounds, rows)
    if not np.isfinite(log_norm).all():
        raise CodecError("log_norm is not finite")
    return Draws(counts, log_norm, policy.num_samples, policy.tau)


def spread_tail(
    head_log_probs: Floats, num_head: Offsets, num_kept: Offsets, log_tail: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Returns the log-probabilities of a hybrid store's entries, float32[S], and tau, float32[N].

    The sampled entries of a position share the mass of its tail: tau = exp(log_tail) / their number.

    Raises:
        CodecError: A head is larger than its position.
    """
    num_tail = num_kept - num_head
    if (num_tail < 0).any():
        raise CodecError("a position has more exact entries than entries")
    log_tau = log_tail - np.log(np.maximum(num_tail, 1)).astype(np.float32)
    log_tau[num_tail == 0] = -np.inf
    lengths = np.stack([num_head, num_tail], axis=1).reshape(-1)
    mask = np.repeat(np.tile(np.array([True, False]), len(num_head)), lengths)
    wide = np.repeat(log_tau, num_kept)
    wide[mask] = head_log_probs
    return wide, np.exp(log_tau)


def narrow_log_probs(log_probs: Floats) -> npt.NDArray[np.float16]:
    """Returns log-probabilities at or below 0 as finite float16 numbers with the sign bit set."""
    narrow = np.clip(log_probs, _FLOAT16_LOWEST, -0.0).astype(np.float16)
    bits: npt.NDArray[np.float16] = (narrow.view(np.uint16) | np.uint16(0x8000)).view(np.float16)
    return bits


def check_log_probs(log_probs: npt.NDArray[np.float16]) -> None:
    """Checks in one pass over integers that nothing is NaN or positive.

    Raises:
        CodecError: Something is.
    """
    if len(log_probs) and log_probs.view(np.int16).max() > _MINUS_INFINITY:
        raise CodecError("a log-probability is positive or not a number")


def check_bounds(name: str, found: Offsets, expected: Offsets) -> None:
    """Checks that a list column has the lengths that others imply.

    Raises:
        CodecError: It has not.
    """
    if not np.array_equal(found, expected):
        raise CodecError(f"column {name} has other lengths than its positions ask for")


def _read_counts(columns: Columns, name: str, rows: Offsets, layout: EntryLayout) -> Offsets:
    if layout.is_dense:
        return np.arange(rows[-1] + 1, dtype=np.int64) * layout.vocab
    counts, bounds = view_list(columns[name], layout.count_dtype)
    check_bounds(name, bounds, rows)
    return offsets_of(counts)
