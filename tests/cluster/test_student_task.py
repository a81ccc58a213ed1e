from __future__ import annotations

from pathlib import Path

import pytest

from cluster.student_task import TASK_FILE, StudentTask, read_task, write_task
from schemas.errors import DataError

TASK = StudentTask(
    text=("question", "passage"), labels=("yes", "no"), question="question", arm="tmkd", seed=3
)


def test_a_task_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_task(TASK, tmp_path)
    assert read_task(tmp_path) == TASK


def test_a_directory_without_a_task_has_none(tmp_path: Path) -> None:
    assert read_task(tmp_path) is None


def test_a_task_that_was_edited_is_a_data_error(tmp_path: Path) -> None:
    write_task(TASK, tmp_path)
    path = tmp_path / TASK_FILE
    path.write_text(path.read_text().replace('"yes"', '"maybe"'))
    with pytest.raises(DataError, match="task"):
        read_task(tmp_path)
