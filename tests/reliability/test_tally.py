"""The counts behind ``docs/reliability.md``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.reliability.conftest import TALLY_VARIABLE, Count, Tally


def test_a_count_is_kept_and_appended_to_the_file_that_the_environment_names(
    tally: Tally, counts: list[Count], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(counts)
    path = tmp_path / "tally.jsonl"
    monkeypatch.setenv(TALLY_VARIABLE, str(path))
    tally("tally", "itself", 3, 2)
    tally("tally", "itself", 1, 1, seconds=2.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"area": "tally", "case": "itself", "tried": 3, "survived": 2, "seconds": 0.0},
        {"area": "tally", "case": "itself", "tried": 1, "survived": 1, "seconds": 2.5},
    ]
    assert counts[before:] == [Count("tally", "itself", 3, 2), Count("tally", "itself", 1, 1, 2.5)]
    del counts[before:]


def test_more_survivors_than_tries_are_refused(tally: Tally) -> None:
    with pytest.raises(ValueError, match="2 survived of 1 tried"):
        tally("tally", "itself", 1, 2)
