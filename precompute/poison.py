"""The error that names shards that were given up, and their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from precompute.queue import PoisonShard
from precompute.tasks import ShardJob
from schemas.errors import DataError, TeacherError
from schemas.rows import open_rows


def describe_poison(teacher: str, poison: Sequence[PoisonShard]) -> TeacherError:
    """Describes quarantined shards.

    Args:
        teacher: Name of the teacher.
        poison: At least one; the first is told in full.

    Returns:
        An error with the shard, and the rows that its last error blamed or else its first and last.
    """
    first = min(poison, key=lambda shard: (shard.job.store_root, shard.job.task.shard))
    shard = first.job.task.shard
    ids = first.error.example_ids or _first_and_last(first.job)
    reason = first.error.message.removeprefix(f"teacher {teacher}, shard {shard}: ")
    others = sorted(f"{item.job.part} shard {item.job.task.shard}" for item in poison if item is not first)
    more = f"; also given up: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else ""
    named = f"{', '.join(ids[:5])}" if first.error.example_ids else " to ".join(ids)
    return TeacherError(
        f"{first.job.part} rows {named} given up after {first.num_tries} tries: {reason}{more}; "
        "everything else is committed, and the same command tries these again",
        teacher=teacher,
        shard=shard,
        example_ids=ids,
    )


def _first_and_last(job: ShardJob) -> tuple[str, ...]:
    try:
        ids = open_rows(Path(job.rows_path)).column("example_id")
        return (ids[job.task.start].as_py(), ids[job.task.stop - 1].as_py())
    except (DataError, IndexError, KeyError):
        # The corpus may be what is wrong; the rows' numbers are known in any case.
        return (f"{job.part}/{job.task.start}", f"{job.part}/{job.task.stop - 1}")
