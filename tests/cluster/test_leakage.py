from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.leakage import find_shared_rows, write_rows
from precompute.corpus import materialise_corpus
from schemas.recipe import Corpus
from schemas.rows import corpus_schema, hash_texts, open_rows


def table(rows: list[tuple[str, str, int]]) -> pa.Table:
    columns = {
        "ordinal": list(range(len(rows))),
        "example_id": [f"r/{i}" for i in range(len(rows))],
        "text_hash": [hash_texts(row[:2]) for row in rows],
        "text_0": [row[0] for row in rows],
        "text_1": [row[1] for row in rows],
        "label": [row[2] for row in rows],
    }
    return pa.table(columns, schema=corpus_schema(2))


def test_unlabelled_rows_that_share_any_text_are_found_over_all_parts() -> None:
    parts = [
        table([("q1", "other", -1), ("q9", "p9", -1), ("q1", "x", 0)]),
        table([("a", "p2", -1), ("p1", "b", -1), ("c", "d", -1)]),
    ]
    evaluation = [table([("q1", "p1", 0)]), table([("q2", "p2", 1)])]
    # Row 2 is labelled; row 4 shares a text across columns.
    assert find_shared_rows(parts, evaluation).tolist() == [0, 3, 4]


def test_nothing_is_dropped_without_an_evaluation_corpus() -> None:
    assert find_shared_rows([table([("a", "b", -1)])], []).tolist() == []


def test_the_file_is_named_by_its_content(tmp_path: Path) -> None:
    first = write_rows(np.array([1, 2]), tmp_path)
    again = write_rows(np.array([1, 2]), tmp_path)
    other = write_rows(np.array([1, 3]), tmp_path)
    assert first == again != other
    assert np.load(first).tolist() == [1, 2]


def test_a_retrieved_pair_whose_passage_is_evaluated_is_found(tmp_path: Path) -> None:
    rows = [("red fox", "owl"), ("wolf", "a fox"), ("log", "red fox den")]
    write = {"train": rows, "dev": [("another question", "a fox")]}
    for name, pairs in write.items():
        lines = [json.dumps({"q": question, "p": passage, "label": 0}) for question, passage in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    source = {"kind": "file", "path": "train.jsonl"}
    tables = {}
    for name, part in {
        "raw": {"kind": "retrieved", "source": source, "top": 2},
        "dev": {"kind": "file", "path": "dev.jsonl"},
    }.items():
        corpus = Corpus.model_validate({"labels": ["a", "b"], "text": ["q", "p"], "parts": [part]})
        [found] = materialise_corpus(name, corpus, data_root=str(tmp_path), out=tmp_path)
        tables[name] = open_rows(found.rows_path)
    assert tables["raw"]["example_id"].to_pylist() == ["retrieved/0-2", "retrieved/0-1"]
    # The question is not evaluated, and neither is the pair of row 2.
    assert find_shared_rows([tables["raw"]], [tables["dev"]]).tolist() == [1]
