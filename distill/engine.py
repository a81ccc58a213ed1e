"""The DeepSpeed engine: the only module that imports deepspeed.

Legend: P = elements of one parameter.

Invariants:
    1. DeepSpeed's shared-memory op is never built: it wants a compiler, takes half a minute and
       leaves 66 MiB in ``/dev/shm`` (tests/distill/test_engine.py).
    2. Batch fields, optimizer and schedule come from the job, never from the user's configuration
       (tests/distill/test_engine.py).
    3. Full float32 weights and moments of a parameter can be had and set at every ZeRO stage
       (tests/distill/test_engine_state.py).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from distill.learning_rate import rate_factor
from schemas.errors import RecipeError, ResourceError
from schemas.job import AnyJob

if not torch.accelerator.is_available():
    # Else DeepSpeed warns, on every import, that it guessed.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

Engine: TypeAlias = deepspeed.DeepSpeedEngine
# What AdamW keeps of a parameter, beside the number of its steps.
MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_SHARED_MEMORY_OP = "deepspeed_shm_comm"
_BATCH_FIELDS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OWN_FIELDS = (*_BATCH_FIELDS, "optimizer", "scheduler")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How many optimizer steps there are, and how one is cut.

    Attributes:
        total_steps: Optimizer steps of the whole stage.
        micro_batch: Rows that one rank puts through the model at once.
        accumulation: Micro-batches of one rank in one step.
    """

    total_steps: int
    micro_batch: int
    accumulation: int


def start_process_group(threads: int) -> None:
    """Joins the process group that the launcher's environment describes (gloo on CPU, nccl on GPU).

    Args:
        threads: CPU threads of this rank.

    Raises:
        ResourceError: The group cannot be formed.
    """
    torch.set_num_threads(threads)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        # Not started by a launcher: a group of one.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _turn_off_shared_memory_op()
    try:
        deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)
    except (RuntimeError, OSError, ValueError) as error:
        # DistNetworkError of a taken port is a RuntimeError; the supervisor looks for its name.
        raise ResourceError(f"the ranks cannot reach each other: {error}") from error


def stop_process_group() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()


def build_engine(module: torch.nn.Module, job: AnyJob, plan: StepPlan) -> Engine:
    """Wraps a model for training; the process group must have been started.

    Args:
        module: The student, float32.
        job: Optimisation and the user's DeepSpeed configuration.
        plan: Number and cut of the steps.

    Raises:
        RecipeError: The configuration sets what the job decides.
        ResourceError: It wants bfloat16 where the device has none.
    """
    training = job.training
    optimizer = torch.optim.AdamW(
        _decay_groups(module, training.weight_decay), lr=training.learning_rate, fused=True
    )
    config = engine_config(job, plan, dist.get_world_size())
    clips_itself = _is_plain(config)
    if clips_itself:
        # ``take_step`` clips: DeepSpeed does not report the norm of plain float32 gradients.
        config["gradient_clipping"] = 0.0
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=lambda basic: torch.optim.lr_scheduler.LambdaLR(
            basic, lambda step: rate_factor(training, step, plan.total_steps)
        ),
        config=config,
    )
    return engine


def engine_config(job: AnyJob, plan: StepPlan, world_size: int) -> dict[str, Any]:
    """Returns the user's DeepSpeed configuration completed with what the job decides.

    In low precision ZeRO 0 becomes ZeRO 1, which computes the same.

    Raises:
        RecipeError: It sets batch fields, optimizer, scheduler, or another clip than ``max_grad_norm``;
            or it keeps the optimizer's state on nvme.
        ResourceError: It wants bfloat16 where the device has none.
    """
    user = dict(job.deepspeed)
    for name in _OWN_FIELDS:
        if name in user:
            raise RecipeError(
                "batch, optimizer and scheduler fields follow from the stage; remove it",
                field=f"deepspeed.{name}",
            )
    clip = job.training.max_grad_norm
    if user.get("gradient_clipping", clip) != clip:
        raise RecipeError(f"max_grad_norm is {clip}; set only that", field="deepspeed.gradient_clipping")
    if user.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "nvme":
        field = "deepspeed.zero_optimization.offload_optimizer.device"
        raise RecipeError("a checkpoint cannot read moments that lie on nvme; use cpu", field=field)
    if "bf16" in user:
        user["bf16"] = {**user["bf16"], "enabled": _resolve_bf16(user["bf16"])}
    if _is_low_precision(user) and zero_stage(user) == 0:
        # Without ZeRO, DeepSpeed takes an optimizer whose float32 weights it cannot hand out.
        user["zero_optimization"] = {**user.get("zero_optimization", {}), "stage": 1}
    return {
        "zero_allow_untested_optimizer": True,
        **user,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": plan.micro_batch * plan.accumulation * world_size,
        "gradient_clipping": clip,
    }


def take_step(engine: Engine, max_grad_norm: float) -> float:
    """Clips and applies the accumulated gradients.

    Returns:
        The global L2 norm of the gradients before clipping.
    """
    if _is_plain(engine.config):
        limit = max_grad_norm if max_grad_norm > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), limit))
        engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm() or 0.0)


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Returns a parameter's shape, also where ZeRO 3 has emptied it and keeps the shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_parameter(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Returns a whole parameter, float32 and detached; every rank must call it.

    It comes from the optimizer's own copy where the module computes in another type or is partitioned.
    It may share the parameter's memory.
    """
    partitioned = _is_partitioned(parameter)
    if partitioned or parameter.dtype != torch.float32:
        full = safe_get_full_fp32_param(parameter)
        if full is not None:
            return full.detach().float()
    if partitioned:
        # A frozen parameter of ZeRO 3 has no optimizer copy.
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return parameter.detach().float()


@torch.no_grad()
def set_full_parameter(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Sets a parameter and the optimizer's copy of it; every rank must call it.

    Args:
        parameter: Of an engine's module.
        value: float32, of its full shape, on this rank's device; the same on every rank.
    """
    if not _is_partitioned(parameter):
        parameter.copy_(value)
        if hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, value)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, _own_part(parameter, value))


def step_of(engine: Engine, parameter: torch.nn.Parameter) -> float | None:
    """Returns how many steps AdamW has taken on a parameter; None before the first, or if it is frozen."""
    if not parameter.requires_grad:
        return None
    state = engine.basic_optimizer.state
    # ZeRO steps on flat partitions of all parameters together.
    key = parameter if _is_plain(engine.config) else _flat_partitions(engine)[0]
    return float(state[key]["step"]) if state.get(key) else None


def full_moment(engine: Engine, parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
    """Returns one of ``MOMENTS`` of a parameter that has been stepped on, float32 of its full shape.

    Every rank must call it.
    """
    if _is_plain(engine.config):
        return torch.Tensor.float(engine.basic_optimizer.state[parameter][name])
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None and name not in (mapping.optim_fragment or {}):
        _link_moments(engine)
    return torch.Tensor.float(safe_get_full_optimizer_state(parameter, name))


@torch.no_grad()
def start_moments(engine: Engine, steps: Mapping[str, float]) -> None:
    """Gives a fresh optimizer the state of one that has taken steps, with moments of zero.

    Args:
        engine: Before its first step.
        steps: For each parameter that has been stepped on, by name, how many times.
    """
    if not steps:
        return
    parameters = dict(engine.module.named_parameters())
    if _is_plain(engine.config):
        counts = {parameters[name]: step for name, step in steps.items()}
    else:
        counts = dict.fromkeys(_flat_partitions(engine), max(steps.values()))
    for stepped, step in counts.items():
        # As AdamW makes it: a fused one wants the step beside the parameter.
        state = {"step": torch.tensor(step, dtype=torch.float32, device=stepped.device)}
        state |= {name: torch.zeros_like(stepped) for name in MOMENTS}
        engine.basic_optimizer.state[stepped] = state
    _link_moments(engine)


@torch.no_grad()
def set_full_moment(engine: Engine, parameter: torch.nn.Parameter, name: str, value: torch.Tensor) -> None:
    """Sets what ``full_moment`` returns, after ``start_moments``; every rank must call it.

    Args:
        engine: The parameter's.
        parameter: One that has been stepped on.
        name: One of ``MOMENTS``.
        value: float32, of its full shape, on this rank's device; the same on every rank.
    """
    if _is_plain(engine.config):
        engine.basic_optimizer.state[parameter][name].copy_(value)
    elif _is_partitioned(parameter):
        safe_set_local_optimizer_state(parameter, _own_part(parameter, value), name)
    else:
        safe_set_full_optimizer_state(parameter, value, name)


def engine_counters(engine: Engine) -> dict[str, Any]:
    """Returns the engine's counters, schedule and loss scale as JSON values."""
    # Of float16 only; where it is no dynamic one, it is a constant of the configuration.
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    fields = _SCALER_FIELDS if getattr(scaler, "dynamic", False) else ()
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "schedule": engine.lr_scheduler.state_dict(),
        "loss_scaler": {name: getattr(scaler, name) for name in fields},
    }


def restore_counters(engine: Engine, counters: Mapping[str, Any]) -> None:
    """Restores what ``engine_counters`` returned."""
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, counters[name])
    engine.lr_scheduler.load_state_dict(dict(counters["schedule"]))
    for group, rate in zip(
        engine.basic_optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True
    ):
        # A schedule sets the rate when it steps, not when it is restored.
        group["lr"] = rate
    for name, value in counters["loss_scaler"].items():
        setattr(engine.optimizer.loss_scaler, name, value)


def zero_stage(config: Mapping[str, Any]) -> int:
    """Returns the ZeRO stage of a DeepSpeed configuration (0 where it has none)."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def is_partitioned(config: Mapping[str, Any]) -> bool:
    """Tells whether weights or their optimizer are spread over the ranks: to gather them takes them all."""
    return not _is_plain(config)


def _is_plain(config: Mapping[str, Any]) -> bool:
    return zero_stage(config) == 0 and not _is_low_precision(config)


def _is_low_precision(config: Mapping[str, Any]) -> bool:
    return any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))


def _is_partitioned(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _link_moments(engine: Engine) -> None:
    """Lets ZeRO 1 and 2 find the moments of each parameter.

    DeepSpeed does so in the first step, once the first of the optimizer's groups has been stepped on: the
    other ones are left out. Undocumented, so a test watches it.
    """
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a parameter of ZeRO 3; the last one is padded with zeros."""
    size = parameter.ds_tensor.numel()
    start = size * dist.get_rank(parameter.ds_process_group)
    part = value.flatten()[start : start + size]
    return torch.nn.functional.pad(part, (0, size - len(part)))


def _flat_partitions(engine: Engine) -> list[torch.Tensor]:
    """Returns what ZeRO's inner optimizer steps on: this rank's part of each group, flat."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if flat is not None:
        # ZeRO 3 shows them to the inner optimizer during a step only.
        return list(flat)
    return [part for group in engine.basic_optimizer.param_groups for part in group["params"]]


def _decay_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits parameters: biases and normalisation weights (one-dimensional) are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if len(full_shape(p)) > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(full_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _resolve_bf16(field: Mapping[str, Any]) -> bool:
    wanted = field.get("enabled", False)
    available = bool(get_accelerator().is_bf16_supported())
    if wanted == "auto":
        return available and get_accelerator().device_name() != "cpu"
    if wanted and not available:
        raise ResourceError("deepspeed.bf16: this device has no bfloat16; set bf16.enabled to auto or false")
    return bool(wanted)


def _turn_off_shared_memory_op() -> None:
    if get_accelerator().device_name() != "cpu":
        return
    # DeepSpeed asks this table whether the op can be built. It would fill the table by running a
    # compiler once per op, unless it is there. Undocumented, so a test watches it.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})[_SHARED_MEMORY_OP] = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
