"""The trainer, in this process over a group of one, and on several ranks in processes of their own."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.engine import stop_process_group
from distill.stage_directory import StageDirectory
from distill.stop_request import StopRequest
from distill.student import MultiHeadStudent
from distill.trainer import main
from schemas.errors import RecipeError, TrainingError
from schemas.job import StudentInit
from tests.child_ranks import read_trace, run_ranks
from tests.distill.tiny_training import assert_same, assert_same_record, train
from tests.store_factory import make_part, make_store, target
from tests.tiny_stage import TinyStage, no_launcher_environment, read_metrics, read_weights, write_job

# torch's own compiler package, which DeepSpeed's ZeRO loads, decorates with what torch deprecates.
# DeepSpeed calls collectives by the names that they had before torch 2.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyStage:
    return TinyStage(tmp_path_factory.mktemp("stage"))


def test_a_stage_leaves_a_model_a_record_and_a_complete_status(stage: TinyStage) -> None:
    job = stage.job("plain")
    assert train(job) == "complete"
    directory = StageDirectory(Path(job.output))
    status = directory.read_status()
    assert status is not None
    assert status.state == "complete"
    assert status.fingerprint == job.fingerprint()
    # 38 of 48 rows in steps of 8, twice.
    assert status.step == 10
    assert status.peak_rss_bytes is not None
    assert status.peak_rss_bytes > 10_000_000
    assert not directory.checkpoints.exists()
    student = MultiHeadStudent.from_pretrained(directory.model)
    assert student.layout.heads == ("golden", "first", "second")
    assert student.layout.max_length == 24
    lines = read_metrics(job.output)
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 11))
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [5, 10]
    first = lines[0]
    assert first["loss"] == pytest.approx(0.5 * first["golden_loss"] + 0.5 * first["soft_loss"], rel=1e-6)
    assert list((directory.path / "tensorboard").glob("events*"))


def test_the_step_is_independent_of_accumulation(stage: TinyStage) -> None:
    train(stage.job("whole", max_micro_batch=8))
    train(stage.job("quarters", max_micro_batch=2))
    assert_same(read_weights(stage.root / "whole"), read_weights(stage.root / "quarters"), 1e-5)
    assert_same_record(stage.root / "whole", stage.root / "quarters")


@pytest.mark.parametrize("zero", [0, *(pytest.param(level, marks=pytest.mark.slow) for level in (1, 2, 3))])
def test_the_step_is_independent_of_the_number_of_ranks(stage: TinyStage, zero: int) -> None:
    deepspeed = {"zero_optimization": {"stage": zero}}
    one, two = f"one-{zero}", f"two-{zero}"
    # 38 rows in steps of 7: shares are unequal, and the last step is short.
    fields: dict[str, Any] = {"global_batch": 7, "max_micro_batch": 3, "deepspeed": deepspeed, "epochs": 1}
    assert run_ranks(stage.job(one, **fields)) == [0]
    assert run_ranks(stage.job(two, **fields), num_ranks=2) == [0, 0]
    assert_same(read_weights(stage.root / one), read_weights(stage.root / two), 1e-5)
    assert_same_record(stage.root / one, stage.root / two)


def test_frozen_embeddings_stay_as_they_were(stage: TinyStage) -> None:
    train(stage.job("thawed", max_steps=2))
    train(stage.job("frozen", max_steps=2, freeze_embeddings=True))
    job = stage.job("frozen")
    fresh = MultiHeadStudent.from_init(job.init, job.prediction_heads(), job.labels, job.seed, max_length=24)
    before = fresh.skeleton.get_input_embeddings().weight
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(read_weights(stage.root / "frozen")[name], before)
    assert not torch.equal(read_weights(stage.root / "thawed")[name], before)


def test_the_best_step_is_kept_and_patience_ends_the_training(stage: TinyStage) -> None:
    # The rate is so high that later steps only do harm.
    fields: dict[str, Any] = {"learning_rate": 0.3, "warmup": 0.0, "schedule": "constant", "epochs": 20}
    job = stage.job("early", metric="loss", patience=2, eval_every_steps=1, **fields)
    train(job)
    evaluations = [line for line in read_metrics(job.output) if line["kind"] == "evaluation"]
    losses = [line["loss"] for line in evaluations]
    best = losses.index(min(losses)) + 1
    status = StageDirectory(Path(job.output)).read_status()
    assert status is not None
    assert (status.best_step, status.best_value) == (best, min(losses))
    assert len(evaluations) == best + 2
    # The model is that of the best step: training for so many steps gives it.
    shorter = stage.job("early-short", selection_fraction=0.2, max_steps=best, **{**fields, "epochs": 1})
    train(shorter)
    assert_same(read_weights(job.output), read_weights(shorter.output), 0)


def test_without_selection_the_last_weights_are_the_model(stage: TinyStage) -> None:
    job = stage.job("unselected", selection_fraction=0.0, epochs=1)
    train(job)
    lines = read_metrics(job.output)
    assert {line["kind"] for line in lines} == {"step"}
    assert lines[-1]["step"] == 6


def test_a_loss_that_is_not_finite_ends_the_training(stage: TinyStage) -> None:
    with pytest.raises(TrainingError, match="lower learning_rate"):
        train(stage.job("diverging", learning_rate=1e30, warmup=0.0, max_grad_norm=0.0, epochs=4))


def test_selecting_by_the_soft_loss_without_a_teacher_is_an_error_before_the_first_step(
    stage: TinyStage,
) -> None:
    job = stage.job("no-teacher", teachers=(), metric="soft_loss")
    with pytest.raises(RecipeError, match="metric: soft_loss cannot be measured"):
        train(job)
    assert not StageDirectory(Path(job.output)).metrics.exists()


def test_selecting_by_accuracy_where_no_row_is_labelled_is_an_error(stage: TinyStage) -> None:
    texts = [("a", "b")] * 20
    part = make_part(stage.root / "bare" / "rows.arrow", texts, [-1] * 20, shard_rows=10)
    root = make_store(
        stage.root / "stores" / "bare", part.plan, np.zeros((20, 2), np.float32), labels=("yes", "no")
    )
    fields: dict[str, Any] = {"parts": (part.source,), "soft_targets": (target(("t", [root])),), "alpha": 1.0}
    with pytest.raises(RecipeError, match="accuracy cannot be measured"):
        train(stage.job("bare", metric="accuracy", **fields))
    assert not StageDirectory(stage.root / "bare").metrics.exists()
    train(stage.job("bare-soft", **fields))
    status = StageDirectory(stage.root / "bare-soft").read_status()
    assert status is not None
    assert status.best_value is not None


def test_a_second_stage_starts_from_the_first(stage: TinyStage) -> None:
    first = stage.job("stage-1", alpha=1.0)
    train(first)
    init = StudentInit(
        kind="student", path=str(stage.root / "stage-1" / "model"), fingerprint=first.fingerprint()
    )
    second = stage.job("stage-2", init=init, learning_rate=1e-12)
    train(second)
    before, after = read_weights(first.output), read_weights(second.output)
    # A new golden head comes first; the soft heads carry on.
    torch.testing.assert_close(after["classifier.weight"][2:], before["classifier.weight"], atol=1e-6, rtol=0)


def test_the_trainer_loads_no_precompute_no_ray_and_no_teacher(stage: TinyStage) -> None:
    job = stage.job("traced", epochs=1)
    assert run_ranks(job, fresh=True) == [0]
    trace = read_trace(job.output)
    roots = {name.partition(".")[0] for name in trace["modules"]}
    assert {"torch", "deepspeed", "distill"} <= roots
    assert not roots & {"precompute", "ray", "cluster", "datasets"}
    assert any("stores" in path for path in trace["opened"])
    weights = [path for path in trace["opened"] if path.endswith((".safetensors", ".bin"))]
    assert all(job.output in path for path in weights)


def test_a_damaged_store_leaves_a_failed_status_with_its_exit_code(
    stage: TinyStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(stage.stores["first"], tmp_path / "first"))
    shard = next((root / "data").glob("s000002-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    job = stage.job("damaged", soft_targets=(target(("first", [root])),))
    # The handlers are this process's; so are the filters of warnings.
    monkeypatch.setattr(StopRequest, "install", lambda self: None)
    with no_launcher_environment(), warnings.catch_warnings():
        assert main(["--job", str(write_job(job)), "--local_rank=0"]) == 3
    status = StageDirectory(Path(job.output)).read_status()
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", 3)
    assert status.error is not None
    assert str(root) in status.error
    assert "shard 2" in status.error
    stop_process_group()
