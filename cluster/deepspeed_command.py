"""The command line and environment of one launch by DeepSpeed's launcher: pure functions."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import distill

TRAINER_MODULE = "distill.trainer"

_FROM_OTHER_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# The kernel sends the launcher SIGTERM when the supervisor dies, however it dies; a program set so
# keeps it through exec. The second check closes the gap before the call.
_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))\n"
    "if os.getppid() != int(sys.argv[1]): raise SystemExit(143)\n"
    "os.execv(sys.argv[2], sys.argv[2:])"
)


def build_command(
    job_path: Path, *, num_procs: int, master_port: int, hostfile: Path | None = None
) -> list[str]:
    """Returns the command that starts the ranks.

    On one host this is what ``deepspeed`` itself starts there, so that DeepSpeed and torch are
    imported once less; with a hostfile it is ``deepspeed``.

    Args:
        job_path: The job's file; on every host, where there are several.
        num_procs: Ranks on each host.
        master_port: A free port of the first host.
        hostfile: Lines of ``host slots=n``.
    """
    program = [TRAINER_MODULE, "--job", str(job_path)]
    common = [f"--master_port={master_port}", "--module", "--log_level=warning"]
    python = [sys.executable, "-u", "-m"]
    if hostfile is not None:
        hosts = [f"--hostfile={hostfile}", f"--num_gpus={num_procs}"]
        return [*python, "deepspeed.launcher.runner", *hosts, *common, *program]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": _devices(num_procs)}).encode()).decode()
    local = [f"--world_info={world}", "--master_addr=127.0.0.1"]
    return [*python, "deepspeed.launcher.launch", *local, *common, *program]


def die_with_parent(command: list[str], parent: int) -> list[str]:
    """Wraps a command so that it gets SIGTERM when process ``parent``, its parent, dies (Linux)."""
    if not sys.platform.startswith("linux"):
        return command
    return [sys.executable, "-S", "-c", _DIE_WITH_PARENT, str(parent), *command]


def build_environment(inherited: Mapping[str, str], *, threads: int) -> dict[str, str]:
    """Returns the environment of the launcher.

    What another launcher set for its own ranks goes; everything else is kept.

    Args:
        inherited: This process's environment.
        threads: CPU threads of a rank.
    """
    environment = {name: value for name, value in inherited.items() if name not in _FROM_OTHER_LAUNCHERS}
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["PYTHONUNBUFFERED"] = "1"
    if Path.cwd() != Path(distill.__file__).resolve().parent.parent:
        # ``python -m`` would look for our packages in the user's directory first.
        environment["PYTHONSAFEPATH"] = "1"
    return environment


def _devices(num_procs: int) -> list[int | str]:
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    visible = [name for name in visible if name]
    if len(visible) >= num_procs:
        # The launcher sets the variable anew from these names.
        return [int(name) if name.isdigit() else name for name in visible[:num_procs]]
    return list(range(num_procs))
