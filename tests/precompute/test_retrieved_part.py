"""A corpus part of retrieved pairs: its rows, ids, fingerprint, and what is dropped of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import precompute.corpus
from precompute.corpus import MaterialisedPart, materialise_corpus
from precompute.pydocqa import Pair
from schemas.errors import CorpusError, ResourceError
from schemas.recipe import Corpus
from schemas.rows import hash_texts, open_rows

ROWS = [
    {"question": "red fox?", "sentence": "a red fox sleeps", "label": 0},
    {"question": "grey wolf?", "sentence": "the grey wolf", "label": 1},
    {"question": "red fox?", "sentence": "the fox and the wolf", "label": 1},
    {"question": "wolf or fox?", "sentence": "red wolf, red fox, red owl", "label": 0},
]


def make_retrieved(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> Corpus:
    source = {"kind": "file", "path": str(tmp_path / "rows.jsonl"), **fields.pop("source", {})}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "labels": ["entailment", "not_entailment"],
        "text": fields.pop("text", ["question", "sentence"]),
        "on_bad_row": fields.pop("on_bad_row", "fail"),
        "id": fields.pop("id", None),
        "parts": [{"kind": "retrieved", "source": source, "top": 2, **fields}],
    }
    return Corpus.model_validate(document)


def materialise(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> tuple[MaterialisedPart, ...]:
    return materialise_corpus(
        "qnli", make_retrieved(tmp_path, rows, **fields), data_root=None, out=tmp_path / "out"
    )


def ids(part: MaterialisedPart) -> list[str]:
    return list(open_rows(part.rows_path)["example_id"].to_pylist())


def test_retrieved_pairs_are_unlabelled_rows_named_by_the_rows_of_their_texts(tmp_path: Path) -> None:
    [part] = materialise(tmp_path, ROWS)
    table = open_rows(part.rows_path)
    assert (part.part, part.num_labelled, part.excluded) == ("retrieved", 0, ())
    # Both passages of question 0 are left out, and row 1's shares no word with it.
    names = ["0-3", "1-2", "1-3", "3-2", "3-1"]
    assert ids(part) == [f"retrieved/{name}" for name in names]
    for row in table.to_pylist():
        question, passage = (int(n) for n in row["example_id"].removeprefix("retrieved/").split("-"))
        assert (row["text_0"], row["text_1"]) == (ROWS[question]["question"], ROWS[passage]["sentence"])
        assert row["text_hash"] == hash_texts((row["text_0"], row["text_1"]))
        assert row["label"] == -1
        assert not any(
            (row["text_0"], row["text_1"]) == (known["question"], known["sentence"]) for known in ROWS
        )


def test_ids_name_rows_of_the_whole_source_whatever_is_used_of_it(tmp_path: Path) -> None:
    rows = [
        {"q": "skipped", "s": "skipped wolf"},
        {"q": None, "s": "fox"},
        *_spelt(ROWS),
        {"q": "x1", "s": "fox"},
    ]
    source = {"skip": 1, "limit": 5, "text": ["q", "s"], "unlabelled": True}
    [part] = materialise(tmp_path, rows, source=source, on_bad_row="exclude", name="more")
    assert ids(part) == ["more/2-5", "more/3-4", "more/3-5", "more/5-4", "more/5-3"]


def test_an_id_column_names_no_pair(tmp_path: Path) -> None:
    rows = [row | {"key": f"k{i}"} for i, row in enumerate(ROWS)]
    [part] = materialise(tmp_path, rows, id="key")
    assert ids(part)[0] == "retrieved/0-3"


def test_the_parts_own_cut_applies_to_its_pairs(tmp_path: Path) -> None:
    [part] = materialise(tmp_path, ROWS, skip=1, limit=2)
    assert ids(part) == ["retrieved/1-2", "retrieved/1-3"]
    fold = {"of": 2, "take": "rest"}
    [rest] = materialise(tmp_path, ROWS, fold=fold)
    [held_out] = materialise(tmp_path, ROWS, fold=fold | {"take": "held_out"})
    assert len(ids(rest)) + len(ids(held_out)) == len({*ids(rest), *ids(held_out)}) == 5


def test_a_second_reading_writes_nothing(tmp_path: Path) -> None:
    [first] = materialise(tmp_path, ROWS)
    before = first.rows_path.stat()
    assert materialise(tmp_path, ROWS) == (first,)
    assert first.rows_path.stat().st_ino == before.st_ino


def test_another_top_or_source_gives_another_fingerprint(tmp_path: Path) -> None:
    parts = [
        *materialise(tmp_path, ROWS),
        *materialise(tmp_path, ROWS, top=1),
        *materialise(tmp_path, ROWS, source={"limit": 3}),
        *materialise(tmp_path, [*ROWS[:3], ROWS[3] | {"sentence": "red wolf, red fox, grey owl"}]),
    ]
    assert len({part.fingerprint for part in parts}) == len(parts) == 4


def test_pairs_of_a_smaller_top_are_no_prefix_of_those_of_a_larger_one(tmp_path: Path) -> None:
    rows = [
        {"question": "fox", "sentence": "owl"},
        *({"question": "", "sentence": f"fox {n}"} for n in "abc"),
    ]
    [first] = materialise(tmp_path, rows, top=1)
    [second] = materialise(tmp_path, rows, top=2)
    assert (ids(first), ids(second)) == (["retrieved/0-1"], ["retrieved/0-1", "retrieved/0-2"])


def test_a_source_that_grew_is_another_part_where_it_changes_what_was_found(tmp_path: Path) -> None:
    [first] = materialise(tmp_path, ROWS)
    better = {"question": "owl", "sentence": "red fox", "label": 0}
    [second] = materialise(tmp_path, [*ROWS, better])
    assert second.part == first.part == "retrieved"
    assert second.fingerprint != first.fingerprint
    assert ids(second)[0] == "retrieved/0-4"
    assert materialise(tmp_path, ROWS) == (first,)


def test_a_source_that_grew_keeps_pairs_that_were_paid_for_where_they_come_first_again(
    tmp_path: Path,
) -> None:
    [first] = materialise(tmp_path, ROWS)
    # Words of its own: the ranking of the old questions stays, the new one's pairs follow.
    new = [
        {"question": "big owls", "sentence": "owls fly", "label": 0},
        {"question": "moon", "sentence": "big moon"},
    ]
    again, suffix = materialise(tmp_path, [*ROWS, *new])
    assert again == first
    assert (suffix.part, ids(suffix)) == ("retrieved+1", ["retrieved/4-5"])


def test_a_part_beside_its_source_shares_no_id_with_it(tmp_path: Path) -> None:
    corpus = make_retrieved(tmp_path, ROWS)
    document = corpus.model_dump(mode="json")
    document["parts"].insert(0, document["parts"][0]["source"] | {"name": "train"})
    parts = materialise_corpus("c", Corpus.model_validate(document), data_root=None, out=tmp_path / "out")
    assert [(part.part, part.num_rows, part.num_labelled) for part in parts] == [
        ("train", 4, 4),
        ("retrieved", 5, 0),
    ]


def test_a_built_in_source_is_read_as_its_own_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(split: str, *, passages_per_question: int) -> list[Pair]:
        return [Pair(f"{split}/os/{i}", row["question"], row["sentence"], 0) for i, row in enumerate(ROWS)]

    monkeypatch.setattr(precompute.corpus, "build_pairs", build)
    part = {"kind": "retrieved", "top": 1, "source": {"kind": "pydocqa", "split": "train"}}
    corpus = Corpus.model_validate({"labels": ["a", "b"], "text": ["question", "passage"], "parts": [part]})
    [found] = materialise_corpus("c", corpus, data_root=None, out=tmp_path)
    assert ids(found) == ["retrieved/0-3", "retrieved/1-2", "retrieved/3-2"]


def test_a_null_text_of_the_source_is_named(tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "owl", "sentence": None, "label": 0}]
    with pytest.raises(CorpusError, match="qnli/retrieved: row retrieved/4: text column sentence is null"):
        materialise(tmp_path, rows)


def test_a_source_in_which_nothing_is_found_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="qnli/retrieved: no question shares a word with a passage that"):
        materialise(tmp_path, ROWS[:1])


def test_the_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ResourceError, match=r"pip install '\.\[retrieval\]'$") as caught:
        materialise(tmp_path, ROWS)
    assert caught.value.exit_code == 6
    assert not list((tmp_path / "out" / "corpora").iterdir())


def _spelt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"q": row["question"], "s": row["sentence"]} for row in rows]
