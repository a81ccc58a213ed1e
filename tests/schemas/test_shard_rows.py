"""What a shard file must hold."""

from __future__ import annotations

import pyarrow as pa
import pytest

from schemas.plan import Plan, make_plan
from schemas.records import ExcludedRow
from schemas.shard_rows import ShardRowsError, check_rows, select_rows
from tests.store_factory import make_table


@pytest.fixture
def plan() -> Plan:
    return make_plan(make_table([(f"text {row}",) for row in range(10)], [0] * 10), 5)


def excluded(ordinal: int, example_id: str | None = None) -> ExcludedRow:
    return ExcludedRow(ordinal=ordinal, example_id=example_id or f"train/{ordinal}", reason="nan")


def as_found(rows: pa.Table, logits: list[float] | None = None) -> pa.Table:
    values = pa.array(logits or [0.5] * (2 * rows.num_rows), pa.float32())
    return rows.append_column("logits", pa.FixedSizeListArray.from_arrays(values, 2))


def test_a_shard_holds_its_rows_without_the_excluded_ones(plan: Plan) -> None:
    rows = select_rows(plan, 5, 10, [excluded(8), excluded(6)])
    assert rows.column("ordinal").to_pylist() == [5, 7, 9]
    check_rows(as_found(rows), rows)
    check_rows(as_found(rows.slice(1, 2)), rows.slice(1, 2))
    check_rows(as_found(rows.slice(0, 0), []), rows.slice(0, 0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([excluded(4)], "lie outside the shard"),
        ([excluded(6), excluded(6)], "listed twice"),
        ([excluded(6, "train/7")], "excluded row 6 is train/6 in the plan, not train/7"),
    ],
)
def test_excluded_rows_are_rows_of_the_shard(plan: Plan, rows: list[ExcludedRow], message: str) -> None:
    with pytest.raises(ShardRowsError, match=message) as caught:
        select_rows(plan, 5, 10, rows)
    assert caught.value.fault == "excluded rows"


def test_the_first_row_that_differs_is_named(plan: Plan) -> None:
    expected = select_rows(plan, 0, 5, [])
    swapped = expected.column("text_hash").to_pylist()
    swapped[2:4] = reversed(swapped[2:4])
    found = as_found(expected).set_column(2, "text_hash", pa.array(swapped, pa.binary(16)))
    with pytest.raises(ShardRowsError, match="text_hash differs from the plan, first at train/2"):
        check_rows(found, expected)
    with pytest.raises(ShardRowsError, match="logits are not all finite, first at train/3") as caught:
        check_rows(as_found(expected, [0.0] * 7 + [float("nan")] + [0.0] * 2), expected)
    assert caught.value.fault == "not finite"
    with pytest.raises(ShardRowsError, match=r"rows are not those of the plan \(4, expected 5\)"):
        check_rows(as_found(expected.slice(0, 4)), expected)
