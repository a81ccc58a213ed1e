"""Ctrl-C and SIGTERM in the middle of a student's training, through the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.cli import run_command
from distill.metrics_log import read_lines
from schemas.job import StageStatus
from tests.end_to_end.project import Project

pytestmark = pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning")

NUM_STEPS = 400


def test_an_interrupted_training_says_so_and_goes_on(tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [{"kind": "finetune", "corpus": "train", "max_steps": NUM_STEPS}]
    stages[0] |= {"eval_every_steps": NUM_STEPS, "global_batch": 4, "max_micro_batch": 4}
    recipe = Project(tmp_path).golden_recipe(stages=stages, evaluation={"corpora": ["test"], "speed_rows": 0})
    stage = tmp_path / "runs" / "run" / "students" / "golden" / "seed-17" / "stage-1-finetune"
    command = [sys.executable, "-c", "from cluster.cli import main; main()", "run", recipe, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children: list[psutil.Process] = []
        try:
            while not list(read_lines(stage / "metrics.jsonl")):
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143, err
    assert out == ""
    assert "the same command goes on from there" in err.splitlines()[-1]
    assert children
    assert not [child for child in children if child.is_running()]
    status = StageStatus.model_validate_json((stage / "status.json").read_bytes())
    assert status.state == "preempted"
    assert 0 < status.step < NUM_STEPS
    assert run_command(["run", recipe]) == 0
    steps = [line["step"] for line in read_lines(stage / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert json.loads((tmp_path / "runs" / "run" / "evaluation.json").read_text())["main_arm"] == "golden"
