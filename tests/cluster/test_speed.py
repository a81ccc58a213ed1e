from __future__ import annotations

from pathlib import Path

import torch

from cluster.speed import ModelSpeed, SpeedLog, time_student
from tests.cluster.tiny_students import TEXTS, save_student


def measured(rate: float) -> ModelSpeed:
    return ModelSpeed(examples_per_s=rate, num_parameters=1, num_examples=1, batch_rows=1, num_threads=1)


def never() -> ModelSpeed:
    raise AssertionError("was measured again")


def test_a_speed_is_measured_once_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    assert SpeedLog.open(path).measure("t", {"model": "m"}, lambda: measured(3.0)).examples_per_s == 3.0
    assert SpeedLog.open(path).measure("t", {"model": "m"}, never).examples_per_s == 3.0


def test_another_model_under_the_same_name_is_measured_anew(tmp_path: Path) -> None:
    log = SpeedLog.open(tmp_path / "speed.json")
    log.measure("t", {"model": "m", "threads": 1}, lambda: measured(3.0))
    assert log.measure("t", {"model": "n", "threads": 1}, lambda: measured(4.0)).examples_per_s == 4.0
    assert log.measure("t", {"model": "m", "threads": 2}, lambda: measured(5.0)).examples_per_s == 5.0
    assert log.measure("t", {"model": "m", "threads": 1}, never).examples_per_s == 3.0


def test_a_damaged_log_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    SpeedLog.open(path).measure("t", {}, lambda: measured(3.0))
    path.write_text(path.read_text().replace("3.0", "9.0"))
    assert SpeedLog.open(path).speeds == {}


def test_a_student_is_timed_with_all_its_parameters_and_the_threads_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    speed = time_student(save_student(tmp_path / "student"), TEXTS, num_threads=before + 1)
    assert torch.get_num_threads() == before
    assert (speed.num_examples, speed.num_threads) == (len(TEXTS), before + 1)
    assert speed.examples_per_s > 0
    # Two heads of two labels over a width of 32 are in it.
    assert speed.num_parameters > 2 * 2 * 33
