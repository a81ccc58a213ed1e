"""The self-test: stores whose hashes are right and whose logits are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cluster.cli import run_command
from cluster.self_test import SelfTest, sample_positions
from cluster.store_check import diagnose_store
from cluster.store_self_test import compare_with_teacher
from distill.store_reader import LogitStore
from precompute.encode import encode_rows
from precompute.store_writer import StoreWriter
from schemas.errors import DataError, RefusedError
from schemas.records import ExcludedRow
from tests.cluster.project_stores import ProjectStores
from tests.cluster.store_damage import flip_batch
from tests.object_server import object_server

Logits = npt.NDArray[np.float32]


def true_logits(made: ProjectStores) -> Logits:
    return LogitStore.open(made.roots["second", "train"]).gather(np.arange(40))


def forge(made: ProjectStores, root: str | Path, logits_RC: Logits, excluded: tuple[int, ...] = ()) -> None:
    """Writes a store of the same teacher whose hashes are right and whose logits are these."""
    origin = StoreWriter.attach(made.roots["second", "train"])
    store = StoreWriter.open(root, origin.identity, origin.plan)
    ids = store.plan.rows.column("example_id")
    for task in store.plan.tasks():
        kept = [row for row in range(task.start, task.stop) if row not in excluded]
        left_out = [
            ExcludedRow(ordinal=row, example_id=ids[row].as_py(), reason="nan")
            for row in range(task.start, task.stop)
            if row in excluded
        ]
        rows = store.plan.rows.take(kept)
        store.write_shard(task, encode_rows(rows, logits_RC[kept], store.schema, 5), left_out)
    store.finish()


def run(made: ProjectStores, root: str | Path, **options: int) -> SelfTest:
    return compare_with_teacher(root, made.recipe, **options)


def test_a_true_store_agrees_with_its_teacher(
    made: ProjectStores, capsys: pytest.CaptureFixture[str]
) -> None:
    root = made.roots["second", "train"]
    arguments = ["store", "self-test", root, "--recipe", made.recipe_path, "--rows", "12", "--seed", "3"]
    assert run_command([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_rows"], result["num_differing"], result["dtype"]) == (12, 0, "float32")
    assert result["largest_difference"] < 1e-5
    assert run(made, root, num_rows=1000).num_rows == 40


@pytest.mark.parametrize(("shift", "where"), [(1, "after"), (-1, "before")])
def test_a_store_that_is_shifted_by_one_row_is_told_as_such(
    made: ProjectStores, tmp_path: Path, shift: int, where: str
) -> None:
    forge(made, tmp_path / "s", np.roll(true_logits(made), shift, axis=0))
    assert diagnose_store(tmp_path / "s", deep=True).is_sound
    result = run(made, tmp_path / "s", num_rows=20)
    assert result.num_differing == 20
    shifted = (result.num_shifted_forward, result.num_shifted_back)
    # A row at the end of the store has no neighbour on that side.
    assert shifted[shift < 0] >= 19
    assert shifted[shift > 0] == 0
    with pytest.raises(DataError, match=f"are stored with the row {where}: the store is shifted"):
        result.raise_if_failed()


def test_a_single_wrong_logit_is_found_and_named(
    made: ProjectStores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits_RC = true_logits(made)
    logits_RC[17, 1] += 0.01
    forge(made, tmp_path / "s", logits_RC)
    result = run(made, tmp_path / "s", num_rows=40)
    assert (result.num_differing, result.worst_row) == (1, "train/17")
    assert (result.num_shifted_forward, result.num_shifted_back) == (0, 0)
    assert result.largest_difference == pytest.approx(0.01, rel=1e-3)
    arguments = ["store", "self-test", str(tmp_path / "s"), "--recipe", made.recipe_path]
    assert run_command(arguments) == 3
    captured = capsys.readouterr()
    assert "num_differing\t1\n" in captured.out
    assert "1 of 40 rows are not what teacher second gives" in captured.err
    assert run_command([*arguments, "--tolerance", "0.1"]) == 0


def test_excluded_rows_are_nobodys_neighbours(made: ProjectStores, tmp_path: Path) -> None:
    excluded = (0, 4, 5, 39)
    kept = np.setdiff1d(np.arange(40), excluded)
    true_RC = true_logits(made)
    forge(made, tmp_path / "true", true_RC, excluded)
    assert run(made, tmp_path / "true").num_differing == 0
    shifted_RC = true_RC.copy()
    shifted_RC[kept] = np.roll(true_RC[kept], 1, axis=0)
    forge(made, tmp_path / "shifted", shifted_RC, excluded)
    assert run(made, tmp_path / "shifted").num_shifted_forward == len(kept) - 1


def test_a_sample_covers_the_store_evenly_and_follows_the_seed() -> None:
    first, again, other = (sample_positions(1000, 10, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(first // 100, np.arange(10))
    np.testing.assert_array_equal(sample_positions(3, 64, 0), [0, 1, 2])


def test_another_recipe_and_a_damaged_store_are_refused(made: ProjectStores, tmp_path: Path) -> None:
    root = made.copy(tmp_path)
    arguments = ["store", "self-test", str(root), "--recipe", made.recipe_path]
    assert run_command([*arguments, "--set", "teachers.second.max_length=16"]) == RefusedError.exit_code
    flip_batch(root)
    assert run_command(arguments) == DataError.exit_code


def test_a_text_that_changed_since_is_not_taken_for_a_wrong_store(
    made: ProjectStores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.store_self_test.hash_texts", lambda texts: bytes(16))
    with pytest.raises(DataError, match=r"the text of train/.* has changed since the plan"):
        run(made, made.roots["second", "train"])


def test_a_store_on_an_object_store_is_compared(
    made: ProjectStores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMKD_CACHE_DIR", str(tmp_path / "cache"))
    with object_server() as server:
        forge(made, server.url("s"), true_logits(made))
        assert run(made, server.url("s"), num_rows=8).num_differing == 0
