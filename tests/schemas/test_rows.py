from __future__ import annotations

import hashlib

from schemas.rows import classification_schema, corpus_key, corpus_schema, fingerprint_rows, hash_texts


def test_the_text_hash_is_sha256_over_length_prefixed_columns() -> None:
    expected = hashlib.sha256(
        (1).to_bytes(8, "little") + b"a" + (2).to_bytes(8, "little") + "é".encode()
    ).digest()[:16]
    assert hash_texts(["a", "é"]) == expected


def test_moving_text_between_columns_changes_the_hash() -> None:
    assert len({hash_texts(["ab", "c"]), hash_texts(["a", "bc"]), hash_texts(["abc"])}) == 3


def test_the_fingerprint_depends_on_order_and_ids() -> None:
    hashes = [hash_texts(["a"]), hash_texts(["b"])]
    prints = {
        fingerprint_rows(["x", "y"], hashes),
        fingerprint_rows(["y", "x"], hashes),
        fingerprint_rows(["x", "y"], hashes[::-1]),
        fingerprint_rows(["xy", ""], hashes),
    }
    assert len(prints) == 4


def test_the_corpus_key_depends_on_the_order_of_parts() -> None:
    assert corpus_key(["a", "b"]) != corpus_key(["b", "a"])


def test_no_column_is_nullable_and_each_says_what_it_means() -> None:
    for schema in (corpus_schema(2), classification_schema(3)):
        for field in schema:
            assert not field.nullable
            assert field.metadata[b"meaning"]
