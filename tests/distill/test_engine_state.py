"""An engine's state as files: the same bits at any ZeRO stage and number of ranks, and the same training."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill.engine_state
from distill.engine_state import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    gather_weights,
    load_engine_state,
    raise_together,
    save_engine_state,
)
from schemas.errors import DataError, ResourceError
from tests.distill.tiny_engine import (
    TinyModule,
    load,
    make_config,
    make_engine,
    own_group,
    read_bytes,
    run_two_ranks,
    save,
    train,
)

# torch's own compiler package, which DeepSpeed's ZeRO loads, decorates with what torch deprecates.
# DeepSpeed calls collectives by the names that they had before torch 2.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]

CASES = [(stage, dtype) for dtype in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
# DeepSpeed has an optimizer of its own for it, which collects garbage for seconds when it is made.
MIXED = (1, "mixed")
# Largest difference of a weight after three steps on another number of ranks, at a learning rate of 1e-2.
# Measured at every ZeRO stage: 3.0e-8 in fp32, 5.2e-5 in bf16.
TOLERANCES = {"fp32": 1e-6, "bf16": 5e-4, "mixed": 5e-4}
each_case = pytest.mark.parametrize(
    ("stage", "dtype"), [*CASES, pytest.param(*MIXED, marks=pytest.mark.slow)], ids=str
)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with own_group():
        yield


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one rank (``one/<case>``, at step 3), and then those of ``run_two_ranks``."""
    root = tmp_path_factory.mktemp("states")
    slow = any(item.get_closest_marker("slow") for item in request.session.items if item.path == request.path)
    cases = [*CASES, *([MIXED] if slow else [])]
    for stage, dtype in cases:
        engine = make_engine(make_config(stage, dtype))
        train(engine, range(3))
        save(engine, root / "one" / f"{stage}-{dtype}")
        engine.destroy()
    run_two_ranks(root, cases)
    return root


@each_case
def test_two_ranks_go_on_bit_for_bit(root: Path, stage: int, dtype: str) -> None:
    case = root / f"{stage}-{dtype}"
    half = read_bytes(case / "half")
    assert sorted(half) == ["counters.json", MODEL_FILE, OPTIMIZER_FILE]
    assert read_bytes(case / "again") == half
    assert read_bytes(case / "resumed") == read_bytes(case / "whole")
    assert read_bytes(case / "whole") != half


@each_case
def test_one_rank_goes_on_bit_for_bit(root: Path, stage: int, dtype: str, tmp_path: Path) -> None:
    engine = make_engine(make_config(stage, dtype))
    train(engine, range(6))
    save(engine, tmp_path / "whole")
    engine.destroy()
    engine = make_engine(make_config(stage, dtype))
    load(engine, root / "one" / f"{stage}-{dtype}")
    train(engine, range(3, 6))
    save(engine, tmp_path / "resumed")
    engine.destroy()
    assert read_bytes(tmp_path / "resumed") == read_bytes(tmp_path / "whole")


def test_moments_that_lie_on_the_cpu_go_on_bit_for_bit(tmp_path: Path) -> None:
    config = make_config(2, "bf16") | {"zero_force_ds_cpu_optimizer": False}
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    for name, source in (("whole", None), ("resumed", tmp_path / "half")):
        engine = make_engine(config)
        if source is None:
            train(engine, range(3))
            save(engine, tmp_path / "half")
        else:
            load(engine, source)
        train(engine, range(3, 6))
        save(engine, tmp_path / name)
        engine.destroy()
    assert read_bytes(tmp_path / "resumed") == read_bytes(tmp_path / "whole")


def difference(ours: Path, theirs: Path) -> float:
    mine, other = load_file(ours / MODEL_FILE), load_file(theirs / MODEL_FILE)
    assert list(mine) == list(other)
    return max(float((mine[name] - other[name]).abs().max()) for name in mine)


@each_case
def test_two_ranks_take_over_from_one(root: Path, stage: int, dtype: str, tmp_path: Path) -> None:
    case = root / f"{stage}-{dtype}"
    assert read_bytes(case / "copied") == read_bytes(root / "one" / f"{stage}-{dtype}")
    engine = make_engine(make_config(stage, dtype))
    train(engine, range(6))
    save(engine, tmp_path / "whole")
    engine.destroy()
    assert difference(case / "continued", tmp_path / "whole") <= TOLERANCES[dtype]


@each_case
def test_one_rank_takes_over_from_two(root: Path, stage: int, dtype: str, tmp_path: Path) -> None:
    case = root / f"{stage}-{dtype}"
    engine = make_engine(make_config(stage, dtype))
    load(engine, case / "half")
    save(engine, tmp_path / "copied")
    assert read_bytes(tmp_path / "copied") == read_bytes(case / "half")
    train(engine, range(3, 6))
    save(engine, tmp_path / "continued")
    engine.destroy()
    assert difference(tmp_path / "continued", case / "whole") <= TOLERANCES[dtype]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("other", [0, 1, 2, 3])
def test_every_zero_stage_takes_over_from_every_other(
    root: Path, stage: int, other: int, tmp_path: Path
) -> None:
    source = root / f"{other}-fp32" / "half"
    engine = make_engine(make_config(stage, "fp32"))
    load(engine, source)
    save(engine, tmp_path)
    engine.destroy()
    assert read_bytes(tmp_path) == read_bytes(source)


def test_the_files_hold_float32_weights_moments_and_steps_by_parameter(root: Path) -> None:
    for stage, dtype in CASES:
        directory = root / f"{stage}-{dtype}" / "half"
        model, optimizer = load_file(directory / MODEL_FILE), load_file(directory / OPTIMIZER_FILE)
        assert sorted(model) == sorted(TinyModule().state_dict())
        assert {name: value.dtype for name, value in model.items() if value.dtype != torch.float32} == {
            "count": torch.int64
        }
        assert model["count"].tolist() == [3, 3, 3]
        trained = [name for name, value in TinyModule().named_parameters() if value.requires_grad]
        assert sorted(optimizer) == sorted(
            f"{name}.{key}" for name in trained for key in ("exp_avg", "exp_avg_sq", "step")
        )
        for name in trained:
            assert float(optimizer[f"{name}.step"]) == 3.0
            assert optimizer[f"{name}.exp_avg"].shape == model[name].shape
            # Every parameter's moments are there, not only those of the optimizer's first group.
            assert float(optimizer[f"{name}.exp_avg"].abs().max()) > 0
            assert float(optimizer[f"{name}.exp_avg_sq"].min()) >= 0


def test_before_the_first_step_there_are_no_moments_and_a_shared_weight_is_stored_once(
    tmp_path: Path,
) -> None:
    def build() -> Any:
        module = TinyModule()
        module.tied = module.above
        return make_engine({}, module)

    engine = build()
    save(engine, tmp_path / "fresh")
    assert load_file(tmp_path / "fresh" / OPTIMIZER_FILE) == {}
    train(engine, range(1))
    save(engine, tmp_path / "stepped")
    for file in (MODEL_FILE, OPTIMIZER_FILE):
        assert not [name for name in load_file(tmp_path / "stepped" / file) if name.startswith("tied")]
    assert torch.equal(gather_weights(engine)["tied.weight"], engine.module.above.weight)
    for source in ("fresh", "stepped"):
        again = build()
        load(again, tmp_path / source)
        save(again, tmp_path / "again")
        assert read_bytes(tmp_path / "again") == read_bytes(tmp_path / source)


def test_a_schedule_goes_on_where_it_was(root: Path) -> None:
    engine = make_engine({})
    load(engine, root / "one" / "0-fp32")
    # Two of ten steps warm up; three are done, and the fourth is one eighth down the slope.
    assert engine.get_lr() == [0.01 * 7 / 8] * 2
    assert engine.global_steps == 3


def test_a_loss_scale_is_part_of_the_state(tmp_path: Path) -> None:
    # The CPU has no fp16 engine to be had everywhere; its scaler is an object with these numbers.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def scaler() -> Any:
        return DynamicLossScaler(2.0**16, 1000, 1, 2, False)

    engine = make_engine(make_config(1, "fp32"))
    engine.optimizer.loss_scaler = scaler()
    for overflow in (False, True, True):
        engine.optimizer.loss_scaler.update_scale(overflow)
    expected = dict(vars(engine.optimizer.loss_scaler))
    counters = json.loads(json.dumps(save_engine_state(engine, tmp_path)))
    assert counters["loss_scaler"]["cur_scale"] == 2.0**15
    engine.optimizer.loss_scaler = scaler()
    load_engine_state(engine, tmp_path, counters)
    assert vars(engine.optimizer.loss_scaler) == expected
    engine.destroy()


def test_a_full_disk_is_a_resource_error_and_gathering_still_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(make_config(3, "fp32"))
    train(engine, range(1))
    gathered = []
    full_parameter = distill.engine_state.full_parameter

    def gather(parameter: torch.nn.Parameter) -> torch.Tensor:
        gathered.append(parameter)
        return full_parameter(parameter)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distill.engine_state, "full_parameter", gather)
    monkeypatch.setattr(distill.engine_state, "write_tensors", fail)
    with pytest.raises(ResourceError, match=r"No space left on device.*is the disk full\?"):
        save_engine_state(engine, tmp_path)
    # Another rank would wait for this one in the parameters that are left.
    assert len(gathered) == len(list(engine.module.parameters()))
    engine.destroy()


def test_a_fault_of_another_kind_is_not_said_to_be_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"Input/output error\); check the file system"):
        raise_together(OSError(errno.EIO, "Input/output error"), torch.device("cpu"), tmp_path)


def test_another_models_files_are_refused(root: Path, tmp_path: Path) -> None:
    source = root / "one" / "0-fp32"
    for name, change in (
        (MODEL_FILE, {"below.weight": torch.zeros(5, 7)}),
        (OPTIMIZER_FILE, {"norm.bias.exp_avg": torch.zeros(6)}),
    ):
        for file in (MODEL_FILE, OPTIMIZER_FILE):
            tensors = load_file(source / file)
            save_file({**tensors, **(change if file == name else {})}, tmp_path / file)
        with pytest.raises(DataError, match=r"below\.weight|norm\.bias"):
            load_engine_state(make_engine({}), tmp_path, {})
    (tmp_path / OPTIMIZER_FILE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(DataError):
        load_engine_state(make_engine({}), tmp_path, {})


@pytest.mark.parametrize("stage", [0, 3])
def test_gathered_weights_are_copies(stage: int) -> None:
    engine = make_engine(make_config(stage, "fp32"))
    before = gather_weights(engine)
    kept = {name: value.clone() for name, value in before.items()}
    train(engine, range(2))
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert not torch.equal(gather_weights(engine)["above.weight"], kept["above.weight"])
    engine.destroy()
