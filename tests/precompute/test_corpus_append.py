"""A source that grows: what was paid for keeps its part."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from precompute.corpus import MaterialisedPart, materialise_corpus
from schemas.recipe import Corpus
from schemas.rows import open_rows


def read_texts(
    tmp_path: Path, texts: list[str | None], *, labels: list[int] | None = None, limit: int | None = None
) -> tuple[MaterialisedPart, ...]:
    rows = [{"text": text, "label": labels[i] if labels else 0} for i, text in enumerate(texts)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus.model_validate(
        {
            "labels": ["a", "b"],
            "text": ["text"],
            "on_bad_row": "exclude",
            "parts": [{"kind": "file", "name": "train", "path": str(path), "limit": limit}],
        }
    )
    return materialise_corpus("toy", corpus, data_root=None, out=tmp_path)


def names_and_sizes(parts: tuple[MaterialisedPart, ...]) -> list[tuple[str, int]]:
    return [(part.part, part.num_rows) for part in parts]


def ids(parts: tuple[MaterialisedPart, ...]) -> list[str]:
    return pa.concat_tables([open_rows(part.rows_path) for part in parts])["example_id"].to_pylist()


def test_appended_rows_become_parts_of_their_own_with_ids_that_go_on(tmp_path: Path) -> None:
    [first] = read_texts(tmp_path, ["a", "b"])
    second = read_texts(tmp_path, ["a", "b", "c"])
    assert names_and_sizes(second) == [("train", 2), ("train+1", 1)]
    assert second[0] == first
    third = read_texts(tmp_path, ["a", "b", "c", "d", "e"])
    assert names_and_sizes(third) == [("train", 2), ("train+1", 1), ("train+2", 2)]
    assert third[:2] == second
    assert ids(third) == [f"train/{i}" for i in range(5)]
    assert open_rows(third[2].rows_path)["ordinal"].to_pylist() == [0, 1]
    assert read_texts(tmp_path, ["a", "b", "c", "d", "e"]) == third


def test_a_source_that_was_changed_is_a_new_part(tmp_path: Path) -> None:
    [first] = read_texts(tmp_path, ["a", "b"])
    [second] = read_texts(tmp_path, ["a", "B", "c"])
    assert names_and_sizes((second,)) == [("train", 3)]
    assert second.fingerprint != first.fingerprint


def test_a_source_that_was_cut_is_a_new_part(tmp_path: Path) -> None:
    read_texts(tmp_path, ["a", "b", "c"])
    assert names_and_sizes(read_texts(tmp_path, ["a", "b"])) == [("train", 2)]


def test_the_whole_source_is_preferred_over_a_prefix(tmp_path: Path) -> None:
    [whole] = read_texts(tmp_path, ["a", "b", "c"])
    read_texts(tmp_path, ["a", "b"])
    assert read_texts(tmp_path, ["a", "b", "c"]) == (whole,)


def test_a_limit_makes_no_prefix(tmp_path: Path) -> None:
    read_texts(tmp_path, ["a", "b", "c"], limit=2)
    assert names_and_sizes(read_texts(tmp_path, ["a", "b", "c"])) == [("train", 3)]


def test_relabelled_rows_keep_the_cut(tmp_path: Path) -> None:
    [first] = read_texts(tmp_path, ["a", "b"])
    parts = read_texts(tmp_path, ["a", "b", "c"], labels=[1, 1, 1])
    assert names_and_sizes(parts) == [("train", 2), ("train+1", 1)]
    assert parts[0].fingerprint == first.fingerprint
    assert open_rows(parts[0].rows_path)["label"].to_pylist() == [1, 1]


def test_excluded_rows_are_listed_with_the_part_that_they_lie_in(tmp_path: Path) -> None:
    read_texts(tmp_path, ["a", None, "b", None])
    parts = read_texts(tmp_path, ["a", None, "b", None, "c", None])
    assert names_and_sizes(parts) == [("train", 2), ("train+1", 1)]
    assert [[row[0] for row in part.excluded] for part in parts] == [["train/1", "train/3"], ["train/5"]]


def test_a_damaged_description_is_not_believed(tmp_path: Path) -> None:
    [first] = read_texts(tmp_path, ["a", "b"])
    meta = first.rows_path.with_name("meta.json")
    meta.write_text(meta.read_text().replace('"num_rows": 2', '"num_rows": 1'))
    assert names_and_sizes(read_texts(tmp_path, ["a", "b", "c"])) == [("train", 3)]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_growing_source_gives_the_same_ids_as_a_whole_one(num_rows: int, tmp_path: Path) -> None:
    texts: list[str | None] = list("abcdef")
    (tmp_path / "grown").mkdir()
    (tmp_path / "whole").mkdir()
    for stop in range(num_rows, 7, num_rows):
        grown = read_texts(tmp_path / "grown", texts[:stop])
    assert ids(grown) == ids(read_texts(tmp_path / "whole", texts))
