"""The list of checkpoints: what it shows, what it refuses, what it keeps."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.checkpoint import LATEST_FILE, STATE_FILE, CheckpointDirectory, Origin
from schemas.digest import read_document, write_document
from schemas.errors import DataError, RefusedError
from schemas.fault_points import FaultPoint, listen

FILES = ("model.safetensors", "optimizer.safetensors")
ORIGIN = Origin(
    fingerprint="f" * 64,
    job={
        "seed": 1,
        "soft_targets": [{"stores": [["/old/stores/plan-generation"]]}],
        "training": {"alpha": 0.5},
    },
    data={"plan_hashes": ["p"], "generation_hashes": ["g", "h"], "seed": 1},
)


def save(directory: CheckpointDirectory, step: int, best_step: int | None = None) -> None:
    directory.prepare(step)
    temporary = directory.temporary(step)
    temporary.mkdir(parents=True)
    for name in FILES:
        (temporary / name).write_bytes(b"%s of step %d" % (name.encode(), step))
    directory.commit(step, ORIGIN, 2, best_step, {"note": f"state of step {step}"})


def find_step(directory: CheckpointDirectory) -> int | None:
    found = directory.find(ORIGIN)
    return None if found is None else found.step


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "checkpoints")


def test_without_a_list_there_is_no_checkpoint(directory: CheckpointDirectory) -> None:
    directory.place(5).mkdir(parents=True)
    assert directory.find(ORIGIN) is None


def test_the_newest_of_the_last_two_is_found(directory: CheckpointDirectory) -> None:
    for step in (5, 10, 15):
        save(directory, step)
    found = directory.find(ORIGIN)
    assert found is not None
    assert (found.step, found.state, found.origin) == (15, {"note": "state of step 15"}, ORIGIN)
    assert sorted(found.files) == list(FILES)
    kept = sorted(path.name for path in directory.path.iterdir())
    assert kept == [LATEST_FILE, "step-000000010", "step-000000015"]
    assert sorted(path.name for path in directory.place(15).iterdir()) == [STATE_FILE, *FILES]


@pytest.mark.parametrize("name", [STATE_FILE, *FILES])
def test_no_flipped_bit_of_a_checkpoint_goes_unnoticed(directory: CheckpointDirectory, name: str) -> None:
    save(directory, 5)
    save(directory, 10)
    path = directory.place(10) / name
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert find_step(CheckpointDirectory(directory.path)) == 5, position
    path.write_bytes(data)
    assert find_step(directory) == 10


@pytest.mark.parametrize("name", [STATE_FILE, *FILES])
@pytest.mark.parametrize("damage", ["truncate", "append", "remove", "directory", "empty"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    directory: CheckpointDirectory, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(directory, 5)
    save(directory, 10)
    path = directory.place(10) / name
    data = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "remove":
        path.write_bytes({"truncate": data[:-1], "append": data + b"\0", "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert find_step(directory) == 5
    (record,) = caplog.records
    assert "step-000000010 is not used" in record.getMessage()
    assert name in record.getMessage()
    # Training on from there replaces the damaged one.
    save(directory, 10)
    assert find_step(directory) == 10


def test_a_damaged_checkpoint_does_not_push_out_the_one_before(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    save(directory, 10)
    (directory.place(10) / FILES[0]).unlink()
    again = CheckpointDirectory(directory.path)
    assert find_step(again) == 5
    save(again, 15)
    shutil.rmtree(again.place(15))
    assert find_step(again) == 5


def test_if_all_are_damaged_that_is_said(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    (directory.place(5) / FILES[0]).unlink()
    with pytest.raises(DataError, match=r"all checkpoints are damaged; delete.*model.safetensors is missing"):
        directory.find(ORIGIN)


@pytest.mark.parametrize("damage", ["flip", "truncate", "edit", "empty", "other format"])
def test_if_the_list_is_damaged_the_directories_are_looked_through(
    directory: CheckpointDirectory, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        directory.best_model(step - 1).mkdir(parents=True)
        save(directory, step, best_step=step - 1)
    path = directory.path / LATEST_FILE
    data = path.read_bytes()
    if damage == "flip":
        data = data.replace(b"step-000000010", b"step-000000011")
    path.write_bytes(
        {
            "truncate": data[:-9],
            "edit": data.replace(b"step-000000010", b"../../../../10"),
            "empty": b"",
            "other format": b'{"checkpoints": 3}',
        }.get(damage, data)
    )
    directory.place(99).mkdir()
    (directory.path / "step-of-somebody").mkdir()
    (directory.place(10) / FILES[1]).write_bytes(b"damaged as well")
    with caplog.at_level(logging.WARNING):
        assert find_step(directory) == 5
    assert LATEST_FILE in caplog.text
    assert "step-000000010 is not used" in caplog.text
    # The weights that it refers to are still known to be needed, and the next commit mends the list.
    directory.prune_best(None)
    assert directory.best_model(4).exists()
    save(directory, 15)
    listed = [entry["tag"] for entry in read_document(path)["checkpoints"]]
    assert listed == ["step-000000015", "step-000000005"]
    assert find_step(directory) == 15


def test_a_tag_cannot_lead_out_of_the_directory(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    outside = directory.path.parent / "step-000000005"
    shutil.move(directory.place(5), outside)
    path = directory.path / LATEST_FILE
    body = read_document(path)
    body["checkpoints"][0]["tag"] = "../step-000000005"
    write_document(path, body)
    assert directory.find(ORIGIN) is None


def test_a_file_name_cannot_lead_out_of_the_directory(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    state = directory.place(5) / STATE_FILE
    body = read_document(state)
    body["files"] = {"../" + name: record for name, record in body["files"].items()}
    write_document(state, body)
    # The list is gone, so that nothing but the file's own digest speaks for it.
    (directory.path / LATEST_FILE).write_text("")
    with pytest.raises(DataError, match=r"all checkpoints are damaged.*checkpoint\.json"):
        directory.find(ORIGIN)


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("data", {"generation_hashes": ["g", "x"]}, "generation_hashes.1: h -> x"),
        ("data", {"plan_hashes": ["q"]}, "plan_hashes.0: p -> q"),
        ("data", {"seed": 2}, "seed: 1 -> 2"),
        ("data", {"generation_hashes": ["g"]}, "generation_hashes: ['g', 'h'] -> ['g']"),
        ("job", {"training": {"alpha": 0.9}}, "training.alpha: 0.5 -> 0.9"),
        (
            "job",
            {"soft_targets": [{"stores": [["/old/stores/plan-other"]]}]},
            "soft_targets.0.stores.0.0: plan-generation -> plan-other",
        ),
        ("job", {"training": {"alpha": 0.5, "beta": 1}}, "training.beta: None -> 1"),
        ("job", {}, f"job: {'f' * 16} -> {'0' * 16}"),
    ],
)
def test_another_store_or_another_job_is_refused_and_the_field_is_named(
    directory: CheckpointDirectory, part: str, change: dict[str, Any], expected: str
) -> None:
    save(directory, 5)
    fields: dict[str, Any] = {part: {**getattr(ORIGIN, part), **change}}
    if part == "job":
        fields["fingerprint"] = "0" * 64
    with pytest.raises(RefusedError, match="another job or of other data") as caught:
        directory.find(ORIGIN.model_copy(update=fields))
    assert list(caught.value.differing) == [expected]
    assert expected in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_run_that_was_moved_goes_on(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    moved = {**ORIGIN.job, "soft_targets": [{"stores": [["/new/stores/plan-generation"]]}]}
    assert directory.find(ORIGIN.model_copy(update={"job": moved})) is not None


def test_best_weights_stay_while_a_checkpoint_refers_to_them(directory: CheckpointDirectory) -> None:
    for step in (2, 4, 8):
        directory.best_model(step).mkdir(parents=True)
    save(directory, 5, best_step=4)
    directory.prune_best(8)
    assert not directory.best_model(2).exists()
    assert directory.best_model(4).exists()
    assert directory.best_model(8).exists()


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_checkpoint_whose_best_weights_are_damaged_is_not_used(
    directory: CheckpointDirectory, damage: str
) -> None:
    save_best = directory.best_model(7)
    save(directory, 5)
    save_best.mkdir()
    (save_best / "model.safetensors").write_bytes(b"best")
    save(directory, 10, best_step=7)
    assert find_step(directory) == 10
    if damage == "flip":
        (save_best / "model.safetensors").write_bytes(b"best"[::-1])
    else:
        shutil.rmtree(save_best)
    assert find_step(directory) == 5


class _Death(BaseException):
    """Ends a commit as a kill does: nothing is cleaned up."""


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        (FaultPoint.CHECKPOINT_WRITTEN, 5),
        (FaultPoint.CHECKPOINT_SYNCED, 5),
        (FaultPoint.CHECKPOINT_RENAMED, 5),
        (FaultPoint.CHECKPOINT_LISTED, 10),
    ],
)
def test_a_death_at_any_point_leaves_one_or_the_other(
    directory: CheckpointDirectory, point: FaultPoint, expected: int
) -> None:
    def die(reached: FaultPoint) -> None:
        if reached is point:
            raise _Death

    save(directory, 5)
    listen(die)
    try:
        with pytest.raises(_Death):
            save(directory, 10)
    finally:
        listen(None)
    again = CheckpointDirectory(directory.path)
    assert find_step(again) == expected
    save(again, 10)
    save(again, 15)
    assert find_step(again) == 15
    kept = sorted(path.name for path in again.path.iterdir())
    assert kept == [LATEST_FILE, "step-000000010", "step-000000015"]


def test_files_are_synced_before_they_are_visible(
    directory: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def watch_replace(source: Path, target: Path) -> None:
        events.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    save(directory, 5)
    renamed, listed = events.index("-> step-000000005"), events.index(f"-> {LATEST_FILE}")
    assert {".step-000000005.tmp", STATE_FILE, *FILES} <= set(events[:renamed])
    assert "checkpoints" in events[renamed:listed]


def test_a_death_while_all_is_deleted_leaves_nothing_that_looks_damaged(
    directory: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(directory, 1)

    def die(path: Path, **_: object) -> None:
        next(path.glob("step-*/*")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distill.checkpoint.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            directory.delete()
    assert directory.find(ORIGIN) is None


def test_deleting_takes_everything(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    directory.delete()
    assert not directory.path.exists()
    directory.delete()
