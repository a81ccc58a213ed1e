"""The error that names shards that were given up."""

from __future__ import annotations

from pathlib import Path

from precompute.poison import describe_poison
from precompute.queue import PoisonShard
from schemas.errors import TeacherError
from tests.precompute.fake_workers import ROWS, make_jobs
from tests.precompute.tiny import make_rows, write_rows


def test_poison_shards_are_named_with_the_rows_that_are_known(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 3)
    lost = TeacherError("the actor was lost (killed)", teacher="t", shard=1)
    shards = [PoisonShard(jobs[2], 2, lost), PoisonShard(jobs[1], 2, lost)]
    # The corpus is not there: row numbers.
    error = describe_poison("t", shards)
    assert (error.shard, error.example_ids) == (1, (f"toy/plain/{ROWS}", f"toy/plain/{2 * ROWS - 1}"))
    expected = "given up after 2 tries: the actor was lost (killed); also given up: toy/plain shard 2"
    assert expected in str(error)
    write_rows(make_rows(3 * ROWS), Path(jobs[1].rows_path))
    assert describe_poison("t", shards).example_ids == (f"train/{ROWS}", f"train/{2 * ROWS - 1}")
    named = TeacherError("logits are not finite", teacher="t", shard=1, example_ids=["train/6"])
    assert describe_poison("t", [PoisonShard(jobs[1], 1, named)]).example_ids == ("train/6",)
