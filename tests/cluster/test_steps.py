from __future__ import annotations

from pathlib import Path

import pytest

from cluster.steps import StepLog
from schemas.digest import read_document


def test_seconds_of_a_step_are_kept_over_restarts_and_a_skipped_one_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    with StepLog.open(path).step("students"):
        pass
    log = StepLog.open(path)
    log.seconds["students"] = 7.0
    with log.step("students") as step:
        step.skipped = True
    assert read_document(path)["steps"] == [{"step": "students", "seconds": 7.0}]
    log = StepLog.open(path)
    with log.step("students"):
        pass
    assert log.seconds["students"] >= 7.0


def test_a_step_that_fails_is_not_written_down(tmp_path: Path) -> None:
    log = StepLog.open(tmp_path / "timings.json")
    with pytest.raises(ValueError, match="broken"), log.step("students"):
        raise ValueError("broken")
    assert log.seconds == {}
    assert not log.path.exists()


@pytest.mark.parametrize("content", ["{", '{"steps": [{"step": "plan"}]}', '{"steps": 3}'])
def test_a_log_that_cannot_be_read_starts_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "timings.json").write_text(content)
    assert StepLog.open(tmp_path / "timings.json").seconds == {}
