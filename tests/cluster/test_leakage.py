from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.leakage import find_shared_rows, write_rows
from schemas.rows import corpus_schema, hash_texts


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
