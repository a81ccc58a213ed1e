"""A tiny engine over fixed rows, trained alike on any number of ranks; and its ranks in child processes."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill.engine import Engine, StepPlan, build_engine, start_process_group, stop_process_group, take_step
from distill.engine_state import load_engine_state, save_engine_state
from schemas.digest import read_document, write_document
from schemas.job import PartSource, StageJob
from schemas.recipe import ConfigInit, Training
from tests.forkserver import SERVER

PLAN = StepPlan(total_steps=10, micro_batch=4, accumulation=1)
NUM_ROWS = 4


class TinyModule(torch.nn.Module):
    """Sizes that no number of ranks divides, a frozen weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below = torch.nn.Linear(6, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.above = torch.nn.Linear(5, 3)
        self.frozen = torch.nn.Linear(6, 5, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.above(self.norm(self.below(inputs) + self.frozen(inputs)))
        return result


def make_job(deepspeed: dict[str, Any] | None = None, **training: Any) -> StageJob:
    return StageJob(
        name="test",
        output="unused",
        init=ConfigInit(kind="config", config={}, tokenizer="unused"),
        max_length=8,
        labels=("a", "b"),
        parts=(PartSource(rows="unused", fingerprint="f", plan_hash="p", num_rows=1),),
        alpha=0.5,
        training=Training(corpus="c", **training),
        selection_seed=0,
        seed=0,
        deepspeed=deepspeed or {},
    )


def make_config(stage: int, dtype: str) -> dict[str, Any]:
    """Returns a DeepSpeed configuration; ``dtype``: fp32, bf16, or mixed: bf16 with fp32 gradients."""
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": dtype != "fp32"}}
    return config | ({"data_types": {"grad_accum_dtype": "fp32"}} if dtype == "mixed" else {})


def make_engine(config: dict[str, Any], module: torch.nn.Module | None = None) -> Engine:
    job = make_job(config, learning_rate=0.01, warmup=0.2, weight_decay=0.1)
    plan = StepPlan(total_steps=10, micro_batch=NUM_ROWS // dist.get_world_size(), accumulation=1)
    return build_engine(TinyModule() if module is None else module, job, plan)


def train(engine: Engine, steps: range) -> list[float]:
    """Takes steps; each rank takes its share of a step's rows. Returns the gradients' norms."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    norms = []
    for step in steps:
        inputs = torch.randn(NUM_ROWS, 6, generator=torch.Generator().manual_seed(step))
        share = inputs.chunk(world_size)[rank].to(next(engine.module.parameters()).dtype)
        loss = engine(share).float().square().sum() * world_size
        engine.backward(loss, scale_wrt_gas=False)
        norms.append(take_step(engine, 1.0))
        engine.module.count += 1
    return norms


def save(engine: Engine, directory: Path) -> None:
    """Saves an engine with its counters."""
    counters = save_engine_state(engine, directory)
    if dist.get_rank() == 0:
        write_document(directory / "counters.json", counters)
    dist.barrier()


def load(engine: Engine, directory: Path) -> None:
    """Loads what ``save`` wrote."""
    load_engine_state(engine, directory, {**read_document(directory / "counters.json")})


def read_bytes(directory: Path) -> dict[str, bytes]:
    """Returns what ``save`` wrote."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@contextmanager
def own_group() -> Iterator[None]:
    """Runs in a process group of one, and gives back what ZeRO 3 replaces for good."""
    with pytest.MonkeyPatch.context() as patch:
        # It rounds otherwise; that would reach other tests.
        patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        start_process_group(threads=1)
        yield
        stop_process_group()


def run_two_ranks(root: Path, cases: Sequence[tuple[int, str]]) -> None:
    """Lets two processes fill ``root/<stage>-<dtype>/`` for each case.

    ``half``: after 3 steps; ``whole``: after 6; ``resumed``: after 6, the last 3 from ``half``;
    ``copied``: what comes of loading ``root/one/<stage>-<dtype>``, if there is one, and saving it;
    ``continued``: that, after steps 3 to 6.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [SERVER.Process(target=_run, args=(root, cases, str(rank), port)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _run(root: Path, cases: Sequence[tuple[int, str]], rank: str, port: str) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start_process_group(threads=1)
    for stage, dtype in cases:
        name, config = f"{stage}-{dtype}", make_config(stage, dtype)
        engine = make_engine(config)
        train(engine, range(3))
        save(engine, root / name / "half")
        train(engine, range(3, 6))
        save(engine, root / name / "whole")
        engine.destroy()
        for source, copied, after in (
            (root / name / "half", "again", "resumed"),
            (root / "one" / name, "copied", "continued"),
        ):
            engine = make_engine(config)
            load(engine, source)
            save(engine, root / name / copied)
            train(engine, range(3, 6))
            save(engine, root / name / after)
            engine.destroy()
    stop_process_group()
    os._exit(0)
