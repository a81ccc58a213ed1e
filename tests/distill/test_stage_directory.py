"""Status, lock and model of a stage's output directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distill.stage_directory import StageDirectory, publish_directory
from schemas.errors import RefusedError, ResourceError
from schemas.job import StageStatus


def make_directory(path: Path) -> StageDirectory:
    directory = StageDirectory(path)
    directory.create()
    return directory


def test_a_status_comes_back(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "a" / "b")
    assert directory.read_status() is None
    status = StageStatus(state="running", fingerprint="f", step=3)
    directory.write_status(status)
    assert directory.read_status() == status
    (directory.path / "status.json").write_text("{")
    assert directory.read_status() is None


def test_failures_of_all_ranks_are_found_and_cleared(tmp_path: Path) -> None:
    directory = make_directory(tmp_path)
    directory.write_status(StageStatus(state="running", fingerprint="f"))
    directory.write_status(StageStatus(state="failed", fingerprint="f", error="x", exit_code=3), rank=2)
    assert [status.error for status in directory.read_failures()] == ["x"]
    directory.request_stop()
    assert directory.stop_requested()
    directory.clear_requests()
    assert directory.read_failures() == []
    assert directory.read_status() is None
    assert not directory.stop_requested()


def test_the_lock_is_held_against_others_and_dies_with_its_holder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from distill.stage_directory import StageDirectory\n"
        "StageDirectory(Path(sys.argv[1])).lock(); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RefusedError, match="another process trains here"):
            StageDirectory(tmp_path).lock()
        holder.kill()
    StageDirectory(tmp_path).lock()


def test_a_model_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def write_half(path: Path) -> None:
        path.mkdir()
        (path / "a").write_text("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        publish_directory(target, write_half)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("old", "new"):

        def write(path: Path, name: str = name) -> None:
            path.mkdir()
            (path / name).write_text(name)

        publish_directory(target, write)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_that_cannot_be_made_is_a_matter_of_resources(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be created"):
        make_directory(tmp_path / "file" / "out")


def test_the_supervisors_side_loads_neither_torch_nor_deepspeed() -> None:
    program = (
        "import sys, cluster.deepspeed_launch\n"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
