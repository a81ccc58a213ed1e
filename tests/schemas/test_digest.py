from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.digest import (
    MAX_DOCUMENT_DEPTH,
    MAX_DOCUMENT_VALUES,
    DocumentError,
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
        "[" * 900 + "]" * 900,
        '{"a": ' * 900 + "1" + "}" * 900,
        '{"a": ' + "9" * 1_000_000 + "}",
        '{"a": -' + "9" * 101 + "}",
        '{"a": 1e999, "digest": "x"}',
        '{"a": "\\ud800", "digest": "x"}',
        '{"\\udfff": 1, "digest": "x"}',
        '{"a": Infinity, "digest": "x"}',
        '{"digest": {"digest": []}}',
        "\ufeff{}",
        "{}{}",
        "null",
        "\0",
    ],
)
def test_what_is_no_strict_document_is_refused(text: str) -> None:
    with pytest.raises(DocumentError):
        decode_document(text.encode())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_another_encoding_than_plain_utf8_is_refused(encoding: str) -> None:
    text = encode_document({"name": "a"}).decode()
    with pytest.raises(DocumentError, match="not strict JSON"):
        decode_document(text.encode(encoding))


def test_bytes_that_are_no_utf8_are_refused() -> None:
    for surrogate_or_overlong in (b"\xed\xa0\x80", b"\xc0\x80", b"\xff"):
        with pytest.raises(DocumentError, match="not strict JSON"):
            decode_document(b'{"a": "' + surrogate_or_overlong + b'"}')


def test_nesting_is_bounded_and_the_bound_is_exact() -> None:
    def nest(depth: int) -> dict[str, object]:
        body: dict[str, object] = {"leaf": 1}
        for _ in range(depth - 1):
            body = {"a": body}
        return body

    deepest = nest(MAX_DOCUMENT_DEPTH)
    assert decode_document(encode_document(deepest)) == deepest
    with pytest.raises(DocumentError, match="nested more than 64 deep"):
        decode_document(encode_document(nest(MAX_DOCUMENT_DEPTH + 1)))


def test_a_document_larger_than_asked_for_is_refused(tmp_path: Path) -> None:
    data = encode_document(BODY)
    assert decode_document(data, max_bytes=len(data)) == BODY
    with pytest.raises(DocumentError, match="larger than"):
        decode_document(data, max_bytes=len(data) - 1)
    (tmp_path / "a.json").write_bytes(data)
    assert read_document(tmp_path / "a.json", max_bytes=len(data)) == BODY
    with pytest.raises(DocumentError, match="larger than"):
        read_document(tmp_path / "a.json", max_bytes=len(data) - 1)


@pytest.mark.parametrize("item", [b"[]", b"{}", b"[[]]", b'{"a":0}', b"0"])
def test_too_many_values_are_refused_before_python_makes_objects_of_them(item: bytes) -> None:
    data = b'{"a":[' + b",".join([item] * (MAX_DOCUMENT_VALUES + 1)) + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(DocumentError, match="values"):
            decode_document(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_as_many_values_as_allowed_take_bounded_memory() -> None:
    # `[[],[],...]` makes the most objects of the fewest bytes.
    data = b'{"a":[' + b"[],".join([b""] * (MAX_DOCUMENT_VALUES // 20)) + b"0]}"
    tracemalloc.start()
    try:
        with pytest.raises(DocumentError, match="digest"):
            decode_document(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 300 * MAX_DOCUMENT_VALUES // 20


def test_an_edited_value_is_refused() -> None:
    document = json.loads(encode_document(BODY))
    document["rows"] = 4
    with pytest.raises(DocumentError, match="digest"):
        decode_document(json.dumps(document).encode())


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
