"""Cached tokens: what the tokenizer itself makes of the texts, whole or not at all."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer, PreTrainedTokenizerFast

from distill.corpus_part import CorpusPart
from distill.tokenisation import describe_tokenizer
from distill.tokens import CorpusTokens
from schemas.errors import DataError, RefusedError, ResourceError
from tests.distill.tiny_models import PIECES
from tests.store_factory import make_part, write_part

PAIRS = [
    ("what does the module do", "parse files quickly"),
    ("a", "b c"),
    (
        "what is the module of a b c d e f g h a b c d",
        "slowly parsing files of a b c d e f g h and the module",
    ),
    ("", "e"),
    ("d", ""),
    ("parse files", "the files"),
    ("a b c d e f g h a b c d e f g h", "a"),
]


def _tokenizer(**options: Any) -> BertTokenizer:
    return BertTokenizer(vocab={piece: place for place, piece in enumerate(PIECES)}, **options)


def _part(path: Path, texts: list[tuple[str, ...]], name: str = "train") -> CorpusPart:
    return CorpusPart.open(make_part(path, texts, [0] * len(texts), shard_rows=4, name=name).source)


def _expected(tokenizer: Any, texts: list[tuple[str, ...]], max_length: int) -> dict[str, torch.Tensor]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    return dict(
        tokenizer(
            *columns, truncation="longest_first", max_length=max_length, padding=True, return_tensors="pt"
        )
    )


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [8, 13, 64])
@pytest.mark.parametrize("num_texts", [1, 2])
def test_batches_are_those_of_the_tokenizer(
    tmp_path: Path, side: str, max_length: int, num_texts: int
) -> None:
    texts = [pair[:num_texts] for pair in PAIRS]
    tokenizer = _tokenizer(padding_side=side)
    part = _part(tmp_path / "rows.arrow", texts)
    tokens = CorpusTokens.open([part], tokenizer, max_length, tmp_path / "cache")
    for rows in ([0], [1, 0], [3, 2, 2, 6, 5, 4, 1]):
        found = tokens.collate(np.array(rows))
        assert _same(found, _expected(tokenizer, [texts[row] for row in rows], max_length))


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, 2 * len(PAIRS) - 1), min_size=1, max_size=9))
def test_batches_over_two_parts_are_those_of_the_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int]
) -> None:
    root = tmp_path_factory.getbasetemp() / "two-parts"
    texts = [*PAIRS, *((second, first) for first, second in PAIRS)]
    half = len(PAIRS)
    parts = [_part(root / "a.arrow", texts[:half], "a"), _part(root / "b.arrow", texts[half:], "b")]
    tokenizer = _tokenizer()
    tokens = CorpusTokens.open(parts, tokenizer, 16, root / "cache")
    assert _same(tokens.collate(np.array(rows)), _expected(tokenizer, [texts[row] for row in rows], 16))


def test_token_types_are_left_out_where_the_model_does_not_read_them(tmp_path: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    part = _part(tmp_path / "rows.arrow", PAIRS)
    found = CorpusTokens.open([part], tokenizer, 16, tmp_path / "cache").collate(np.array([0, 1]))
    assert set(found) == {"input_ids", "attention_mask"}


def test_a_second_opening_tokenises_nothing_and_its_maps_are_read_only(tmp_path: Path) -> None:
    part = _part(tmp_path / "rows.arrow", PAIRS)
    tokenizer = _tokenizer()
    first = CorpusTokens.open([part], tokenizer, 16, tmp_path / "cache").collate(np.arange(7))
    assert tokenizer.backend_tokenizer.truncation is not None, "the call left its state behind"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    again = CorpusTokens.open([part], tokenizer, 16, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert _same(again.collate(np.arange(7)), first)
    assert not again.parts[0].ids.flags.writeable


def test_another_length_or_tokenizer_is_another_entry(tmp_path: Path) -> None:
    part = _part(tmp_path / "rows.arrow", PAIRS)
    for tokenizer, length in (
        (_tokenizer(), 16),
        (_tokenizer(), 17),
        (BertTokenizer(vocab={piece: place for place, piece in enumerate([*PIECES, "new"])}), 16),
    ):
        CorpusTokens.open([part], tokenizer, length, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_tokenizers_key_does_not_change_when_it_is_used() -> None:
    tokenizer = _tokenizer()
    before = describe_tokenizer(tokenizer)
    tokenizer(["a b"], truncation=True, max_length=4, padding="max_length")
    assert describe_tokenizer(tokenizer) == before
    assert describe_tokenizer(_tokenizer(do_lower_case=False)) != before


@pytest.mark.parametrize("name", ["ids.npy", "offsets.npy", "firsts.npy", "tokens.json"])
def test_a_damaged_entry_is_noticed_and_made_again(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    part = _part(tmp_path / "rows.arrow", PAIRS)
    first = CorpusTokens.open([part], _tokenizer(), 16, tmp_path / "cache").collate(np.arange(7))
    path = next((tmp_path / "cache").glob(f"*/{name}"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = CorpusTokens.open([part], _tokenizer(), 16, tmp_path / "cache")
    assert "tokenising" in caplog.text
    assert _same(again.collate(np.arange(7)), first)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_racing_ranks_end_with_one_entry_and_the_same_tokens(tmp_path: Path) -> None:
    part = _part(tmp_path / "rows.arrow", PAIRS * 20)
    found: list[dict[str, torch.Tensor]] = []

    def open_tokens() -> None:
        tokens = CorpusTokens.open([part], _tokenizer(), 16, tmp_path / "cache")
        found.append(tokens.collate(np.arange(140)))

    threads = [threading.Thread(target=open_tokens) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(_same(batch, found[0]) for batch in found)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = _part(tmp_path / "rows.arrow", PAIRS)

    def fill_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.token_files.TokenFilesWriter.write", fill_disk)
    with pytest.raises(ResourceError, match="No space left"):
        CorpusTokens.open([part], _tokenizer(), 16, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_text_that_is_not_that_of_its_hash_is_refused(tmp_path: Path) -> None:
    made = make_part(tmp_path / "rows.arrow", PAIRS, [0] * 7, shard_rows=4)
    table = CorpusPart.open(made.source).table
    texts = table.column("text_1").to_pylist()
    texts[5] = "the module"
    edited = table.set_column(4, table.schema.field("text_1"), pa.array(texts, pa.large_string()))
    source = write_part(tmp_path / "edited.arrow", edited, shard_rows=4).source
    with pytest.raises(RefusedError, match="example train/5 is not that of its text hash"):
        CorpusTokens.open([CorpusPart.open(source)], _tokenizer(), 16, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_tokenizer_without_padding_or_with_other_segments_is_refused(tmp_path: Path) -> None:
    part = _part(tmp_path / "rows.arrow", PAIRS)
    bare = PreTrainedTokenizerFast(tokenizer_object=_tokenizer().backend_tokenizer)
    with pytest.raises(DataError, match="no padding token"):
        CorpusTokens.open([part], bare, 16, tmp_path / "cache")

    class Odd(BertTokenizer):
        def __call__(self, *args: Any, **options: Any) -> Any:
            encoded = super().__call__(*args, **options)
            encoded["token_type_ids"] = [[2, *types[1:]] for types in encoded["token_type_ids"]]
            return encoded

    odd = Odd(vocab={piece: place for place, piece in enumerate(PIECES)})
    with pytest.raises(DataError, match="segments"):
        CorpusTokens.open([part], odd, 16, tmp_path / "cache")
