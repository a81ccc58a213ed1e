"""What an engine has learnt, as files: full weights and moments by parameter name, at any ZeRO stage.

``model.safetensors`` holds the parameters in float32 (the optimizer's own copy where the module computes
in another type) and the buffers; ``optimizer.safetensors`` holds, for each parameter that has been
stepped on, ``<name>.exp_avg``, ``<name>.exp_avg_sq`` (float32, its shape) and ``<name>.step``. Counters,
schedule and loss scale are returned as JSON values. Nothing is pickled.

Rank 0 alone opens files. Parameters are gathered, and given out again, one by one: rank 0 holds one of
them on the CPU, and no rank holds more of the model than its own share.

No random state is stored, because none outlives a step: the trainer seeds torch's generators, the
CPU's and the devices', anew in each step from (seed, step, rank), the order of rows is a pure function
of the data's position, and evaluation draws nothing.

Invariants:
    1. What is loaded is bit for bit what was saved, whatever the numbers of ranks and ZeRO stages of the
       engine that saved and of the one that loads (tests/distill/test_engine_state.py). Only the sign of
       a moment that is zero may be lost: DeepSpeed adds up the ranks' parts.
    2. At the same number of ranks and the same stage training goes on bit for bit
       (tests/distill/test_engine_state.py, tests/distill/test_resume.py). At another one the gradients are
       summed in another order, which is rounding alone (after six steps weights within 1e-6 in fp32 and
       5e-4 in bf16, but for those whose gradient is nothing but rounding, such as a key's bias); dropout,
       whose seeds name the rank, then draws other masks.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from distill.engine import (
    MOMENTS,
    Engine,
    engine_counters,
    full_moment,
    full_parameter,
    full_shape,
    restore_counters,
    set_full_moment,
    set_full_parameter,
    start_moments,
    step_of,
)
from distill.tensor_file import TensorSpec, write_tensors
from schemas.errors import DataError, ResourceError

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_STEP = "step"


def gather_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Collects the full weights on rank 0; every rank must call it, unless each has all of them.

    Returns:
        The module's state dict on the CPU: float32 parameters, buffers as they are. On ranks above 0
        it is empty.
    """
    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    weights: dict[str, torch.Tensor] = {}
    for name, value in engine.module.state_dict().items():
        parameter = parameters.get(name)
        full = value if parameter is None else full_parameter(parameter)
        if dist.get_rank() == 0:
            weights[name] = full.detach().to("cpu", copy=True)
    return weights


def save_engine_state(engine: Engine, directory: Path) -> dict[str, Any]:
    """Writes weights and optimizer into ``directory``; every rank must call it.

    Args:
        engine: Between two steps.
        directory: Where rank 0 puts the files; made if it is absent.

    Returns:
        Counters, schedule and loss scale, for ``load_engine_state``.

    Raises:
        ResourceError: The files cannot be written; raised on every rank.
    """
    failure: OSError | None = None
    if dist.get_rank() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            failure = error
    weights, moments = _weight_specs(engine), _state_specs(engine)
    for name, specs, tensors in (
        (MODEL_FILE, weights, _weights(engine)),
        (OPTIMIZER_FILE, moments, _states(engine)),
    ):
        if dist.get_rank() == 0 and failure is None:
            try:
                write_tensors(directory / name, specs, tensors)
            except OSError as error:
                failure = error
        # Gathering takes all ranks, so it goes on to its end also where nobody wants the rest.
        for _ in tensors:
            pass
    raise_together(failure, engine.device, directory)
    return engine_counters(engine)


def load_engine_state(engine: Engine, directory: Path, counters: dict[str, Any]) -> None:
    """Restores what ``save_engine_state`` wrote into a fresh engine; every rank must call it.

    Args:
        engine: Before its first step; any number of ranks, any ZeRO stage.
        directory: Read by rank 0 only, which must have checked the files' hashes.
        counters: What ``save_engine_state`` returned.

    Raises:
        DataError: The files cannot be read, or hold another model; raised on every rank.
    """
    plan: list[Any] = [None, None]
    if dist.get_rank() == 0:
        # One rank decides, so that all wait for the same tensors.
        plan = [_read_steps(engine, directory), None]
        if isinstance(plan[0], str):
            plan = [None, plan[0]]
    dist.broadcast_object_list(plan, src=0, device=engine.device)
    steps, problem = plan
    if problem is not None:
        raise DataError(f"{directory}: {problem}")
    model = _SharedFile(directory / MODEL_FILE, engine.device)
    for name, parameter in engine.module.named_parameters():
        set_full_parameter(parameter, model.take(name, TensorSpec(full_shape(parameter))))
    for name, buffer in _buffers(engine):
        buffer.copy_(model.take(name, TensorSpec(tuple(buffer.shape), buffer.dtype)))
    optimizer = _SharedFile(directory / OPTIMIZER_FILE, engine.device)
    start_moments(engine, steps)
    for name, parameter in engine.module.named_parameters():
        for moment in MOMENTS if name in steps else ():
            value = optimizer.take(f"{name}.{moment}", TensorSpec(full_shape(parameter)))
            set_full_moment(engine, parameter, moment, value)
    restore_counters(engine, counters)


def raise_together(failure: OSError | None, device: torch.device, path: Path) -> None:
    """Lets all ranks know of a write that failed on rank 0, so that none waits for it.

    Args:
        failure: Rank 0's, if there was one.
        device: Of this rank.
        path: What was being written.

    Raises:
        ResourceError: On every rank, if there was one.
    """
    flag = torch.tensor(int(failure is not None), device=device)
    dist.broadcast(flag, src=0)
    if failure is not None:
        full = failure.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "is the disk full? Free space" if full else "check the file system"
        raise ResourceError(
            f"{path}: the checkpoint cannot be written whole ({failure.strerror}); {advice} and run the "
            "same command again"
        ) from failure
    if int(flag):
        raise ResourceError(f"{path}: rank 0 cannot write the checkpoint")


class _SharedFile:
    """A tensor file that rank 0 reads and gives out, one tensor at a time."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._device = device
        self._file = safe_open(path, framework="pt") if dist.get_rank() == 0 else None

    def take(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """Returns a tensor on this rank's device; every rank must call it."""
        if self._file is None:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        else:
            tensor = self._file.get_tensor(name).to(self._device)
        if tensor.numel():
            # As bytes, since not every backend knows every type.
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0)
        return tensor


def _read_steps(engine: Engine, directory: Path) -> dict[str, float] | str:
    """Returns each stepped parameter's step, or what is wrong with the files."""
    expected = {name: spec.shape for name, spec in _weight_specs(engine).items()}
    try:
        with safe_open(directory / MODEL_FILE, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
        if found != expected:
            wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
            return f"{MODEL_FILE} holds another model; they differ in {', '.join(wrong[:3])}"
        with safe_open(directory / OPTIMIZER_FILE, framework="pt") as file:
            keys = set(file.offset_keys())
            names = [name for name in expected if f"{name}.{_STEP}" in keys]
            for name in names:
                for key in MOMENTS:
                    if tuple(file.get_slice(f"{name}.{key}").get_shape()) != expected[name]:
                        return f"{OPTIMIZER_FILE} has another shape of {name}"
            return {name: float(file.get_tensor(f"{name}.{_STEP}")) for name in names}
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({error})"


def _buffers(engine: Engine) -> list[tuple[str, torch.Tensor]]:
    """Returns the buffers that belong to the state."""
    names = engine.module.state_dict().keys()
    return [(name, buffer) for name, buffer in engine.module.named_buffers() if name in names]


def _weight_specs(engine: Engine) -> dict[str, TensorSpec]:
    specs = {name: TensorSpec(full_shape(value)) for name, value in engine.module.named_parameters()}
    return specs | {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in _buffers(engine)}


def _weights(engine: Engine) -> Iterator[torch.Tensor]:
    for parameter in engine.module.parameters():
        yield full_parameter(parameter)
    for _, buffer in _buffers(engine):
        yield buffer


def _state_specs(engine: Engine) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, parameter in engine.module.named_parameters():
        if step_of(engine, parameter) is not None:
            specs |= {f"{name}.{key}": TensorSpec(full_shape(parameter)) for key in MOMENTS}
            specs[f"{name}.{_STEP}"] = TensorSpec(())
    return specs


def _states(engine: Engine) -> Iterator[torch.Tensor]:
    for parameter in engine.module.parameters():
        step = step_of(engine, parameter)
        if step is not None:
            for key in MOMENTS:
                yield full_moment(engine, parameter, key)
            yield torch.tensor(step)
