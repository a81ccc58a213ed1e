"""The launcher's command line and environment."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.deepspeed_command import build_command, build_environment, die_with_parent
from cluster.process_session import end_session

JOB = Path("/runs/x/job.json")


def decode_world(command: list[str]) -> dict[str, list[int | str]]:
    encoded = next(word for word in command if word.startswith("--world_info="))
    world: dict[str, list[int | str]] = json.loads(base64.urlsafe_b64decode(encoded.partition("=")[2]))
    return world


def test_one_host_runs_the_launcher_that_deepspeed_would_start_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command = build_command(JOB, num_procs=2, master_port=12345)
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert decode_world(command) == {"localhost": [0, 1]}
    assert "--master_port=12345" in command
    assert command[-3:] == ["distill.trainer", "--job", str(JOB)]
    assert command.index("--module") < command.index("distill.trainer")


def test_devices_that_the_user_chose_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,6")
    assert decode_world(build_command(JOB, num_procs=2, master_port=1)) == {"localhost": [3, 5]}


def test_a_hostfile_goes_to_deepspeed_itself() -> None:
    command = build_command(JOB, num_procs=4, master_port=12345, hostfile=Path("/hosts"))
    assert command == [
        sys.executable,
        "-u",
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile=/hosts",
        "--num_gpus=4",
        "--master_port=12345",
        "--module",
        "--log_level=warning",
        "distill.trainer",
        "--job",
        str(JOB),
    ]


def test_what_another_launcher_set_is_taken_away_and_the_rest_kept() -> None:
    inherited = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "HF_HUB_OFFLINE": "1", "PATH": "/bin"}
    environment = build_environment(inherited, threads=3)
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(environment)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PATH"] == "/bin"
    assert environment["OMP_NUM_THREADS"] == "3"


def test_packages_in_the_users_directory_do_not_shadow_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "__init__.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    environment = build_environment({}, threads=1)
    subprocess.run([sys.executable, "-m", "schemas.errors"], env=environment, check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent's death is Linux's to tell")
def test_a_wrapped_command_ends_when_its_parent_is_killed() -> None:
    sleeper = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(600)"]
    program = (
        "import os, subprocess, sys, time\n"
        "from cluster.deepspeed_command import die_with_parent\n"
        f"child = subprocess.Popen(die_with_parent({sleeper!r}, os.getpid()), start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with (
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent,
        contextlib.ExitStack() as afterwards,
    ):
        afterwards.callback(parent.kill)
        assert parent.stdout is not None
        lines = []
        for line in parent.stdout:
            lines.append(line.strip())
            if lines[-1] != "up":
                child = psutil.Process(int(lines[-1]))
                # Also where this test fails midway, nothing outlives it.
                afterwards.callback(end_session, child.pid, wait_s=0)
            if len(lines) == 2:
                break
        assert "up" in lines
        parent.kill()
        deadline = time.monotonic() + 10
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_command_is_not_started_for_a_parent_that_is_gone() -> None:
    # The parent's id is not this process's, as if the parent had died before the call.
    result = subprocess.run(die_with_parent([sys.executable, "-c", "print('ran')"], 1), capture_output=True)
    assert (result.returncode, result.stdout) == (143, b"")
