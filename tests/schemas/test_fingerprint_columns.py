"""The vectorised fingerprint gives the same digest as the plain definition."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import rows as rows_module
from schemas.rows import TEXT_HASH_BYTES, fingerprint_columns, fingerprint_rows, hash_texts

_IDS = st.lists(st.text(max_size=12), max_size=20)


def _columns(ids: list[str]) -> tuple[pa.ChunkedArray, pa.ChunkedArray, list[bytes]]:
    hashes = [hash_texts([text, "x"]) for text in ids]
    id_column = pa.chunked_array([pa.array(ids, pa.string())])
    return id_column, pa.chunked_array([pa.array(hashes, pa.binary(TEXT_HASH_BYTES))]), hashes


@settings(max_examples=50, deadline=None)
@given(ids=_IDS.map(lambda ids: [text.encode("utf-8", "ignore").decode() for text in ids]))
def test_columns_and_rows_have_one_fingerprint(ids: list[str]) -> None:
    id_column, hash_column, hashes = _columns(ids)
    assert fingerprint_columns(id_column, hash_column) == fingerprint_rows(ids, hashes)


def test_a_slice_in_several_chunks_has_the_fingerprint_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_FINGERPRINT_ROWS", 3)
    ids = [f"part/{'é' * (i % 4)}{i}" for i in range(20)]
    id_column, hash_column, hashes = _columns(ids)
    id_column = pa.chunked_array(
        [id_column.slice(0, 7).combine_chunks(), id_column.slice(7).combine_chunks()]
    )
    assert fingerprint_columns(id_column.slice(2, 15), hash_column.slice(2, 15)) == fingerprint_rows(
        ids[2:17], hashes[2:17]
    )
