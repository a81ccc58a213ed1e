from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from schemas.errors import DataError
from schemas.plan import cut_rows, make_plan, read_plan, write_plan
from schemas.rows import corpus_schema, hash_texts


def corpus(texts: list[str]) -> pa.Table:
    columns = {
        "ordinal": range(len(texts)),
        "example_id": [f"p/{i}" for i in range(len(texts))],
        "text_hash": [hash_texts([text]) for text in texts],
        "text_0": texts,
        "label": [0] * len(texts),
    }
    return pa.table({name: list(values) for name, values in columns.items()}, schema=corpus_schema(1))


@pytest.mark.parametrize(
    ("num_rows", "bounds"), [(1, (0, 1)), (3, (0, 3)), (4, (0, 3, 4)), (6, (0, 3, 6)), (7, (0, 3, 6, 7))]
)
def test_the_cut_covers_all_rows_once(num_rows: int, bounds: tuple[int, ...]) -> None:
    assert cut_rows(num_rows, 3) == bounds


def test_the_plan_hash_covers_rows_and_cut() -> None:
    texts = ["a", "b", "c"]
    hashes = {
        make_plan(corpus(texts), 2).plan_hash,
        make_plan(corpus(texts), 3).plan_hash,
        make_plan(corpus(["a", "b", "d"]), 2).plan_hash,
        make_plan(corpus(["b", "a", "c"]), 2).plan_hash,
    }
    assert len(hashes) == 4
    assert make_plan(corpus(texts), 2).plan_hash in hashes


def test_a_written_plan_is_read_back_the_same(tmp_path: Path) -> None:
    plan = make_plan(corpus(["a", "b", "c"]), 2)
    write_plan(plan, tmp_path / "plan.arrow")
    again = read_plan(tmp_path / "plan.arrow", expected_hash=plan.plan_hash)
    assert again.bounds == (0, 2, 3)
    assert again.example_ids(again.tasks()[1]) == ["p/2"]
    assert again.text_hashes(again.tasks()[0]) == [hash_texts(["a"]), hash_texts(["b"])]


def test_another_plan_is_refused(tmp_path: Path) -> None:
    write_plan(make_plan(corpus(["a", "b", "c"]), 2), tmp_path / "plan.arrow")
    with pytest.raises(DataError, match="plan hash"):
        read_plan(tmp_path / "plan.arrow", expected_hash="0" * 64)


def test_a_plan_whose_rows_were_swapped_has_another_hash(tmp_path: Path) -> None:
    path = tmp_path / "plan.arrow"
    plan = make_plan(corpus(["a", "b", "c"]), 2)
    write_plan(plan, path)
    data = path.read_bytes()
    first, second = hash_texts(["a"]), hash_texts(["b"])
    swapped = data.replace(first, b"#" * 16).replace(second, first).replace(b"#" * 16, second)
    assert swapped != data
    path.write_bytes(swapped)
    with pytest.raises(DataError):
        read_plan(path, expected_hash=plan.plan_hash)


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"x" * 500])
def test_a_file_that_is_no_plan_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.arrow").write_bytes(content)
    with pytest.raises(DataError):
        read_plan(tmp_path / "plan.arrow")
