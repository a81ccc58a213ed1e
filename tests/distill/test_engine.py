"""The DeepSpeed engine, in one process over gloo."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.engine import StepPlan, build_engine, engine_config, take_step
from distill.engine_state import gather_weights, load_engine_state, save_engine_state
from schemas.errors import RecipeError
from tests.distill.tiny_engine import PLAN, make_job, own_group

# torch's own compiler package, which DeepSpeed's ZeRO loads, decorates with what torch deprecates.
# DeepSpeed calls collectives by the names that they had before torch 2.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with own_group():
        yield


def make_module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))


def train(engine: Any, steps: int, max_grad_norm: float = 1.0) -> list[float]:
    norms = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(4, 6, generator=generator).to(next(engine.module.parameters()).dtype)
        loss = engine(inputs).float().square().sum()
        engine.backward(loss, scale_wrt_gas=False)
        norms.append(take_step(engine, max_grad_norm))
    return norms


def test_the_shared_memory_op_is_not_built() -> None:
    import deepspeed

    assert deepspeed.comm.comm.cdb is not None
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


def test_plain_training_is_that_of_torch() -> None:
    job = make_job(learning_rate=0.01, warmup=0.2, max_grad_norm=1.0, weight_decay=0.1)
    module = make_module()
    reference = copy.deepcopy(module)
    norms = train(build_engine(module, job, PLAN), 3)

    decayed = [p for p in reference.parameters() if p.dim() > 1]
    others = [p for p in reference.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01
    )
    generator = torch.Generator().manual_seed(1)
    expected_norms = []
    # Two of ten steps warm up: 1/3 and 2/3 of the peak, and then the peak.
    for factor in (1 / 3, 2 / 3, 1.0):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.zero_grad()
        reference(torch.randn(4, 6, generator=generator)).square().sum().backward()
        expected_norms.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)))
        optimizer.step()
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_gives_the_plain_weights_and_norms(stage: int) -> None:
    job = make_job(learning_rate=0.01, max_grad_norm=0.5)
    plain = build_engine(make_module(), job, PLAN)
    plain_norms = train(plain, 3, 0.5)
    zero_job = make_job({"zero_optimization": {"stage": stage}}, learning_rate=0.01, max_grad_norm=0.5)
    engine = build_engine(make_module(), zero_job, PLAN)
    norms = train(engine, 3, 0.5)
    assert norms == pytest.approx(plain_norms, rel=1e-5)
    expected = gather_weights(plain)
    weights = gather_weights(engine)
    assert list(weights) == list(expected)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_weights_come_back_from_the_float32_copy(stage: int) -> None:
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    engine = build_engine(make_module(), make_job(config, learning_rate=1e-5, warmup=0.0), PLAN)
    train(engine, 1)
    weights = gather_weights(engine)
    start = make_module().state_dict()
    for name, value in weights.items():
        assert value.dtype == torch.float32
        # A step of 1e-5 is lost in bfloat16's 8 bits, but not in the float32 copy.
        assert float((value - start[name].bfloat16().float()).abs().max()) > 0 or name.endswith("bias")
    changed = [float((value - start[name]).abs().max()) for name, value in weights.items()]
    assert max(changed) < 0.01
    engine.destroy()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_frozen_weight_comes_back_from_every_engine_and_its_checkpoint(
    stage: int, bf16: bool, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
    job = make_job(config, learning_rate=0.01, warmup=0.0)

    def build() -> Any:
        module = make_module()
        module[0].weight.requires_grad_(False)
        return build_engine(module, job, PLAN)

    engine = build()
    train(engine, 2)
    before = gather_weights(engine)
    start = make_module().state_dict()
    assert not torch.equal(before["2.weight"], start["2.weight"])
    assert torch.equal(
        before["0.weight"], start["0.weight"].bfloat16().float() if bf16 else start["0.weight"]
    )
    counters = save_engine_state(engine, tmp_path)
    again = build()
    load_engine_state(again, tmp_path, counters)
    after = gather_weights(again)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    engine.destroy()
    again.destroy()


@pytest.mark.parametrize("field", ["train_batch_size", "gradient_accumulation_steps", "optimizer"])
def test_a_configuration_that_sets_what_the_stage_decides_is_refused(field: str) -> None:
    with pytest.raises(RecipeError, match=f"deepspeed.{field}"):
        engine_config(make_job({field: 1}), PLAN, 1)


def test_another_clip_than_the_stages_is_refused() -> None:
    with pytest.raises(RecipeError, match="max_grad_norm is"):
        engine_config(make_job({"gradient_clipping": 0.3}), PLAN, 1)


def test_moments_on_nvme_are_refused() -> None:
    offload = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "unused"}}
    with pytest.raises(RecipeError, match=r"offload_optimizer\.device: a checkpoint cannot read"):
        engine_config(make_job({"zero_optimization": offload}), PLAN, 1)


def test_batch_fields_follow_from_the_plan() -> None:
    config = engine_config(make_job({"zero_optimization": {"stage": 1}}), StepPlan(10, 4, 3), 2)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["zero_optimization"] == {"stage": 1}


def test_automatic_bf16_is_off_on_the_cpu() -> None:
    assert engine_config(make_job({"bf16": {"enabled": "auto"}}), PLAN, 1)["bf16"] == {"enabled": False}


def test_a_step_leaves_nothing_in_shared_memory() -> None:
    before = {path.name for path in Path("/dev/shm").iterdir()}
    train(build_engine(make_module(), make_job(), PLAN), 1)
    new = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert not [name for name in new if "deepspeed" in name]
