"""Documents from files with columns, plain text and docstrings."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from precompute.documents import materialise_documents
from precompute.pydocqa import build_documents
from schemas.errors import CorpusError
from schemas.rows import open_rows
from schemas.text_corpus import TextCorpus
from tests.precompute.tiny_language import make_corpus, write_corpus

WIKI = " \n = One = \n \n First text . \n == Part == \n more . \n = Two = \n \n Second . \n"


def documents(corpus: TextCorpus, out: Path) -> dict[str, str]:
    found = {}
    for part in materialise_documents("toy", corpus, data_root=None, out=out):
        rows = open_rows(part.rows_path)
        found.update(
            zip(rows.column("example_id").to_pylist(), rows.column("text_0").to_pylist(), strict=True)
        )
    return found


def text_corpus(path: Path, split: str, **fields: Any) -> TextCorpus:
    parts = [{"kind": "text", "path": str(path), "split": split, "name": "p", **fields}]
    return TextCorpus.model_validate({"parts": parts})


def test_empty_documents_are_left_out_and_named(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": ""}, {"text": None}, {"text": " \n"}, {"text": "b"}]
    corpus = make_corpus(write_corpus(tmp_path / "a.jsonl", rows))
    (part,) = materialise_documents("toy", corpus, data_root=None, out=tmp_path)
    assert documents(corpus, tmp_path) == {"train/0": "a", "train/4": "b"}
    assert [example_id for example_id, _ in part.excluded] == ["train/1", "train/2", "train/3"]


@pytest.mark.parametrize(
    ("split", "text", "expected"),
    [
        ("whole", "a\n\nb\n", ["a\n\nb\n"]),
        ("line", "a\n\n b \nc", ["a", " b ", "c"]),
        ("paragraph", "a\nb\n \nc\n\n\nd\n", ["a\nb", "c", "\nd\n"]),
        (
            "heading",
            WIKI,
            [" = One = \n \n First text . \n == Part == \n more . \n", " = Two = \n \n Second . \n"],
        ),
    ],
)
def test_plain_text_is_cut_as_the_part_says(
    tmp_path: Path, split: str, text: str, expected: list[str]
) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert list(documents(text_corpus(path, split), tmp_path).values()) == expected


def test_ids_may_come_from_a_column_and_must_be_unique(tmp_path: Path) -> None:
    rows = [{"text": "a", "key": "x"}, {"text": "b", "key": "y"}]
    corpus = make_corpus(write_corpus(tmp_path / "a.jsonl", rows), id="key")
    assert documents(corpus, tmp_path) == {"train/x": "a", "train/y": "b"}
    corpus = make_corpus(write_corpus(tmp_path / "b.jsonl", [*rows, rows[0]]), id="key")
    with pytest.raises(CorpusError, match="document id 'train/x' is there twice"):
        documents(corpus, tmp_path)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"other": "a"}], {}, "has no column text; its columns are other"),
        ([{"text": 3}], {}, "row 0: expected text, got int"),
        ([{"text": ""}], {}, "has no document that is not empty"),
        ([{"chat": [{"role": "user"}]}], {"messages": "chat"}, "row 0: expected a list of messages"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_names_the_part(
    tmp_path: Path, rows: list[dict[str, Any]], fields: dict[str, str], message: str
) -> None:
    corpus = make_corpus(write_corpus(tmp_path / "a.jsonl", rows), **fields)
    with pytest.raises(CorpusError, match=f"corpus toy/train: {message}"):
        documents(corpus, tmp_path)


def test_a_text_file_that_is_missing_or_not_utf_8_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="there is no file"):
        documents(text_corpus(tmp_path / "none.txt", "whole"), tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CorpusError, match="cannot be read as UTF-8"):
        documents(text_corpus(tmp_path / "latin.txt", "whole"), tmp_path)


def test_a_limit_takes_the_first_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc\n")
    corpus = text_corpus(tmp_path / "a.txt", "line", limit=2)
    assert list(documents(corpus, tmp_path).values()) == ["a", "b"]


def test_docstrings_of_one_package_lie_in_one_split(tmp_path: Path) -> None:
    for module in range(40):
        text = f'"""Module {module}."""\ndef run():\n    """Runs module {module}."""\n'
        (tmp_path / f"mod{module}.py").write_text(text)
    splits = {split: dict(build_documents(split, stdlib_dir=tmp_path)) for split in ("train", "validation")}
    assert splits["train"]
    assert not {name.split(".")[0] for name in splits["train"]} & {
        name.split(".")[0] for name in splits["validation"]
    }
    assert all(text.endswith("\n") and name in text for name, text in splits["train"].items())
