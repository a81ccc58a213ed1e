"""Which rows of its source a part uses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from precompute.corpus import materialise_corpus
from precompute.row_choice import choose_rows, describe_cut
from schemas.corpus import Corpus, FilePart, Fold
from schemas.rows import open_rows


def part(**fields: object) -> FilePart:
    return FilePart.model_validate({"kind": "file", "path": "rows.jsonl", "name": "rows", **fields})


def test_skip_comes_before_limit_and_limit_before_the_folds() -> None:
    assert choose_rows(10, part()).tolist() == list(range(10))
    assert choose_rows(10, part(skip=3, limit=4)).tolist() == [3, 4, 5, 6]
    assert choose_rows(5, part(skip=3, limit=4)).tolist() == [3, 4]
    assert choose_rows(5, part(skip=7)).tolist() == []
    folded = choose_rows(100, part(skip=10, limit=20, fold={"of": 4, "take": "held_out"}))
    assert len(folded) == 5
    assert set(folded.tolist()) <= set(range(10, 30))


def test_the_folds_hold_every_row_once_and_the_rest_is_what_they_leave() -> None:
    held_out = [
        choose_rows(23, part(fold={"of": 5, "index": index, "take": "held_out"})) for index in range(5)
    ]
    assert sorted(np.concatenate(held_out).tolist()) == list(range(23))
    assert sorted(len(rows) for rows in held_out) == [4, 4, 5, 5, 5]
    for index, rows in enumerate(held_out):
        rest = choose_rows(23, part(fold={"of": 5, "index": index, "take": "rest"}))
        assert sorted([*rest.tolist(), *rows.tolist()]) == list(range(23))


def test_the_cut_into_folds_is_the_same_for_ever() -> None:
    # Worked out once; another cut would let a teacher of an older run see its held-out rows.
    rows = choose_rows(12, part(fold={"of": 3, "index": 1, "take": "held_out", "seed": 17}))
    assert rows.tolist() == [0, 1, 3, 7]


def test_a_fold_beyond_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match="there are folds 0 to 4, got 5"):
        Fold(of=5, index=5, take="rest")


def test_a_limit_alone_is_described_as_before_there_were_folds() -> None:
    assert describe_cut(part()) is None
    assert describe_cut(part(limit=7)) == 7
    assert describe_cut(part(skip=1)) == {"skip": 1, "limit": None, "fold": None}


def test_rows_keep_their_numbers_in_the_source_as_ids(tmp_path: Path) -> None:
    lines = [{"text": f"text {row}", "label": row % 2} for row in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read(**fields: object) -> tuple[list[str], list[str], list[int]]:
        corpus = Corpus(labels=("a", "b"), text=("text",), parts=(part(**fields),))
        (found,) = materialise_corpus("c", corpus, data_root=str(tmp_path), out=tmp_path / "out")
        rows = open_rows(found.rows_path)
        return tuple(rows.column(name).to_pylist() for name in ("example_id", "text_0", "label"))

    assert read(skip=6) == (["rows/6", "rows/7"], ["text 6", "text 7"], [0, 1])
    ids, texts, labels = read(fold={"of": 2, "take": "rest"})
    other_ids, _, _ = read(fold={"of": 2, "take": "held_out"})
    assert sorted([*ids, *other_ids]) == [f"rows/{row}" for row in range(8)]
    assert [text.removeprefix("text ") for text in texts] == [name.removeprefix("rows/") for name in ids]
    assert labels == [int(name.removeprefix("rows/")) % 2 for name in ids]
