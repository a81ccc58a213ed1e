"""The trainer, in this process over a group of one; kills and restarts in processes of their own."""

from __future__ import annotations

import errno
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distill.checkpoint
from distill.engine import stop_process_group
from distill.stage_directory import StageDirectory
from distill.stop_request import StopRequest
from distill.student import MultiHeadStudent
from distill.trainer import main, run_rank
from schemas.digest import read_document
from schemas.errors import RecipeError, RefusedError, ResourceError, TrainingError
from schemas.fault_points import FaultPoint
from schemas.job import StageJob, StudentInit
from tests.child_ranks import Kill, read_rows, read_trace, run_ranks
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


def train(job: StageJob, *, stop_after: int | None = None, keep: bool = False) -> str:
    """Trains in this process; asks to stop once ``stop_after`` steps are done."""
    directory = StageDirectory(Path(job.output))
    directory.create()
    stop: Any = StopRequest(directory) if stop_after is None else StopAfter(directory, stop_after)
    with no_launcher_environment():
        return run_rank(job, directory, stop, keep_checkpoints=keep)


class StopAfter(StopRequest):
    def __init__(self, directory: StageDirectory, steps: int) -> None:
        super().__init__(directory)
        self.steps_left = steps

    def is_set(self) -> bool:
        self.steps_left -= 1
        return self.steps_left <= 0


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        if tolerance == 0:
            assert torch.equal(value, theirs[name]), name
        elif not name.endswith("key.bias"):
            # Softmax cancels a key's bias, so its gradient is rounding alone, which Adam blows up.
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=name)


def assert_same_record(ours: Path, theirs: Path) -> None:
    for mine, other in zip(read_metrics(ours), read_metrics(theirs), strict=True):
        assert mine.pop("kind") == other.pop("kind")
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


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


DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
# By this metric the last step is the best, so that the finished weights are those after all steps.
KILLABLE: dict[str, Any] = {"checkpoint_every_steps": 2, "config": DROPOUT, "metric": "loss"}
POINTS = [point for point in FaultPoint if point.name.startswith("CHECKPOINT_")]
KILLS = [
    Kill(4),
    Kill(10, "model"),
    *(Kill(4, point) for point in POINTS),
    *(pytest.param(kill, marks=pytest.mark.slow) for kill in (Kill(1), Kill(4, "state"), Kill(10))),
]


@pytest.fixture(scope="module")
def uninterrupted(stage: TinyStage) -> Path:
    job = stage.job("uninterrupted", **KILLABLE)
    assert run_ranks(job) == [0]
    status = StageDirectory(Path(job.output)).read_status()
    assert status is not None
    assert status.best_step == status.step == 10
    return Path(job.output)


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill.where}-{kill.step}")
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(
    stage: TinyStage, uninterrupted: Path, kill: Kill
) -> None:
    job = stage.job(f"killed-{kill.where}-{kill.step}", **KILLABLE)
    assert run_ranks(job, kill=kill) == [-signal.SIGKILL]
    assert run_ranks(job) == [0]
    assert_same(read_weights(job.output), read_weights(uninterrupted), 0)
    assert read_metrics(job.output) == read_metrics(uninterrupted)
    expected = dict(read_rows(uninterrupted))
    for step, rows in read_rows(job.output):
        assert rows == expected[step]


def test_every_step_of_a_checkpoint_is_a_place_to_die() -> None:
    assert [point.name.removeprefix("CHECKPOINT_") for point in POINTS] == [
        "WRITTEN",
        "SYNCED",
        "RENAMED",
        "LISTED",
    ]


def test_a_run_that_dies_before_its_first_checkpoint_is_listed_starts_over(
    stage: TinyStage, uninterrupted: Path
) -> None:
    job = stage.job("killed-first", **KILLABLE)
    assert run_ranks(job, kill=Kill(2, FaultPoint.CHECKPOINT_RENAMED)) == [-signal.SIGKILL]
    assert run_ranks(job) == [0]
    assert_same(read_weights(job.output), read_weights(uninterrupted), 0)


RANK_CASES = [
    (1, "fp32"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((0, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
    ),
]


@pytest.mark.parametrize(("zero", "dtype"), RANK_CASES)
def test_ranks_that_are_killed_go_on_to_the_same_weights(stage: TinyStage, zero: int, dtype: str) -> None:
    fields: dict[str, Any] = {
        "checkpoint_every_steps": 2,
        "config": DROPOUT,
        "selection_fraction": 0.0,
        "deepspeed": {"zero_optimization": {"stage": zero}, "bf16": {"enabled": dtype == "bf16"}},
    }
    whole, killed = (stage.job(f"ranks-{what}-{zero}-{dtype}", **fields) for what in ("whole", "killed"))
    assert run_ranks(whole, num_ranks=2) == [0, 0]
    assert run_ranks(killed, num_ranks=2, kill=Kill(7)) == [-signal.SIGKILL, -signal.SIGKILL]
    assert run_ranks(killed, num_ranks=2) == [0, 0]
    assert_same(read_weights(killed.output), read_weights(whole.output), 0)


# Largest difference of a weight after twelve steps, of which the last six on another number of ranks, at
# a learning rate of 1e-3, without dropout. Measured at every ZeRO stage: 1.2e-7 in fp32, 8.9e-5 in bf16.
RANKS_TOLERANCES = {"fp32": 1e-6, "bf16": 5e-4}
RANK_CHANGES = [
    (1, 2, 0, "fp32"),
    (2, 1, 1, "fp32"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((1, 2, 2, "fp32"), (1, 2, 3, "fp32"), (2, 1, 3, "fp32"), (2, 1, 2, "bf16"))
    ),
]


@pytest.mark.parametrize(("before", "after", "zero", "dtype"), RANK_CHANGES)
def test_another_number_of_ranks_goes_on_from_a_checkpoint(
    stage: TinyStage, before: int, after: int, zero: int, dtype: str
) -> None:
    fields: dict[str, Any] = {
        "checkpoint_every_steps": 2,
        "selection_fraction": 0.0,
        "deepspeed": {"zero_optimization": {"stage": zero}, "bf16": {"enabled": dtype == "bf16"}},
    }
    name = f"{before}-{after}-{zero}-{dtype}"
    whole, changed = (stage.job(f"{what}-{name}", **fields) for what in ("constant", "changed"))
    assert run_ranks(whole, num_ranks=before) == [0] * before
    assert run_ranks(changed, num_ranks=before, kill=Kill(7)) == [-signal.SIGKILL] * before
    assert run_ranks(changed, num_ranks=after) == [0] * after
    assert_same(read_weights(changed.output), read_weights(whole.output), RANKS_TOLERANCES[dtype])
    assert [line["step"] for line in read_metrics(changed.output) if line["kind"] == "step"] == list(
        range(1, 13)
    )


def test_a_stopped_run_keeps_what_it_has_and_goes_on(stage: TinyStage, uninterrupted: Path) -> None:
    job = stage.job("stopped", **KILLABLE)
    assert train(job, stop_after=3) == "preempted"
    directory = StageDirectory(Path(job.output))
    status = directory.read_status()
    assert status is not None
    assert (status.state, status.step) == ("preempted", 3)
    assert not directory.model.exists()
    assert train(job) == "complete"
    assert_same(read_weights(job.output), read_weights(uninterrupted), 0)
    assert read_metrics(job.output) == read_metrics(uninterrupted)


def test_a_finished_stage_is_not_trained_again(stage: TinyStage, uninterrupted: Path) -> None:
    before = (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns
    job = stage.job("uninterrupted", **KILLABLE)
    assert train(job) == "complete"
    assert (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_frozen_embeddings_stay_as_they_were(stage: TinyStage) -> None:
    train(stage.job("thawed", max_steps=2))
    train(stage.job("frozen", max_steps=2, freeze_embeddings=True))
    job = stage.job("frozen")
    fresh = MultiHeadStudent.from_init(job.init, job.prediction_heads(), job.labels, job.seed, max_length=24)
    before = fresh.skeleton.get_input_embeddings().weight
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(read_weights(stage.root / "frozen")[name], before)
    assert not torch.equal(read_weights(stage.root / "thawed")[name], before)


def test_another_jobs_output_is_refused(stage: TinyStage, uninterrupted: Path) -> None:
    with pytest.raises(RefusedError, match="another job"):
        train(stage.job("uninterrupted", **KILLABLE, seed=12))


def test_another_jobs_checkpoints_are_refused_and_what_differs_is_named(stage: TinyStage) -> None:
    train(stage.job("refused", checkpoint_every_steps=2), stop_after=3)
    with pytest.raises(RefusedError, match="checkpoints of another job") as caught:
        train(stage.job("refused", checkpoint_every_steps=2, learning_rate=3e-4))
    assert list(caught.value.differing) == ["training.learning_rate: 0.001 -> 0.0003"]


def test_going_on_with_another_store_in_the_same_place_is_refused(stage: TinyStage, tmp_path: Path) -> None:
    root = Path(shutil.copytree(stage.stores["first"], tmp_path / "store"))
    job = stage.job("swapped", checkpoint_every_steps=2, soft_targets=(target(("first", [root])),))
    train(job, stop_after=3)
    shutil.rmtree(root)
    shutil.copytree(stage.stores["second"], root)
    with pytest.raises(RefusedError, match="other data") as caught:
        train(job)
    (differing,) = caught.value.differing
    assert differing.startswith("generation_hashes.0: ")
    # The parameters were not touched, and the store that it was goes on.
    shutil.rmtree(root)
    shutil.copytree(stage.stores["first"], root)
    assert train(job) == "complete"


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_the_result_is_the_same(
    stage: TinyStage, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = stage.job("damaged-checkpoint", **KILLABLE)
    assert train(job, stop_after=7) == "preempted"
    weights = StageDirectory(Path(job.output)).checkpoints / "step-000000007" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 16
    weights.write_bytes(data)
    assert train(job) == "complete"
    assert "step-000000007 is not used: step-000000007/model.safetensors" in caplog.text
    assert_same(read_weights(job.output), read_weights(uninterrupted), 0)


def test_no_file_of_a_training_is_a_pickle(stage: TinyStage) -> None:
    job = stage.job("no-pickle", checkpoint_every_steps=2)
    train(job, stop_after=3)
    root = Path(job.output) / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest.json", "step-000000002", "step-000000003"]
    for path in root.glob("step-*/*"):
        assert path.name in {"checkpoint.json", "model.safetensors", "optimizer.safetensors"}
    body = read_document(root / "step-000000003" / "checkpoint.json")
    assert body["origin"]["data"]["plan_hashes"] == [stage.part.source.plan_hash]
    assert len(body["origin"]["data"]["generation_hashes"]) == 2
    assert set(body["state"]) == {"data", "selection", "engine"}


def test_a_disk_that_is_full_at_the_list_is_a_resource_error_and_keeps_the_checkpoint_before(
    stage: TinyStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stage.job("full", checkpoint_every_steps=2)
    write = distill.checkpoint.write_document

    def fill(path: Path, body: Any) -> None:
        if path.name == "latest.json" and body["checkpoints"][0]["tag"] == "step-000000004":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, body)

    monkeypatch.setattr(distill.checkpoint, "write_document", fill)
    with pytest.raises(ResourceError, match=r"is the disk full\?"):
        train(job)
    monkeypatch.undo()
    stop_process_group()
    assert train(job) == "complete"
    steps = [line["step"] for line in read_metrics(job.output) if line["kind"] == "step"]
    assert steps == list(range(1, 11))


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


def test_the_trainer_loads_no_precompute_no_ray_and_no_teacher(stage: TinyStage, uninterrupted: Path) -> None:
    trace = read_trace(uninterrupted)
    roots = {name.partition(".")[0] for name in trace["modules"]}
    assert {"torch", "deepspeed", "distill"} <= roots
    assert not roots & {"precompute", "ray", "cluster", "datasets"}
    assert any("stores" in path for path in trace["opened"])
    weights = [path for path in trace["opened"] if path.endswith((".safetensors", ".bin"))]
    assert all(str(uninterrupted) in path for path in weights)


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
