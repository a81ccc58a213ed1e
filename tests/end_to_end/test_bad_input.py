"""Each kind of wrong input through the command line: its exit code, one clear line, nothing lost."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import run_command
from distill.metrics_log import read_lines
from tests.distill.tiny_models import save_classifier
from tests.end_to_end.project import Project, corpus, make_rows

pytestmark = pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a command and returns its exit code and the one line that says what is wrong."""
    capsys.readouterr()
    code = run_command(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("tmkd: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return code, lines[0]


def with_train(**changes: Any) -> dict[str, Any]:
    return {
        name: corpus(name, **(changes if name == "train" else {})) for name in ("train", "unlabelled", "test")
    }


@pytest.mark.parametrize(
    ("corpora", "code", "expected"),
    [
        (with_train(text=["question", "answer"], question=None), 3, "has no column answer; its columns are"),
        (with_train(labels=["yes", "relevant", "irrelevant", "no"]), 2, "label_map"),
        (with_train(parts=[{"kind": "file", "path": "absent.jsonl"}]), 3, "there is no file"),
        (with_train(id="question"), 3, "unique"),
    ],
    ids=["missing column", "labels of another task", "missing file", "duplicate ids"],
)
def test_a_corpus_that_does_not_fit_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str], corpora: dict[str, Any], code: int, expected: str
) -> None:
    found, line = fail(["precompute", project.recipe(corpora=corpora)], capsys)
    assert (found, expected in line) == (code, True), line


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"question": "q", "passage": "p", "label": 7}], "7"),
        ([{"question": "q", "passage": "p", "label": "perhaps"}], "perhaps"),
        (
            [{"question": "q", "passage": "p", "label": 0}, {"question": "q", "passage": None, "label": 0}],
            "null",
        ),
        ([], "empty"),
    ],
    ids=["label id not in the map", "label name not in the map", "null text", "empty corpus"],
)
def test_rows_that_cannot_be_used_are_refused(
    project: Project, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], expected: str
) -> None:
    project.write_rows("train", rows)
    code, line = fail(["precompute", project.recipe()], capsys)
    assert code == 3
    assert expected in line
    assert "train" in line


def test_a_teacher_with_placeholder_labels_needs_a_map(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    save_classifier(project.root / "models" / "first")
    code, line = fail(["precompute", project.recipe()], capsys)
    assert code == 2
    assert "LABEL_0" in line
    assert "teachers.first.label_map" in line


def test_an_unknown_key_names_file_and_field(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fail(["run", project.recipe(), "--set", "store.shard_row=3"], capsys)
    assert code == 2
    assert "store.shard_row: unknown key; expected one of batch_rows" in line


def test_a_corpus_that_changed_since_the_plan_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = project.golden_recipe()
    assert run_command(["plan", recipe]) == 0
    rows = make_rows(40, seed=1)
    rows[3]["passage"] = "another passage"
    project.write_rows("train", rows)
    code, line = fail(["plan", recipe], capsys)
    assert code == 4
    assert "train/train has changed" in line
    assert "fingerprint" in line


def test_a_corpus_that_grew_gains_a_part(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = project.golden_recipe()
    assert run_command(["plan", recipe]) == 0
    project.write_rows("train", make_rows(40, seed=1) + make_rows(4, seed=9))
    capsys.readouterr()
    assert run_command(["plan", recipe]) == 0
    assert '"train+1"' in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.root / "closed").mkdir(mode=0o500)
    code, line = fail(["plan", project.recipe(), "--out", str(project.root / "closed")], capsys)
    assert code == 6
    assert "permission" in line


def test_an_unreachable_cluster_is_refused_quickly(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code, line = fail(["precompute", project.recipe(), "--address", address], capsys)
    assert code == 6
    assert address in line


def test_a_teacher_that_gives_nan_is_named_with_its_rows(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.spoil_weights("second")
    code, line = fail(["precompute", project.recipe()], capsys)
    assert code == 5
    assert "teacher second" in line
    assert "not finite" in line
    # What the healthy teacher did is kept and found again.
    assert run_command(["precompute", project.recipe(), "--teacher", "first"]) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    # Lazily: this process may still map a plan that lies there.
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_keeps_what_is_committed(
    project: Project, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["precompute", project.recipe(), "--set", f"store.root={small_disk}/stores"]
    code, line = fail(arguments, capsys)
    assert code == 6
    assert "disk is full" in line
    committed = set(small_disk.glob("stores/*/commit/*"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert run_command(arguments) == 0
    assert committed <= set(small_disk.glob("stores/*/commit/*"))


def test_a_disk_that_fills_up_in_training_keeps_the_last_checkpoint(
    project: Project, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"kind": "finetune", "corpus": "train", "max_steps": 4, "checkpoint_every_steps": 1}
    recipe = project.golden_recipe(stages=[stage], evaluation={"corpora": []})
    subprocess.run(["mount", "-o", "remount,size=400k", str(small_disk)], check=True)
    (project.root / "runs" / "run").mkdir(parents=True)
    (project.root / "runs" / "run" / "students").symlink_to(small_disk)
    code, line = fail(["run", recipe], capsys)
    assert code == 6
    assert "is the disk full?" in line
    (latest,) = small_disk.rglob("latest.json")
    assert '"tag": "step-' in latest.read_text()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert run_command(["run", recipe]) == 0
    (metrics,) = small_disk.rglob("metrics.jsonl")
    assert [line["step"] for line in read_lines(metrics) if line["kind"] == "step"] == [1, 2, 3, 4]
