from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.digest import (
    DocumentError,
    create_file,
    decode_document,
    encode_document,
    hash_value,
    read_document,
    replace_file,
    write_document,
)

BODY = {"name": "ä", "rows": 3, "nested": {"values": [1, 2.5, None]}}


def test_a_document_survives_the_round_trip(tmp_path: Path) -> None:
    write_document(tmp_path / "a.json", BODY)
    assert read_document(tmp_path / "a.json") == BODY


def test_equal_content_gives_equal_bytes_whatever_the_key_order() -> None:
    assert encode_document({"a": 1, "b": 2}) == encode_document({"b": 2, "a": 1})
    assert hash_value({"a": 1, "b": 2}) == hash_value({"b": 2, "a": 1})


@given(st.data())
def test_a_flipped_bit_is_found_or_means_nothing(data: st.DataObject) -> None:
    original = encode_document(BODY)
    position = data.draw(st.integers(0, len(original) * 8 - 1))
    damaged = bytearray(original)
    damaged[position // 8] ^= 1 << (position % 8)
    try:
        decoded = decode_document(bytes(damaged))
    except DocumentError:
        return
    assert decoded == BODY  # white space became other white space


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": 1}',
        '{"a": NaN, "digest": "x"}',
        '{"a": 1, "a": 1, "digest": "x"}',
        "[" * 100_000,
    ],
)
def test_what_is_no_strict_document_is_refused(text: str) -> None:
    with pytest.raises(DocumentError):
        decode_document(text.encode())


def test_an_edited_value_is_refused() -> None:
    document = json.loads(encode_document(BODY))
    document["rows"] = 4
    with pytest.raises(DocumentError, match="digest"):
        decode_document(json.dumps(document).encode())


def test_create_file_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert create_file(path, b"first")
    assert not create_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_failed_replacement_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
