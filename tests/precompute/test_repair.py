"""What a repair has to number; mending itself is tested from the command on (tests/cluster)."""

from __future__ import annotations

from precompute.repair import next_revisions


def test_a_shard_gets_the_revision_after_its_highest_and_a_new_one_gets_the_first() -> None:
    assert next_revisions({0: (0,), 1: (0, 1, 4)}, (1, 2, 0)) == {1: 5, 2: 0, 0: 1}
