"""What teachers, stores and students took, by what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster import cost_log
from cluster.cost_log import CostLog, StoreClock, count_stored_rows, store_name
from precompute.events import ProgressEvent, TeacherState
from tests.store_factory import make_part, make_store


def event(teacher: str, state: TeacherState) -> ProgressEvent:
    return ProgressEvent(teacher, state, 0, 1, 0, 10)


def test_the_first_figure_stays(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "costs.json"
    CostLog.open(path).add("teachers", {"t": 5.0})
    CostLog.open(path).add("teachers", {"t": 0.1, "u": 2.0})
    assert CostLog.open(path).seconds["teachers"] == {"t": 5.0, "u": 2.0}


def test_two_runs_below_one_root_do_not_lose_each_others_figures(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    one, other = CostLog.open(path), CostLog.open(path)
    one.add("students", {"a": 1.0})
    other.add("students", {"b": 2.0})
    assert CostLog.open(path).seconds["students"] == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("text", ["", "{}", "no json", '{"teachers": {"t": "x"}}'])
def test_a_file_that_cannot_be_read_costs_figures_and_no_run(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    log = CostLog.open(path)
    assert log.seconds == {"teachers": {}, "stores": {}, "students": {}}
    log.add("stores", {"s": 1.0})
    assert CostLog.open(path).seconds["stores"] == {"s": 1.0}


def test_a_teachers_pass_is_charged_by_rows_to_the_stores_without_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = {}
    for name, rows in (("old", 4), ("short", 2), ("long", 6)):
        texts = [(f"{name} {row}", "x") for row in range(rows)]
        part = make_part(tmp_path / name / "rows.arrow", texts, [0] * rows, shard_rows=4)
        root = make_store(
            tmp_path / name / f"{name}-store", part.plan, np.zeros((rows, 2)), labels=("a", "b"), teacher="t"
        )
        roots["t", name, "p"] = str(root)
        assert count_stored_rows(str(root)) == rows
    now = iter([10.0, 12.0, 20.0, 26.0, 30.0])
    monkeypatch.setattr(cost_log.time, "monotonic", lambda: next(now))
    log = CostLog.open(tmp_path / "costs.json")
    log.add("stores", {"old-store": 99.0})
    clock = StoreClock(log)
    for state in ("waiting", "loading", "running", "done"):
        clock.tick(event("t", state))  # type: ignore[arg-type]
    clock.tick(event("idle", "done"))
    clock.charge(roots)
    # From loading at 12 s to done at 26 s, two rows of eight and six of eight.
    assert CostLog.open(log.path).seconds["stores"] == {
        "old-store": 99.0,
        "short-store": 3.5,
        "long-store": 10.5,
    }


def test_a_store_is_named_by_its_directory_wherever_it_lies() -> None:
    assert store_name("/out/stores/a-b/") == store_name("s3://bucket/stores/a-b") == "a-b"
