"""Mending stores: only what is damaged is computed, and the same rows come out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from cluster.cli import run_command
from cluster.recipe_file import load_recipe
from cluster.store_check import diagnose_store
from cluster.store_match import match_store
from cluster.store_repair import repair_damage
from distill.store_reader import LogitStore
from schemas.errors import DamagedStoreError, DataError, InterruptedRunError, RefusedError, TeacherError
from schemas.records import COMMIT_DIRECTORY, MANIFEST_FILE, STORE_FILE
from schemas.storage.location import open_storage
from tests.cluster.project_stores import ProjectStores, read_rows, snapshot
from tests.cluster.store_damage import (
    DAMAGE,
    change_generation,
    claim_format,
    commit_again,
    cut_data,
    data_file,
    flip_batch,
    flip_byte,
    flip_identity,
    flip_record,
    lose_data,
    lose_identity,
    lose_manifest,
    spoil_all,
    turn_labels,
)
from tests.object_server import object_server
from tests.reliability.here_pool import HerePool

# Which shards each damage makes worthless.
COMPUTED = {
    damage: [shard] if shard is not None and shard < 3 else [] for damage, (_, _, shard) in DAMAGE.items()
}
COMPUTED |= {flip_batch: [2], lose_manifest: [], spoil_all: [0, 2]}


@pytest.mark.parametrize("damage", COMPUTED)
def test_a_mended_store_has_the_same_rows_and_only_damaged_shards_were_computed(
    made: ProjectStores, pool: HerePool, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    root = made.copy(tmp_path)
    whole = read_rows(root)
    plan_hash = LogitStore.open(root).plan.plan_hash
    damage(root)
    before = snapshot(root)
    repaired = repair_damage(root, made.recipe)
    assert sorted(pool.done) == COMPUTED[damage]
    assert list(repaired.computed_shards) == COMPUTED[damage]
    assert repaired.diagnosis.problems or damage is lose_manifest
    assert diagnose_store(root, deep=True).is_sound
    # The order of reading follows from the plan and the corpus, which are those of before.
    assert LogitStore.open(root).plan.plan_hash == plan_hash
    assert read_rows(root).equals(whole)
    kept = {name for name in snapshot(root) if name.startswith("data/")}
    assert {name for name in before if name.startswith("data/")} <= kept


def test_where_nothing_is_wrong_nothing_is_touched_and_no_model_is_opened(
    made: ProjectStores, pool: HerePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = made.copy(tmp_path)
    before = snapshot(tmp_path)
    recipe = tmp_path / "elsewhere.yaml"
    document = yaml.safe_load(Path(made.recipe_path).read_text())
    document["teachers"] = [{**teacher, "model": "/nowhere"} for teacher in document["teachers"]]
    recipe.write_text(yaml.safe_dump({**document, "out": str(tmp_path / "runs")}))
    assert run_command(["store", "repair", str(root), "--recipe", str(recipe)]) == 0
    assert "nothing to repair" in capsys.readouterr().err
    recipe.unlink()
    assert snapshot(tmp_path) == before


def test_a_reader_that_is_open_goes_on_and_a_new_one_sees_the_mended_store(
    made: ProjectStores, pool: HerePool, tmp_path: Path
) -> None:
    root = made.copy(tmp_path)
    rows = np.arange(40)
    expected = LogitStore.open(root).gather(rows)
    flip_batch(root)
    before = LogitStore.open(root)
    np.testing.assert_array_equal(before.gather(rows[:32]), expected[:32])
    with pytest.raises(DataError, match="store repair"):
        before.gather(rows)
    repair_damage(root, made.recipe)
    np.testing.assert_array_equal(before.gather(rows[:32]), expected[:32])
    np.testing.assert_array_equal(LogitStore.open(root).gather(rows), expected)


def test_each_repair_commits_the_next_revision(made: ProjectStores, pool: HerePool, tmp_path: Path) -> None:
    root = made.copy(tmp_path)
    flip_record(root)
    repair_damage(root, made.recipe)
    (second,) = (root / COMMIT_DIRECTORY).glob("s000002.r1.json")
    flip_byte(second, 40)
    # A higher revision than any that is there, also where the manifest alone remembers it.
    second.rename(root / "lost")
    (root / "lost").unlink()
    repair_damage(root, made.recipe)
    revisions = sorted(path.name for path in (root / COMMIT_DIRECTORY).glob("s000002.*"))
    assert revisions == ["s000002.r0.json", "s000002.r2.json"]
    assert pool.done == [2, 2]


def test_an_interrupted_repair_is_finished_by_the_next(
    made: ProjectStores, pool: HerePool, tmp_path: Path
) -> None:
    root = made.copy(tmp_path)
    whole = read_rows(root)
    for shard in range(3):
        flip_byte(data_file(root, shard), 40)
    pool.stop_after = 2
    with pytest.raises(InterruptedRunError):
        repair_damage(root, made.recipe)
    assert not diagnose_store(root).is_sound
    pool.stop_after = None
    assert repair_damage(root, made.recipe).computed_shards == (2,)
    assert pool.done == [0, 1, 2]
    assert read_rows(root).equals(whole)


def test_an_unfinished_store_is_completed(made: ProjectStores, pool: HerePool, tmp_path: Path) -> None:
    root = made.copy(tmp_path)
    whole = read_rows(root)
    lose_manifest(root)
    (root / COMMIT_DIRECTORY / "s000001.r0.json").unlink()
    cut_data(root)
    assert repair_damage(root, made.recipe).computed_shards == (1, 2)
    assert (root / COMMIT_DIRECTORY / "s000001.r0.json").exists()
    assert read_rows(root).equals(whole)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("teachers.second.max_length=16", "max_length: 32 -> 16"),
        ("store.shard_rows=10", "shard_rows: 16 -> 10"),
        ("teachers.second.dtype=bfloat16", "dtype: float32 -> bfloat16"),
        ("corpora.train.parts.0.limit=39", "corpus: 40 rows"),
    ],
)
def test_a_recipe_that_did_not_make_the_store_is_refused_and_the_field_is_named(
    made: ProjectStores,
    pool: HerePool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    field: str,
) -> None:
    root = made.copy(tmp_path)
    flip_batch(root)
    before = snapshot(root)
    arguments = ["--recipe", made.recipe_path, "--set", override]
    assert run_command(["store", "repair", str(root), *arguments]) == 4
    assert field in capsys.readouterr().err
    assert snapshot(root) == before


def test_without_store_json_the_manifest_or_the_name_of_the_directory_tells_what_the_store_is(
    made: ProjectStores, pool: HerePool, tmp_path: Path
) -> None:
    root = made.copy(tmp_path)
    moved = root.rename(tmp_path / "moved")
    lose_identity(moved)
    repair_damage(moved, made.recipe)
    assert diagnose_store(moved, deep=True).is_sound
    named = moved.rename(root)
    flip_identity(named)
    (named / MANIFEST_FILE).unlink()
    for path in (named / COMMIT_DIRECTORY).iterdir():
        flip_byte(path, 40)
    nameless = named.rename(tmp_path / "nameless")
    with pytest.raises(RefusedError, match=r"without its STORE\.json"):
        repair_damage(nameless, made.recipe)
    nameless.rename(root)
    assert repair_damage(root, made.recipe).computed_shards == (0, 1, 2)


def test_labels_that_were_renamed_since_are_refused(
    made: ProjectStores, pool: HerePool, tmp_path: Path
) -> None:
    root = made.copy(tmp_path)
    turn_labels(root)
    # Nothing says any more that STORE.json is not right.
    lose_manifest(root)
    with pytest.raises(RefusedError, match="native_labels"):
        repair_damage(root, made.recipe)
    # Not the writer alone says so: the self-test, too, asks which teacher it is.
    with pytest.raises(RefusedError, match="native_labels"):
        match_store(open_storage(root), made.recipe)


def test_a_repair_that_did_not_help_does_not_say_that_it_did(
    made: ProjectStores,
    pool: HerePool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = made.copy(tmp_path)
    lose_data(root)
    monkeypatch.setattr("cluster.store_repair.repair_store", lambda *_, **__: None)
    with pytest.raises(DamagedStoreError, match="1 of 3 shards is damaged"):
        repair_damage(root, made.recipe)
    assert "repaired" not in capsys.readouterr().err


def test_a_trained_teacher_is_not_trained_anew(made: ProjectStores, pool: HerePool, tmp_path: Path) -> None:
    root = made.copy(tmp_path)
    flip_batch(root)
    training = "{corpus: train, max_steps: 1}"
    recipe = load_recipe(made.recipe_path, [f"teachers.second.train={training}"])
    with pytest.raises(TeacherError, match=r"teacher second: is trained by the recipe.*is gone from"):
        repair_damage(root, recipe)
    assert not (made.project.root / "runs" / "teachers").exists()


def test_a_store_of_a_newer_format_is_left_alone(made: ProjectStores, pool: HerePool, tmp_path: Path) -> None:
    root = made.copy(tmp_path)
    claim_format(root, "3.1")
    before = snapshot(root)
    with pytest.raises(RefusedError, match="has format"):
        repair_damage(root, made.recipe)
    assert snapshot(root) == before


def test_a_store_on_an_object_store_is_mended(
    made: ProjectStores, pool: HerePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMKD_CACHE_DIR", str(tmp_path / "cache"))
    root = made.copy(tmp_path)
    whole = read_rows(root)
    flip_batch(root)
    with object_server() as server:
        for name, (data, _) in snapshot(root).items():
            server.put(f"stores/{root.name}/{name}", data)
        url = server.url(f"stores/{root.name}")
        server.put(f"stores/{root.name}/{STORE_FILE}", b"{}")
        assert repair_damage(url, made.recipe).computed_shards == (2,)
        assert pool.done == [2]
        assert diagnose_store(url, deep=True).is_sound
        assert read_rows(url).equals(whole)
        assert LogitStore.open(url).num_rows == 40
        assert open_storage(url).read(MANIFEST_FILE, max_bytes=10**6)


def test_the_command_mends_with_ray_and_says_what_it_found(
    made: ProjectStores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = made.copy(tmp_path)
    whole = read_rows(root)
    commit_again(root)
    change_generation(root)
    flip_byte(data_file(root, 0), 40)
    assert run_command(["store", "repair", str(root), "--recipe", made.recipe_path, "--json"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert (printed["computed_shards"], printed["rewritten"]) == ([0], ["STORE.json"])
    assert "1 of 3 shards is damaged: shard 0" in captured.err
    assert "teacher second computes 1 shards (0), 16 rows" in captured.err
    assert read_rows(root).equals(whole)
