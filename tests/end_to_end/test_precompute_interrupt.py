"""Ctrl-C and SIGTERM while teachers run: a clean end, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.project import Project, make_rows

COMMAND = [sys.executable, "-c", "from cluster.cli import main; main()", "precompute"]
NUM_SHARDS = 400


def commits(project: Project) -> list[Path]:
    return list((project.root / "runs" / "stores").glob("*/commit/*.json"))


def interrupt(project: Project, recipe: str, number: signal.Signals, *, whole_group: bool) -> tuple[int, str]:
    """Starts precompute, sends a signal once shards are committed, and returns exit code and stderr."""
    process = subprocess.Popen(
        [*COMMAND, recipe],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        process_group=0,
    )
    try:
        deadline_s = time.monotonic() + 90
        while len(commits(project)) < 2 and time.monotonic() < deadline_s:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert len(family) > 3  # Ray's own, and the actor.
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    return process.returncode, stderr


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        # As a terminal sends it: to all processes at once.
        (signal.SIGINT, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_precompute_ends_cleanly_and_keeps_what_is_committed(
    tmp_path: Path, number: signal.Signals, whole_group: bool
) -> None:
    project = Project(tmp_path)
    project.write_rows("train", make_rows(2 * NUM_SHARDS, seed=1))
    recipe = project.recipe(
        store={"shard_rows": 2},
        evaluation={},
        compare={"arms": []},
        stages=[{"kind": "finetune", "corpus": "train", "teachers": ["first"], "max_steps": 1}],
        student={"init": {"kind": "layers", "model": str(project.root / "models/first")}, "arm": "m-o-1"},
    )
    code, stderr = interrupt(project, recipe, number, whole_group=whole_group)
    assert code == 128 + number
    assert "interrupted; what is committed is kept" in stderr
    assert "Traceback" not in stderr
    assert 2 <= len(commits(project)) < NUM_SHARDS
