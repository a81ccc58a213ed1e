"""A sweep, whole: teachers once, students side by side, a failure among them, and starting again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.cli import run_command
from schemas.sweep_evaluation import SweepEvaluation, read_sweep_evaluation
from tests.end_to_end.project import Project

pytestmark = pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning")

POINTS = ["base", "alpha=0.5", "learning_rate=1e_30"]


def write_sweep(project: Project, **changes: Any) -> str:
    fields: dict[str, Any] = {
        "name": "sweep",
        "recipe": "recipe.yaml",
        "seeds": [1],
        # The last point's student cannot learn: its loss leaves the numbers.
        "grid": [{}, {"stages.1.alpha": [0.5]}, {"stages.1.learning_rate": [1.0e30]}],
        "overrides": {"evaluation.speed_rows": 0, "stages.1.max_grad_norm": 0},
        "students": {"at_once": 2, "cpus": 1},
    }
    path = project.root / "sweep.yaml"
    path.write_text(yaml.safe_dump({**fields, **changes}))
    return str(path)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    project.recipe()
    assert run_command(["sweep", write_sweep(project)]) == 1
    return project


def result(project: Project) -> SweepEvaluation:
    return read_sweep_evaluation(project.root / "runs" / "sweep" / "sweep.json")


def models(project: Project) -> dict[str, int]:
    students = project.root / "runs" / "students"
    return {
        path.parent.parent.name: path.stat().st_mtime_ns
        for path in students.glob("*/model/model.safetensors")
    }


def test_teachers_run_once_and_shared_stages_are_trained_once(project: Project) -> None:
    found = result(project)
    assert (found.cost.num_teachers, found.cost.num_stores) == (2, 4)
    assert len(list((project.root / "runs" / "stores").iterdir())) == 6
    # tmkd's stage 1 once for three points, its stage 2 for each, golden for each of two learning rates.
    by_fingerprint = {student.fingerprint: student.state for student in found.students}
    assert sorted(by_fingerprint.values()) == ["failed", "failed", "trained", "trained", "trained"]
    stage_1 = {student.stages[0] for student in found.students if student.arm == "tmkd"}
    assert len(stage_1) == 1
    assert len(models(project)) == 4


def test_a_student_that_fails_stops_no_other_and_is_named(project: Project) -> None:
    found = result(project)
    assert [student.point for student in found.failures] == [found.points[2].point.name] * 2
    assert all("lower learning_rate" in str(student.error) for student in found.failures)
    assert found.points[2].missing_seeds == {"tmkd": (1,), "golden": (1,)}
    for point in found.points[:2]:
        assert point.evaluation is not None
        assert [row.name for row in point.evaluation.corpora[0].models] == [
            "first",
            "second",
            "ensemble",
            "tmkd",
            "golden",
        ]


def test_each_student_of_a_sweep_predicts_by_itself(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    student = next(one for one in result(project).students if one.arm == "tmkd" and one.state == "trained")
    model = project.root / "runs" / "sweep" / student.stages[-1] / "model"
    capsys.readouterr()
    assert run_command(["predict", str(model), "--data", str(project.root / "data" / "test.jsonl")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 24
    assert {"label", "probabilities", "question", "rank"} <= lines[0].keys()


def test_started_again_it_trains_only_what_is_missing(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    before = models(project)
    found = result(project)
    lost = next(
        student for student in found.students if student.point == "alpha=0.5" and student.arm == "tmkd"
    )
    shutil.rmtree(project.root / "runs" / "sweep" / lost.stages[-1])
    source = write_sweep(project, grid=[{}, {"stages.1.alpha": [0.5]}], students={})
    capsys.readouterr()
    assert run_command(["sweep", source, "--json"]) == 0
    printed = capsys.readouterr()
    again = json.loads(printed.out)["evaluation"]
    assert "logit stores: there already" in printed.err
    after = models(project)
    made = Path(lost.stages[-1]).name
    assert {name for name in after if after[name] != before.get(name)} == {made}
    # The same students: the same scores, and what they took is remembered.
    assert again["points"][0]["evaluation"] == json.loads(found.points[0].model_dump_json())["evaluation"]
    assert again["cost"]["student_s"] > 0
    assert (project.root / "runs" / "sweep" / "report.html").is_file()


def test_an_unknown_field_of_the_grid_is_refused_before_anything_runs(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["sweep", write_sweep(project, grid={"stages.1.alhpa": [0.5]})]) == 2
    assert "alhpa: unknown key; expected one of alpha" in capsys.readouterr().err


def test_a_damaged_store_is_refused_before_a_student_is_trained(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(project.root / "runs" / "stores", out / "stores")
    store = next(path for path in (out / "stores").iterdir() if (path / "data").is_dir())
    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_rows"', '"num_rowz"', 1))
    assert run_command(["sweep", write_sweep(project, grid={}), "--out", str(out)]) == 3
    assert store.name in capsys.readouterr().err
    assert not (out / "students").exists()


@pytest.mark.slow
def test_an_interrupted_sweep_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.recipe()
    source = write_sweep(project, grid={}, overrides={"stages.1.max_steps": 300, "evaluation.speed_rows": 0})
    command = [sys.executable, "-c", "from cluster.cli import main; main()", "sweep", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children: list[psutil.Process] = []
        try:
            while not list((tmp_path / "runs").glob("students/*/metrics.jsonl")):
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 143, err
    assert children
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert run_command(["sweep", source]) == 0
    assert not read_sweep_evaluation(tmp_path / "runs" / "sweep" / "sweep.json").failures
