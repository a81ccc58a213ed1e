from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.codec import CODECS, CodecError
from schemas.errors import RecipeError
from schemas.kept_entries import offsets_of
from schemas.policy import AnyPolicy, TopKPolicy
from schemas.rows import classification_schema, hash_texts
from schemas.token_rows import (
    LAYOUT_KEY,
    TokenChunks,
    TokenRows,
    decode_token_rows,
    encode_token_rows,
    make_layout,
    read_layout,
    token_schema,
)
from tests.schemas.kept_examples import POLICIES, make_entries, make_stats

VOCAB = 500
GRID = (2.0, 4.0)
LENGTHS = np.array([5, 1, 9])
ROWS = np.array([0, 4, 4, 11])
cases = pytest.mark.parametrize("kind", POLICIES)
codecs = pytest.mark.parametrize("codec", CODECS)


def make_rows(policy: AnyPolicy, vocab: int = VOCAB, grid: tuple[float, ...] = GRID) -> TokenRows:
    rng = np.random.default_rng(3)
    offsets = offsets_of(LENGTHS)
    tokens = rng.integers(0, vocab, offsets[-1]).astype(np.int32)
    entries, log_tail = make_entries(policy, vocab, int(ROWS[-1]), seed=2, empty=0.2)
    stats = make_stats(log_tail, len(grid), seed=1)
    return TokenRows(TokenChunks(tokens, np.ones(len(tokens), np.uint8), offsets), entries, stats, ROWS)


def make_keys(num_rows: int = 3) -> pa.RecordBatch:
    hashes = [hash_texts([str(row)]) for row in range(num_rows)]
    columns = {
        "ordinal": pa.array(range(num_rows), pa.int64()),
        "example_id": pa.array([f"train/0#{row}" for row in range(num_rows)], pa.string()),
        "text_hash": pa.array(hashes, pa.binary(16)),
    }
    return pa.record_batch(columns)


def make_batch(codec: str, policy: AnyPolicy) -> pa.RecordBatch:
    schema = token_schema(codec, policy, VOCAB, GRID)
    return encode_token_rows(make_keys(), make_rows(policy), schema)


@codecs
@cases
def test_no_column_is_nullable_and_each_says_what_it_means(codec: str, kind: str) -> None:
    schema = token_schema(codec, POLICIES[kind], VOCAB, GRID)
    for field in schema:
        assert not field.nullable
        assert not (pa.types.is_list(field.type) and field.type.value_field.nullable)
        assert field.metadata[b"meaning"]
        assert field.metadata[b"units"]
    assert schema.names[:5] == ["ordinal", "example_id", "text_hash", "input_ids", "loss_mask"]
    assert schema.names[-5:] == ["log_tail", "lse", "entropy", "target_logprob", "lse_grid"]
    assert b"T = 2, 4" in schema.field("lse_grid").metadata[b"meaning"]


@codecs
@cases
def test_the_layout_reads_back_from_the_metadata(codec: str, kind: str) -> None:
    schema = token_schema(codec, POLICIES[kind], VOCAB, GRID)
    found = read_layout(schema.metadata)
    assert found == make_layout(codec, POLICIES[kind], VOCAB, GRID)
    assert (found.codec.name, found.entries.vocab, found.grid) == (codec, VOCAB, GRID)


@codecs
@cases
def test_rows_come_back_in_slices_and_from_a_file(codec: str, kind: str, tmp_path: Path) -> None:
    rows = make_rows(POLICIES[kind])
    batch = make_batch(codec, POLICIES[kind])
    batch.validate(full=True)
    path = tmp_path / "shard.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pa.memory_map(str(path)) as source:
        read = pa.ipc.open_file(source).get_batch(0)
        layout = read_layout(read.schema.metadata)
        whole, part = decode_token_rows(read, layout), decode_token_rows(read.slice(1), layout)
        np.testing.assert_array_equal(whole.chunks.input_ids, rows.chunks.input_ids)
        np.testing.assert_array_equal(whole.chunks.loss_mask, rows.chunks.loss_mask)
        np.testing.assert_array_equal(whole.entries.ids, rows.entries.ids)
        np.testing.assert_array_equal(whole.rows, ROWS)
        for name in ("log_tail", "lse", "entropy", "target_logprob", "lse_grid"):
            np.testing.assert_array_equal(getattr(whole.stats, name), getattr(rows.stats, name))
            np.testing.assert_array_equal(getattr(part.stats, name), getattr(rows.stats, name)[4:])
        np.testing.assert_array_equal(part.chunks.input_ids, rows.chunks.input_ids[5:])
        np.testing.assert_array_equal(part.entries.ids, rows.entries.ids[rows.entries.offsets[4] :])
        np.testing.assert_array_equal(part.rows, ROWS[1:] - 4)
        narrow = decode_token_rows(read, layout, narrow=True)
        assert narrow.entries.widen().ids.tolist() == whole.entries.ids.tolist()


@pytest.mark.parametrize(
    ("codec", "vocab", "grid", "message"),
    [
        ("zip", 500, (), "there is no codec 'zip'; there are fixed, packed, compact"),
        ("fixed", 4, (), "k is 5, above the vocabulary of 4"),
        ("fixed", 500, (0.0,), "above 0"),
        ("fixed", 500, (float("inf"),), "finite"),
        ("fixed", 500, (2.0, 2.0), "distinct"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    codec: str, vocab: int, grid: tuple[float, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        token_schema(codec, POLICIES["top_k"], vocab, grid)


def changed(**changes: Any) -> dict[bytes, bytes]:
    text = token_schema("fixed", POLICIES["top_k"], VOCAB, GRID).metadata[LAYOUT_KEY]
    return {LAYOUT_KEY: json.dumps({**json.loads(text), **changes}).encode()}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "does not say"),
        (classification_schema(3).metadata, "does not say"),
        ({LAYOUT_KEY: b"{"}, "not strict JSON"),
        ({LAYOUT_KEY: b"[]"}, "other fields"),
        (changed(extra=1), "other fields"),
        (changed(codec=3), "no codec"),
        (changed(codec="zip"), "no codec 'zip'"),
        (changed(version=2), "version 2 is not known; a newer tmkd"),
        (changed(vocab=True), "no codec or vocabulary"),
        (changed(vocab=4), "k is 5, above"),
        (changed(vocab=2**31 + 1), "not valid"),
        (changed(policy={"kind": "top_n"}), "not valid"),
        (changed(grid=["2"]), "no grid"),
        (changed(grid=[2.0] * 99), "distinct"),
    ],
)
def test_metadata_that_is_none_is_an_error(metadata: dict[bytes, bytes] | None, message: str) -> None:
    with pytest.raises(CodecError, match=message) as caught:
        read_layout(metadata)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", [[VOCAB] * 5, [0], [0] * 9], "token id is out of range"),
        ("input_ids", [[0] * 4, [0], [0] * 9], "loss_mask has other lengths"),
        ("lse", [[0.0] * 3, [], [0.0] * 7], "lse has other lengths"),
        ("lse_grid", [[0.0] * 4, [], [0.0] * 7], "lse_grid has other lengths"),
        ("entropy", [[float("nan")] * 4, [], [0.0] * 7], "entropy has a value that is not a number"),
        ("log_tail", [[1.0] * 4, [], [0.0] * 7], "log_tail is above 0"),
    ],
)
def test_rows_that_do_not_fit_together_are_an_error(
    name: str, value: list[list[float]], message: str
) -> None:
    batch = make_batch("fixed", POLICIES["top_k"])
    index = batch.schema.get_field_index(name)
    damaged = batch.set_column(
        index, batch.schema.field(index), pa.array(value, batch.schema.field(index).type)
    )
    with pytest.raises(CodecError, match=message):
        decode_token_rows(damaged, read_layout(batch.schema.metadata))


def test_more_positions_than_tokens_are_an_error() -> None:
    rows = make_rows(POLICIES["top_k"])
    short = TokenChunks(rows.chunks.input_ids[:6], rows.chunks.loss_mask[:6], np.array([0, 2, 4, 6]))
    schema = token_schema("fixed", POLICIES["top_k"], VOCAB, GRID)
    batch = encode_token_rows(make_keys(), TokenRows(short, rows.entries, rows.stats, ROWS), schema)
    with pytest.raises(CodecError, match="more stored positions than tokens"):
        decode_token_rows(batch, read_layout(schema.metadata))


def test_a_classification_batch_is_no_token_batch() -> None:
    batch = pa.record_batch(
        [pa.array([], field.type) for field in classification_schema(2)], ["a", "b", "c", "d"]
    )
    with pytest.raises(CodecError, match="is this a token-level shard"):
        decode_token_rows(batch, make_layout("fixed", POLICIES["top_k"], VOCAB, GRID))


def test_parts_of_different_rows_are_refused() -> None:
    schema = token_schema("fixed", POLICIES["top_k"], VOCAB, GRID)
    rows = make_rows(POLICIES["top_k"])
    with pytest.raises(CodecError, match="different rows"):
        encode_token_rows(make_keys(2), rows, schema)
    with pytest.raises(CodecError, match="lse_grid has shape"):
        encode_token_rows(make_keys(), rows, token_schema("fixed", POLICIES["top_k"], VOCAB, ()))


def test_an_empty_grid_and_no_rows_come_back() -> None:
    policy = TopKPolicy(kind="top_k", k=5)
    schema = token_schema("compact", policy, VOCAB, ())
    layout = read_layout(schema.metadata)
    batch = encode_token_rows(make_keys(), make_rows(policy, grid=()), schema)
    assert decode_token_rows(batch, layout).stats.lse_grid.shape == (11, 0)
    assert decode_token_rows(batch.slice(0, 0), layout).entries.num_positions == 0
