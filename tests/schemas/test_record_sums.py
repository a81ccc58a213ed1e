from typing import Any

import pytest

from schemas.record_sums import find_contradiction
from schemas.records import CommitRecord

HASH = "0" * 64


def make_region(offset: int, length: int, rows: int = 0) -> dict[str, Any]:
    return {"offset": offset, "length": length, "rows": rows, "xxh3": "0" * 16}


def exclude(*ordinals: int) -> list[dict[str, Any]]:
    return [{"ordinal": ordinal, "example_id": "a", "reason": "r"} for ordinal in ordinals]


def make_record(**changes: Any) -> CommitRecord:
    """A shard of rows 10 to 15, of which 12 is excluded, in batches of 3 and 1 rows."""
    fields: dict[str, Any] = {
        "plan_hash": HASH,
        "generation_hash": HASH,
        "shard": 1,
        "revision": 0,
        "file": "s000001-ab.arrow",
        "start": 10,
        "stop": 15,
        "num_rows": 4,
        "num_bytes": 80,
        "sha256": HASH,
        "ids_hash": HASH,
        "head": make_region(0, 16),
        "batches": [make_region(16, 30, 3), make_region(46, 20, 1)],
        "tail": make_region(66, 14),
        "excluded": exclude(12),
    }
    return CommitRecord.model_validate(fields | changes)


def test_a_record_of_a_whole_shard_adds_up() -> None:
    assert find_contradiction(make_record(), "classification") is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tail": make_region(67, 13)}, "leaves a gap before byte 67"),
        ({"tail": make_region(60, 20)}, "leaves a gap before byte 60"),
        ({"num_bytes": 81}, "covers 80 bytes of 81"),
        ({"batches": [make_region(16, 0, 3), make_region(16, 50, 1)]}, "a batch of 0 bytes for 3 rows"),
        ({"num_rows": 5}, "has 4 rows in its batches"),
        ({"excluded": ()}, "has 4 rows in its batches"),
        ({"excluded": exclude(12, 12), "stop": 16}, "excludes a row twice"),
        ({"excluded": exclude(15)}, "excludes a row of another shard"),
        ({"excluded": exclude(9)}, "excludes a row of another shard"),
    ],
    ids=str,
)
def test_a_record_that_contradicts_itself_is_told(changes: dict[str, Any], told: str) -> None:
    assert told in (find_contradiction(make_record(**changes), "classification") or "")


def test_a_batch_has_64_kib_for_each_row_and_twice_as_much_for_its_message() -> None:
    most = (3 + 2) * 65536
    for length, told in ((most, None), (most + 1, f"has a batch of {most + 1} bytes for 3 rows")):
        end = 16 + length
        record = make_record(
            batches=[make_region(16, length, 3), make_region(end, 20, 1)],
            tail=make_region(end + 20, 14),
            num_bytes=end + 34,
        )
        assert find_contradiction(record, "classification") == told


def test_a_tail_of_more_than_64_mib_is_none() -> None:
    most = 64 * 2**20
    for length, told in ((most, None), (most + 1, f"has a head or tail of {most + 1} bytes")):
        assert (
            find_contradiction(
                make_record(tail=make_region(66, length), num_bytes=66 + length), "classification"
            )
            == told
        )
