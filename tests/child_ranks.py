"""Ranks of the trainer in processes of their own, forked from a server that has imported everything.

A launch through DeepSpeed's launcher takes ten seconds, a forked rank one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from schemas.fault_points import FaultPoint, listen
from schemas.job import JOB_ADAPTER, AnyJob
from tests.forkserver import SERVER, preload

preload("distill.trainer", "transformers.models.bert.modeling_bert", "torch.utils.tensorboard")


@dataclass(frozen=True)
class Kill:
    """Where ranks kill themselves with SIGKILL: after ``step`` optimizer steps, at a point of what follows.

    ``step``: before anything is recorded. ``state``: the engine's state is being written. A fault point:
    of that step's checkpoint. ``model``: the model published, no status yet.
    """

    step: int
    where: FaultPoint | Literal["step", "state", "model"] = "step"


def run_ranks(
    job: AnyJob, *, num_ranks: int = 1, kill: Kill | None = None, fresh: bool = False
) -> list[int | None]:
    """Trains a stage and returns the ranks' exit codes (negative: the signal).

    ``fresh``: in processes that have imported nothing yet.
    """
    context = multiprocessing.get_context("spawn") if fresh else SERVER
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(num_ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = context.Process(target=_run, args=(job.model_dump_json(), environment, kill))
        process.start()
        processes.append(process)
    try:
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def read_rows(output: str | Path) -> list[tuple[int, list[int]]]:
    """Returns the steps that rank 0 took, also those of a killed run: step before it, rows."""
    lines = (Path(output) / "rows.jsonl").read_text().splitlines()
    return [(step, rows) for step, rows in map(json.loads, lines)]


def read_trace(output: str | Path) -> dict[str, list[str]]:
    """Returns the modules that rank 0 had loaded at the end, and the files that it had opened."""
    trace: dict[str, list[str]] = json.loads((Path(output) / "trace.json").read_text())
    return trace


def _run(job_json: str, environment: dict[str, str], kill: Kill | None) -> None:
    os.environ.update(environment)
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    job = JOB_ADAPTER.validate_json(job_json)
    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "job.json"
    if environment["RANK"] == "0":
        path.write_text(job_json)
    else:
        path = output / f"job.{environment['RANK']}.json"
        path.write_text(job_json)
    _watch(output, kill)
    from distill.trainer import main

    code = main(["--job", str(path)])
    if environment["RANK"] == "0":
        trace = {"modules": sorted(sys.modules), "opened": opened}
        (output / "trace.json").write_text(json.dumps(trace))
    os._exit(code)


def _watch(output: Path, kill: Kill | None) -> None:
    """Records the rows of each step, and sets the trap."""
    from distill import engine_state, stage_trainer
    from distill.stage_directory import StageDirectory

    trainer = stage_trainer.StageTrainer
    take_step, publish = trainer._take_step, StageDirectory.publish_model
    write_tensors = engine_state.write_tensors
    steps_done = 0

    def traced_step(self: Any, step: Any, epoch: int) -> bool:
        if os.environ["RANK"] == "0":
            rows = [int(row) for batch in step.batches for row in batch.rows[batch.weights > 0]]
            with (output / "rows.jsonl").open("a") as file:
                file.write(json.dumps([self.step, rows]) + "\n")
        asked = take_step(self, step, epoch)
        nonlocal steps_done
        steps_done = self.step + 1
        _die(kill, "step", steps_done)
        return asked

    def traced_write(path: Path, *arguments: Any) -> None:
        write_tensors(path, *arguments)
        if path.name == engine_state.OPTIMIZER_FILE:
            _die(kill, "state", steps_done)

    def traced_publish(self: Any, write: Any) -> None:
        publish(self, write)
        _die(kill, "model", -1)

    trainer._take_step = traced_step  # type: ignore[method-assign]
    engine_state.write_tensors = traced_write
    listen(lambda point: _die(kill, point, steps_done))
    StageDirectory.publish_model = traced_publish  # type: ignore[method-assign]


def _die(kill: Kill | None, where: str, step: int) -> None:
    if kill is not None and kill.where == where and step in (kill.step, -1):
        os.kill(os.getpid(), signal.SIGKILL)
