"""Chunks: their hash, and their file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from schemas.chunks import CHUNKS_KEY, ChunkSpec, chunk_schema, hash_chunk, open_chunks, view_chunks
from schemas.errors import DataError
from schemas.list_column import make_list
from schemas.tokenizer_hash import hash_tokenizer

SPEC = ChunkSpec(objective="causal", tokenizer="a" * 64, max_length=8, add_special_tokens=True, vocab=10)


def make_table(spec: ChunkSpec = SPEC) -> pa.Table:
    ids = [np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32)]
    masks = [np.array([0, 1, 1], np.uint8), np.array([0, 1], np.uint8)]
    offsets = np.array([0, 3, 5])
    return pa.table(
        [
            pa.array([0, 1]),
            pa.array(["d/0#0", "d/0#1"]),
            pa.array([hash_chunk(i, m) for i, m in zip(ids, masks, strict=True)], pa.binary(16)),
            make_list(np.concatenate(ids), offsets),
            make_list(np.concatenate(masks), offsets),
        ],
        schema=chunk_schema(spec),
    )


def write(table: pa.Table, path: Path) -> Path:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def test_the_hash_covers_ids_and_mask_each_with_its_length() -> None:
    ids, mask = np.array([1, 2]), np.array([0, 1])
    data = (8).to_bytes(8, "little") + bytes([1, 0, 0, 0, 2, 0, 0, 0])
    data += (2).to_bytes(8, "little") + bytes([0, 1])
    assert hash_chunk(ids, mask) == hashlib.sha256(data).digest()[:16]
    assert hash_chunk(ids, mask) != hash_chunk(ids, np.array([1, 1]))


def test_a_file_reads_back_as_it_was_described(tmp_path: Path) -> None:
    table = make_table()
    spec, found = open_chunks(write(table, tmp_path / "chunks.arrow"))
    assert spec == SPEC
    assert found.equals(table)
    chunks = view_chunks(found.slice(1, 1))
    assert chunks.input_ids.tolist() == [4, 5]
    assert chunks.loss_mask.tolist() == [0, 1]
    assert chunks.offsets.tolist() == [0, 2]


def test_no_column_of_chunks_is_nullable_and_each_says_what_it_means() -> None:
    for field in chunk_schema(SPEC):
        assert not field.nullable
        assert field.metadata[b"meaning"]


@pytest.mark.parametrize("description", [None, b"{}", b"no JSON"])
def test_a_file_without_a_valid_description_is_a_data_error(
    tmp_path: Path, description: bytes | None
) -> None:
    metadata = None if description is None else {CHUNKS_KEY: description}
    table = make_table().replace_schema_metadata(metadata)
    with pytest.raises(DataError, match=r"chunks\.arrow"):
        open_chunks(write(table, tmp_path / "chunks.arrow"))


def test_a_file_with_other_columns_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="columns are not those of chunks"):
        open_chunks(write(make_table().drop_columns(["loss_mask"]), tmp_path / "chunks.arrow"))


def test_truncation_and_padding_do_not_change_the_hash_of_a_tokenizer() -> None:
    fields = {"model": {"vocab": {"a": 0}}, "truncation": None, "padding": None}
    changed = fields | {"truncation": {"max_length": 8}, "padding": {"length": 8}}
    assert hash_tokenizer(json.dumps(fields)) == hash_tokenizer(json.dumps(changed))
    other = fields | {"model": {"vocab": {"b": 0}}}
    assert hash_tokenizer(json.dumps(fields)) != hash_tokenizer(json.dumps(other))
