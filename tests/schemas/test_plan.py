from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from schemas import plan as plan_module
from schemas.errors import DataError
from schemas.plan import cut_rows, encode_plan, make_plan, parse_plan
from schemas.rows import corpus_schema, fingerprint_columns, hash_texts


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


def test_an_encoded_plan_is_read_back_the_same() -> None:
    plan = make_plan(corpus(["a", "b", "c"]), 2)
    again = parse_plan(encode_plan(plan), source="plan.arrow", expected_hash=plan.plan_hash)
    assert again.bounds == (0, 2, 3)
    assert again.example_ids(again.tasks()[1]) == ["p/2"]
    assert again.text_hashes(again.tasks()[0]) == [hash_texts(["a"]), hash_texts(["b"])]


def test_another_plan_is_refused() -> None:
    data = encode_plan(make_plan(corpus(["a", "b", "c"]), 2))
    with pytest.raises(DataError, match="plan hash"):
        parse_plan(data, source="plan.arrow", expected_hash="0" * 64)


def test_a_plan_whose_rows_were_swapped_has_another_hash() -> None:
    plan = make_plan(corpus(["a", "b", "c"]), 2)
    data = encode_plan(plan)
    first, second = hash_texts(["a"]), hash_texts(["b"])
    swapped = data.replace(first, b"#" * 16).replace(second, first).replace(b"#" * 16, second)
    assert swapped != data
    with pytest.raises(DataError):
        parse_plan(swapped, source="plan.arrow", expected_hash=plan.plan_hash)


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"x" * 500])
def test_bytes_that_are_no_plan_are_a_data_error(content: bytes) -> None:
    with pytest.raises(DataError, match=r"plan\.arrow: cannot be read as a plan"):
        parse_plan(content, source="plan.arrow")


ROWS = make_plan(corpus(["a", "b", "c"]), 2).rows


def refuse(data: bytes, match: str) -> None:
    with pytest.raises(DataError, match=f"^here: cannot be read as a plan .*{match}"):
        parse_plan(data, source="here")


def forge(
    rows: pa.Table = ROWS, *, codec: str | None = None, metadata: dict[str, str] | None = None, **header: Any
) -> bytes:
    """Returns the bytes of a plan with the right fingerprint and anything else as told."""
    fingerprint = fingerprint_columns(rows.column("example_id"), rows.column("text_hash"))
    honest = {"plan": 1, "bounds": [0, 2, 3], "fingerprint": fingerprint}
    table = rows.replace_schema_metadata(metadata or {"tmkd.plan": json.dumps({**honest, **header})})
    sink = pa.BufferOutputStream()
    writer = pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec))
    writer.write_table(table)
    writer.close()
    return bytes(sink.getvalue())


def replace(name: str, values: list[Any]) -> pa.Table:
    field = ROWS.schema.field(name)
    return ROWS.set_column(ROWS.schema.get_field_index(name), field, pa.array(values, field.type))


def test_a_plan_is_parsed_from_bytes_and_from_a_buffer() -> None:
    plan = make_plan(corpus(["a", "b", "c"]), 2)
    data = encode_plan(plan)
    assert data == forge()
    for given in (data, pa.py_buffer(data)):
        parsed = parse_plan(given, source="here", expected_hash=plan.plan_hash)
        assert parsed.rows.equals(plan.rows)
        assert parsed.bounds == plan.bounds
        assert parsed.plan_hash == plan.plan_hash


def test_a_plan_of_several_batches_is_parsed() -> None:
    pieces = pa.concat_tables([ROWS.slice(0, 1), ROWS.slice(1, 2)])
    assert parse_plan(forge(pieces), source="here").rows.equals(ROWS)


@pytest.mark.parametrize(
    "bounds",
    [
        [],
        [0],
        [0, 3, 2, 3],
        [0, 2, 2, 3],
        [1, 3],
        [0, 2],
        [0, 4],
        [-1, 0, 3],
        [0, 2**62, 3],
        [False, 3],
        [0, 3.0],
        ["0", "3"],
        [0, None],
        "03",
        3,
        None,
        {"0": 3},
    ],
)
def test_bounds_that_do_not_cover_the_rows_are_refused(bounds: Any) -> None:
    refuse(forge(bounds=bounds), "bounds")


@pytest.mark.parametrize("ordinals", [[0, 1, 1], [1, 2, 3], [0, 2, 1], [0, 1, 2**62], [-1, 0, 1]])
def test_ordinals_that_do_not_count_the_rows_are_refused(ordinals: list[int]) -> None:
    refuse(forge(replace("ordinal", ordinals)), "ordinals")


def test_an_example_id_that_is_there_twice_is_refused() -> None:
    refuse(forge(replace("example_id", ["p/0", "p/1", "p/0"])), "'p/0' is there twice")
    refuse(forge(replace("example_id", ["", "p/1", ""])), "'' is there twice")


def test_ids_whose_hashes_collide_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "hash", lambda _: 7, raising=False)
    assert parse_plan(forge(), source="here").num_rows == 3
    refuse(forge(replace("example_id", ["p/0", "p/1", "p/0"])), "twice")


def test_a_compressed_plan_is_refused() -> None:
    refuse(forge(codec="zstd"), "compressed")


def test_a_plan_with_nulls_or_other_columns_is_refused() -> None:
    refuse(forge(replace("example_id", ["a", None, "b"])), "nulls")
    refuse(forge(ROWS.append_column("n_tokens", pa.array([1, 2, 3]))), "4 columns, not 3")
    refuse(forge(ROWS.set_column(0, "ordinal", pa.array([0, 1, 2], pa.int32()))), "columns are not")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"plan": 2}, "plan version"),
        ({"plan": "1"}, "plan version"),
        ({"surplus": 1}, "other fields"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"fingerprint": None}, "fingerprint"),
    ],
)
def test_a_header_with_other_fields_is_refused(header: dict[str, Any], match: str) -> None:
    refuse(forge(**header), match)


@pytest.mark.parametrize(
    "header", ["", "{}", "[]", "null", "[" * 100_000, '{"plan": 1, "plan": 1}', '{"bounds": [1e999]}']
)
def test_a_header_that_is_no_strict_json_is_refused(header: str) -> None:
    refuse(forge(metadata={"tmkd.plan": header}), "metadata")


def test_other_metadata_than_the_header_is_refused() -> None:
    refuse(forge(metadata={"other": "{}"}), "metadata")


def test_a_changed_row_is_noticed_without_knowing_the_plan_hash() -> None:
    data = encode_plan(make_plan(corpus(["a", "b", "c"]), 2))
    changed = data.replace(b"p/1", b"p/7")
    assert changed != data
    refuse(changed, "fingerprint")
