"""What the rows of a token-level shard must mean, checked when a shard is written or verified deeply.

Shapes: B rows (chunks), T tokens, N positions, S kept entries, G temperatures, of all of them.

Invariants (tests/schemas/test_token_check.py):
    1. Rows that pass have the hashes of their tokens, one position for each token of the loss mask,
       as many entries as the policy keeps, ids below V that increase, and numbers that a distribution has.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.chunks import hash_chunk
from schemas.codec import check_entries
from schemas.entry_layout import CodecError
from schemas.kept_entries import KeptEntries
from schemas.policy import TopPPolicy, most_kept
from schemas.rows import TEXT_HASH_BYTES
from schemas.token_rows import TokenLayout, TokenRows, decode_token_rows, read_layout

# Masses of exact entries and tail add up to 1, but for what codecs round: fp16, or the compact one's bound.
_MASS_TOLERANCE: Final = 0.02
_NATS_TOLERANCE: Final = 1e-3


def check_token_batch(batch: pa.RecordBatch) -> None:
    """Checks a record batch of a token-level shard, except for its place in the plan.

    Args:
        batch: B rows; its schema's metadata says what they hold.

    Raises:
        CodecError: A row is not what a shard may hold; the message names it.
    """
    layout = read_layout(batch.schema.metadata)
    rows = decode_token_rows(batch, layout)
    ids = batch.column("example_id")
    _check_chunks(rows, batch)
    _check_stats(rows, layout, ids)
    check_entries(rows.entries, rows.rows, layout.entries)
    _check_counts(rows.entries, layout)
    _check_masses(rows, ids)


def _check_chunks(rows: TokenRows, batch: pa.RecordBatch) -> None:
    chunks, ids = rows.chunks, batch.column("example_id")
    if len(chunks.loss_mask) and chunks.loss_mask.max() > 1:
        raise CodecError("a loss mask has other values than 0 and 1")
    hashes = batch.column("text_hash").to_pylist()
    num_positions = np.diff(rows.rows)
    for row, text_hash in enumerate(hashes):
        tokens = slice(int(chunks.offsets[row]), int(chunks.offsets[row + 1]))
        mask_T = chunks.loss_mask[tokens]
        if len(text_hash) != TEXT_HASH_BYTES or hash_chunk(chunks.input_ids[tokens], mask_T) != text_hash:
            raise CodecError(f"tokens do not match their hash, first at {ids[row]}")
        if int(mask_T.sum(dtype=np.int64)) != num_positions[row]:
            raise CodecError(
                f"{num_positions[row]} positions for {mask_T.sum(dtype=np.int64)} tokens of the loss mask, "
                f"first at {ids[row]}"
            )


def _check_stats(rows: TokenRows, layout: TokenLayout, ids: pa.Array) -> None:
    stats = rows.stats
    largest = math.log(layout.entries.vocab) + _NATS_TOLERANCE
    is_bad: dict[str, Any] = {
        "lse": ~np.isfinite(stats.lse),
        "entropy": ~((stats.entropy >= -_NATS_TOLERANCE) & (stats.entropy <= largest)),
        # A token that the teacher never says has minus infinity.
        "target_logprob": ~(stats.target_logprob <= _NATS_TOLERANCE),
        "log_tail": ~(stats.log_tail <= 0),
        "lse_grid": np.any(~np.isfinite(stats.lse_grid), axis=1),
    }
    for name, is_bad_N in is_bad.items():
        if is_bad_N.any():
            raise CodecError(f"{name} is no such number, first at {_row_of(rows, is_bad_N, ids)}")


def _check_counts(entries: KeptEntries, layout: TokenLayout) -> None:
    policy, vocab = layout.entries.policy, layout.entries.vocab
    counts = entries.counts
    if isinstance(policy, TopPPolicy):
        is_bad_N = (counts < policy.k_min) | (counts > policy.k_max)
    elif entries.draws is not None:
        draws = np.concatenate([[0], np.cumsum(entries.draws.counts, dtype=np.int64)])[entries.offsets]
        is_bad_N = np.diff(draws) != entries.draws.num_samples
    else:
        is_bad_N = counts != most_kept(policy, vocab)
    if is_bad_N.any():
        raise CodecError(f"position {int(np.argmax(is_bad_N))} has another number of entries than the policy")


def _check_masses(rows: TokenRows, ids: pa.Array) -> None:
    entries = rows.entries
    if len(entries.log_probs) and entries.log_probs.max() > _NATS_TOLERANCE:
        raise CodecError("a log-probability is above 0")
    masses = np.where(entries.head_mask(), np.exp(entries.log_probs, dtype=np.float64), 0.0)
    sums = np.concatenate([[0.0], np.cumsum(masses)])[entries.offsets]
    total_N = np.diff(sums) + np.exp(rows.stats.log_tail, dtype=np.float64)
    is_bad_N = np.abs(total_N - 1) > _MASS_TOLERANCE
    if is_bad_N.any():
        raise CodecError(
            f"kept entries and tail have a mass of {total_N[np.argmax(is_bad_N)]:.4f}, not 1, first at "
            f"{_row_of(rows, is_bad_N, ids)}"
        )


def _row_of(rows: TokenRows, is_bad_N: npt.NDArray[np.bool_], ids: pa.Array) -> str:
    row = int(np.searchsorted(rows.rows, int(np.argmax(is_bad_N)), side="right")) - 1
    return str(ids[row])
