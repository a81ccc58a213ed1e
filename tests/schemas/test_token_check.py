"""What the rows of a token-level shard must mean: each fault is found and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.chunks import hash_chunk
from schemas.entry_layout import CodecError
from schemas.kept_entries import KeptEntries, PositionStats
from schemas.policy import TopKPolicy
from schemas.token_check import check_token_batch
from schemas.token_rows import TokenChunks, TokenRows, encode_token_rows, token_schema

VOCAB = 10
POLICY = TopKPolicy(kind="top_k", k=2)
Change = Callable[[TokenRows], TokenRows]


def make_rows() -> TokenRows:
    """Two chunks with two positions and one, all with p = (0.5, 0.3) on ids 1 and 4."""
    floats = lambda *values: np.array(values, np.float32)  # noqa: E731
    entries = KeptEntries(
        offsets=np.array([0, 2, 4, 6]),
        ids=np.array([1, 4] * 3, np.int32),
        log_probs=np.log(floats(*[0.5, 0.3] * 3)),
    )
    stats = PositionStats(
        log_tail=np.log(floats(0.2, 0.2, 0.2)),
        lse=floats(1, 2, 3),
        entropy=floats(1, 1, 1),
        target_logprob=floats(-1, -np.inf, -2),
        lse_grid=floats(1, 2, 3)[:, None],
    )
    chunks = TokenChunks(
        np.array([1, 2, 3, 4, 5], np.int32), np.array([0, 1, 1, 0, 1], np.uint8), np.array([0, 3, 5])
    )
    return TokenRows(chunks, entries, stats, np.array([0, 2, 3]))


def encode(rows: TokenRows, hashed: TokenRows | None = None) -> pa.RecordBatch:
    chunks = (hashed or rows).chunks
    cuts = chunks.offsets
    hashes = [
        hash_chunk(chunks.input_ids[cuts[i] : cuts[i + 1]], chunks.loss_mask[cuts[i] : cuts[i + 1]])
        for i in range(2)
    ]
    keys = pa.record_batch(
        [pa.array([0, 1]), pa.array(["d#0", "d#1"]), pa.array(hashes, pa.binary(16))],
        names=["ordinal", "example_id", "text_hash"],
    )
    return encode_token_rows(keys, rows, token_schema("fixed", POLICY, VOCAB, (2.0,)))


def change_stat(name: str, position: int, value: float) -> Change:
    def change(rows: TokenRows) -> TokenRows:
        getattr(rows.stats, name)[position] = value
        return rows

    return change


def change_mask(place: int, value: int) -> Change:
    def change(rows: TokenRows) -> TokenRows:
        rows.chunks.loss_mask[place] = value
        return rows

    return change


def keep_one(rows: TokenRows) -> TokenRows:
    entries = KeptEntries(np.array([0, 1, 3, 5]), rows.entries.ids[1:], rows.entries.log_probs[1:])
    rows.stats.log_tail[0] = np.log(0.7)
    return replace(rows, entries=entries)


def test_rows_of_a_distribution_pass() -> None:
    check_token_batch(encode(make_rows()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_stat("lse", 2, np.inf), "lse is no such number, first at d#1"),
        (change_stat("entropy", 0, -0.5), "entropy is no such number, first at d#0"),
        (change_stat("entropy", 0, 3.0), "entropy is no such number"),
        (change_stat("target_logprob", 1, 0.5), "target_logprob is no such number"),
        (change_stat("lse_grid", 1, np.inf), "lse_grid is no such number, first at d#0"),
        (change_stat("log_tail", 2, -0.1), "have a mass of 1.70.*, not 1, first at d#1"),
        (change_stat("log_tail", 0, -np.inf), "have a mass of 0.79.*, first at d#0"),
        (change_mask(0, 1), "2 positions for 3 tokens of the loss mask, first at d#0"),
        (change_mask(4, 2), "loss mask has other values"),
        (keep_one, "position 0 has another number of entries"),
    ],
)
def test_what_no_distribution_has_is_found_and_the_row_is_named(change: Change, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        check_token_batch(encode(change(make_rows())))


def test_tokens_that_do_not_match_their_hash_are_found() -> None:
    other = make_rows()
    other.chunks.input_ids[3] = 9
    with pytest.raises(CodecError, match="tokens do not match their hash, first at d#1"):
        check_token_batch(encode(other, hashed=make_rows()))


@pytest.mark.parametrize("ids", [[4, 1], [1, 1], [1, 10]])
def test_ids_out_of_order_twice_or_out_of_range_are_found(ids: list[int]) -> None:
    batch = encode(make_rows())
    column = batch.schema.get_field_index("ids")
    values: Any = pa.array([[*ids, 1, 4], [1, 4]], batch.schema.types[column])
    with pytest.raises(CodecError, match="kept id"):
        check_token_batch(batch.set_column(column, batch.schema.field(column), values))
