"""Training that is killed, stopped or moved to another number of ranks, and goes on from a checkpoint."""

from __future__ import annotations

import errno
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import distill.checkpoint
from distill.engine import stop_process_group
from distill.stage_directory import StageDirectory
from schemas.digest import read_document
from schemas.errors import RefusedError, ResourceError
from schemas.fault_points import FaultPoint
from tests.child_ranks import Kill, read_rows, run_ranks
from tests.distill.tiny_training import assert_same, train
from tests.store_factory import target
from tests.tiny_stage import TinyStage, read_metrics, read_weights

# torch's own compiler package, which DeepSpeed's ZeRO loads, decorates with what torch deprecates.
# DeepSpeed calls collectives by the names that they had before torch 2.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyStage:
    return TinyStage(tmp_path_factory.mktemp("stage"))


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


def test_a_checkpoint_that_cannot_be_written_ends_every_rank(stage: TinyStage) -> None:
    job = stage.job("unwritable", checkpoint_every_steps=2)
    path = StageDirectory(Path(job.output)).checkpoints
    path.parent.mkdir()
    # Root may write anywhere, but not below a file.
    path.write_text("a file where a directory is wanted")
    assert run_ranks(job, num_ranks=2) == [6, 6]
    first, second = StageDirectory(Path(job.output)).read_failures()
    assert first.error is not None
    assert "cannot be written whole" in first.error
    assert second.error is not None
    assert "rank 0 cannot write" in second.error
