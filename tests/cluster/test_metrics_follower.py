"""Following a growing record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.metrics_follower import MetricsFollower
from distill.metrics_log import cut_lines


def test_each_line_is_handed_on_once_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    seen: list[dict[str, Any]] = []
    follower = MetricsFollower(path, seen.append)
    follower.poll()
    assert seen == []
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    follower.poll()
    follower.poll()
    assert [line["step"] for line in seen] == [1]
    with path.open("a") as file:
        file.write('ep", "step": 2}\n{"kind": "evaluation", "step": 2}\n')
    follower.poll()
    assert [(line["kind"], line["step"]) for line in seen] == [("step", 1), ("step", 2), ("evaluation", 2)]


def test_a_rewritten_record_is_followed_from_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"kind": "step", "step": {step}}}\n' for step in (1, 2, 3)))
    seen: list[dict[str, Any]] = []
    follower = MetricsFollower(path, seen.append)
    follower.poll()
    cut_lines(path, 1)
    with path.open("a") as file:
        file.write("".join(f'{{"kind": "step", "step": {step}}}\n' for step in (2, 3, 4)))
    follower.poll()
    assert [line["step"] for line in seen] == [1, 2, 3, 4]


def test_without_a_listener_nothing_is_read(tmp_path: Path) -> None:
    MetricsFollower(tmp_path / "absent", None).poll()
