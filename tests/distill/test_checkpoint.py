"""The list of checkpoints: what it shows, what it refuses, what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.checkpoint import LATEST_FILE, CheckpointDirectory
from schemas.errors import DataError, RefusedError


def save(directory: CheckpointDirectory, step: int, **header: Any) -> None:
    directory.prepare(step)
    temporary = directory.path / directory.temporary_tag(step)
    temporary.mkdir()
    (temporary / "weights.pt").write_bytes(b"weights of step %d" % step)
    (temporary / "zero_to_fp32.py").write_text("a copied program")
    fields = {"fingerprint": "f", "world_size": 1, "zero_stage": 0, "best_step": None, **header}
    directory.commit(step, fields, {"step": step})


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "checkpoints")


def test_without_a_list_there_is_no_checkpoint(directory: CheckpointDirectory) -> None:
    directory.prepare(5)
    (directory.path / "step-000000005").mkdir()
    assert directory.find("f", 1) is None


def test_the_newest_of_the_last_two_is_found(directory: CheckpointDirectory) -> None:
    for step in (5, 10, 15):
        save(directory, step)
    found = directory.find("f", 1)
    assert found is not None
    assert (found.step, found.state["step"]) == (15, 15)
    assert list(found.files) == ["weights.pt"]
    kept = sorted(path.name for path in directory.path.iterdir())
    assert kept == [LATEST_FILE, "step-000000010", "step-000000015"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    directory: CheckpointDirectory, damage: str
) -> None:
    save(directory, 5)
    save(directory, 10)
    path = directory.path / "step-000000010" / "weights.pt"
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(b"W" + data[1:] if damage == "flip" else data[:-1])
    found = directory.find("f", 1)
    assert found is not None
    assert found.step == 5
    # Training on from there replaces the damaged one.
    save(directory, 10)
    found = directory.find("f", 1)
    assert found is not None
    assert found.step == 10


def test_if_all_are_damaged_that_is_said(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    (directory.path / "step-000000005" / "weights.pt").unlink()
    with pytest.raises(DataError, match="all checkpoints are damaged; delete"):
        directory.find("f", 1)


def test_an_edited_list_is_refused(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    path = directory.path / LATEST_FILE
    path.write_text(path.read_text().replace('"step": 5', '"step": 6'))
    with pytest.raises(DataError, match="does not match its own digest"):
        directory.find("f", 1)


def test_a_tag_cannot_lead_out_of_the_directory(directory: CheckpointDirectory) -> None:
    from schemas.digest import read_document, write_document

    save(directory, 5)
    path = directory.path / LATEST_FILE
    body = read_document(path)
    body["checkpoints"][0]["tag"] = "../step-000000005"
    write_document(path, body)
    with pytest.raises(DataError):
        directory.find("f", 1)


def test_another_jobs_checkpoint_is_refused(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    with pytest.raises(RefusedError, match="another job"):
        directory.find("g", 1)


def test_a_partitioned_optimizer_wants_its_number_of_ranks(directory: CheckpointDirectory) -> None:
    save(directory, 5, world_size=2, zero_stage=1)
    assert directory.find("f", 2) is not None
    with pytest.raises(RefusedError, match=r"ranks: 2 -> 1"):
        directory.find("f", 1)


def test_a_replicated_optimizer_goes_on_with_any_number_of_ranks(directory: CheckpointDirectory) -> None:
    save(directory, 5, world_size=2)
    assert directory.find("f", 1) is not None


def test_best_weights_stay_while_a_checkpoint_refers_to_them(directory: CheckpointDirectory) -> None:
    for step in (2, 4, 8):
        directory.best_model(step).mkdir(parents=True)
    save(directory, 5, best_step=4)
    directory.prune_best(8)
    assert not directory.best_model(2).exists()
    assert directory.best_model(4).exists()
    assert directory.best_model(8).exists()


def test_deleting_takes_everything(directory: CheckpointDirectory) -> None:
    save(directory, 5)
    directory.delete()
    assert not directory.path.exists()
    directory.delete()
