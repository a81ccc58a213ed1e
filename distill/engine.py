"""The DeepSpeed engine: the only module that imports deepspeed.

Legend: P = elements of one parameter.

Invariants:
    1. DeepSpeed's shared-memory op is never built: it wants a compiler, takes half a minute and
       leaves 66 MiB in ``/dev/shm`` (tests/distill/test_engine.py).
    2. Batch fields, optimizer and schedule come from the job, never from the user's configuration
       (tests/distill/test_engine.py).
    3. ``gather_weights`` returns full float32 weights at every ZeRO stage
       (tests/distill/test_engine.py).
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill.learning_rate import rate_factor
from schemas.errors import RecipeError, ResourceError
from schemas.job import StageJob

if not torch.accelerator.is_available():
    # Else DeepSpeed warns, on every import, that it guessed.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

_SHARED_MEMORY_OP = "deepspeed_shm_comm"
_BATCH_FIELDS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# What torch.save says of a write that was cut short; the operating system's error is lost there.
_CUT_SHORT = re.compile(r"unexpected pos \d+|PytorchStreamWriter failed writing")
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
        single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in single.items()})
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


def build_engine(module: torch.nn.Module, job: StageJob, plan: StepPlan) -> deepspeed.DeepSpeedEngine:
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


def engine_config(job: StageJob, plan: StepPlan, world_size: int) -> dict[str, Any]:
    """Returns the user's DeepSpeed configuration completed with what the job decides.

    In low precision ZeRO 0 becomes ZeRO 1, which computes the same.

    Raises:
        RecipeError: It sets batch fields, optimizer, scheduler, or another clip than ``max_grad_norm``.
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


def take_step(engine: deepspeed.DeepSpeedEngine, max_grad_norm: float) -> float:
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


def gather_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Collects the full weights; every rank must call it.

    Returns:
        The module's state dict on the CPU: float32 parameters (from the optimizer's own copy where
        the module computes in another type or is partitioned), buffers as they are.
    """
    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    weights: dict[str, torch.Tensor] = {}
    for name, value in engine.module.state_dict().items():
        parameter = parameters.get(name)
        full = value if parameter is None else _full_parameter(parameter)
        weights[name] = full.detach().to("cpu", copy=True)
    return weights


def save_engine(engine: deepspeed.DeepSpeedEngine, directory: Path, tag: str) -> None:
    """Writes weights, optimizer and schedule to ``directory/tag``; every rank must call it.

    Raises:
        ResourceError: The disk is full.
    """
    try:
        engine.save_checkpoint(str(directory), tag=tag, save_latest=False)
    except RuntimeError as error:
        if not _CUT_SHORT.search(str(error)):
            raise
        raise ResourceError(
            f"{directory}: the checkpoint cannot be written whole; is the disk full? "
            "Free space and run the same command again"
        ) from error


def load_engine(engine: deepspeed.DeepSpeedEngine, directory: Path, tag: str) -> None:
    """Restores what ``save_engine`` wrote; every rank must call it."""
    engine.load_checkpoint(str(directory), tag=tag)


def zero_stage(config: Mapping[str, Any]) -> int:
    """Returns the ZeRO stage of a DeepSpeed configuration (0 where it has none)."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def is_partitioned(config: Mapping[str, Any]) -> bool:
    """Tells whether the optimizer's state is spread over the ranks, so that their number is fixed."""
    return not _is_plain(config)


def _is_plain(config: Mapping[str, Any]) -> bool:
    return zero_stage(config) == 0 and not _is_low_precision(config)


def _is_low_precision(config: Mapping[str, Any]) -> bool:
    return any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))


def _full_parameter(parameter: torch.nn.Parameter) -> torch.Tensor:
    partitioned = hasattr(parameter, "ds_id")
    if partitioned or parameter.dtype != torch.float32:
        full = safe_get_full_fp32_param(parameter)
        if full is not None:
            return full
    if partitioned:
        # A frozen parameter of ZeRO 3 has no optimizer copy.
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return parameter.detach().float()


def _decay_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits parameters: biases and normalisation weights (one-dimensional) are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if _num_dimensions(p) > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if _num_dimensions(p) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _num_dimensions(parameter: torch.nn.Parameter) -> int:
    # ZeRO 3 empties the tensor and keeps the shape beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))


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
