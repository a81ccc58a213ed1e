"""The fused head under DeepSpeed on two ranks: a head whose weight is partitioned learns as a whole one."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.engine import Engine, StepPlan, build_engine, start_process_group, stop_process_group, take_step
from distill.engine_state import gather_weights
from distill.fused_head import HeadForm, fused_losses
from distill.learning_rate import rate_factor
from distill.stored_targets import StoredTargets
from distill.token_losses import LossSpec, LossTerm
from tests.child_ranks import SERVER
from tests.distill.dense_reference import random_logits, reference_loss, store, top_supports
from tests.distill.tiny_engine import make_job

D, V, NUM, NUM_STEPS, TOTAL_STEPS = 6, 40, 12, 3, 10
SPEC = LossSpec((LossTerm("ghost_kl"), LossTerm("cross_entropy", 0.5)))
# The micro-batches of each rank, as positions of the whole batch; unequal on purpose.
CUTS = (((0, 3), (3, 5)), ((5, 11), (11, 12)))


class _FusedLinear(nn.Linear):
    """A head that owns its weight: ZeRO-3 gathers it before this forward and before its backward."""

    def forward(self, hidden_ND: Tensor, targets: StoredTargets | None = None) -> Tensor:
        if targets is None:
            return super().forward(hidden_ND)
        form = HeadForm(chunk_positions=2)
        return fused_losses(hidden_ND, self.weight, self.bias, targets, SPEC, form).total


class _Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(D, D)
        self.head = _FusedLinear(D, V)

    def forward(self, inputs_ND: Tensor, targets: StoredTargets | None = None) -> Tensor:
        return self.head(self.body(inputs_ND).tanh(), targets)


def _inputs() -> tuple[Tensor, Tensor, list[list[int]], list[int]]:
    teacher_NV = random_logits(1, NUM, V)
    return random_logits(2, NUM, D).float(), teacher_NV, top_supports(teacher_NV, [4] * NUM), list(range(NUM))


def _train(engine: Engine, rank: int) -> None:
    inputs_ND, teacher_NV, supports, tokens = _inputs()
    for _ in range(NUM_STEPS):
        for index, (start, stop) in enumerate(CUTS[rank]):
            cut = slice(start, stop)
            targets = store(teacher_NV[cut], supports[cut], tokens[cut], dtype=torch.float32)
            total = engine(inputs_ND[cut], targets)
            engine.backward(total * dist.get_world_size() / NUM, scale_wrt_gas=False)
            if index < len(CUTS[rank]) - 1:
                engine.step()
        take_step(engine, 0.0)


def _run(root: Path, rank: int, port: str) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start_process_group(threads=1)
    for stage in (0, 3):
        # Without a threshold small weights would never be partitioned.
        config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        job = make_job(config, learning_rate=0.01, max_grad_norm=0.0)
        engine = build_engine(
            _Student(), job, StepPlan(total_steps=TOTAL_STEPS, micro_batch=1, accumulation=2)
        )
        _train(engine, rank)
        emptied = engine.module.head.weight.numel() == 0
        weights = gather_weights(engine)
        if rank == 0:
            torch.save({"weights": weights, "emptied": emptied}, root / f"{stage}.pt")
        engine.destroy()
    stop_process_group()
    os._exit(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<stage>.pt``: what two ranks have learnt."""
    root = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [SERVER.Process(target=_run, args=(root, rank, port)) for rank in range(2)]
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
    return root


def _dense_weights() -> dict[str, Tensor]:
    """The whole batch at once, dense losses, plain AdamW at the rates of the job's warm-up."""
    inputs_ND, teacher_NV, supports, tokens = _inputs()
    student = _Student()
    decayed = [p for p in student.parameters() if p.dim() > 1]
    others = [p for p in student.parameters() if p.dim() == 1]
    job = make_job(learning_rate=0.01)
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": job.training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
    )
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * rate_factor(job.training, step, TOTAL_STEPS)
        optimizer.zero_grad()
        logits_NV = student(inputs_ND).double()
        total = torch.zeros((), dtype=torch.float64)
        for n in range(NUM):
            for term in SPEC.terms:
                total = total + term.weight * reference_loss(
                    term.name, teacher_NV[n], logits_NV[n], supports[n], target=tokens[n]
                )
        (total / NUM).backward()
        optimizer.step()
    return {name: value.detach() for name, value in student.state_dict().items()}


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_with_unequal_micro_batches_learn_what_dense_training_on_the_whole_batch_does(
    trained: Path, stage: int
):
    saved = torch.load(trained / f"{stage}.pt")
    assert saved["emptied"] == (stage == 3)
    for name, expected in _dense_weights().items():
        torch.testing.assert_close(saved["weights"][name], expected, rtol=1e-4, atol=2e-6)
