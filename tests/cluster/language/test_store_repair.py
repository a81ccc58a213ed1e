"""Mending stores of language models through their recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import run_command
from cluster.recipe_file import load_recipe
from cluster.store_check import diagnose_store
from cluster.store_repair import repair_damage
from distill.token_store import TokenStore
from schemas.errors import RefusedError
from tests.cluster.language.project_stores import LanguageStoresOnDisk
from tests.cluster.project_stores import ProjectStores, read_rows, snapshot
from tests.cluster.store_damage import data_file, flip_batch, flip_byte, lose_identity, lose_manifest
from tests.reliability.here_pool import HerePool


@pytest.mark.parametrize("teacher", ["head", "drawn"])
def test_a_flipped_byte_is_mended_and_the_store_verifies_again(
    language_stores: LanguageStoresOnDisk, pool: HerePool, tmp_path: Path, teacher: str
) -> None:
    root = language_stores.copy(tmp_path, teacher)
    # Of the original: rows are mapped from their file, damage included.
    whole = read_rows(language_stores.roots[teacher])
    flip_byte(data_file(root, 1), data_file(root, 1).stat().st_size // 2)
    assert not diagnose_store(root, deep=True).is_sound
    repaired = repair_damage(root, language_stores.recipe)
    assert (repaired.computed_shards, pool.done) == ((1,), [1])
    assert diagnose_store(root, deep=True).is_sound
    # Drawn entries too: draws depend on seed, chunk and position alone.
    assert read_rows(root).equals(whole)
    assert TokenStore.open(root).num_rows == whole.num_rows


def test_a_store_without_its_identity_and_manifest_is_found_by_its_records(
    language_stores: LanguageStoresOnDisk, pool: HerePool, tmp_path: Path
) -> None:
    root = language_stores.copy(tmp_path)
    moved = root.rename(tmp_path / "moved")
    lose_identity(moved)
    lose_manifest(moved)
    assert repair_damage(moved, language_stores.recipe).rewritten == ("STORE.json",)
    assert pool.done == []
    assert diagnose_store(moved, deep=True).is_sound


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("teachers.head.keep.k=6", "policy.k: 5 -> 6"),
        ("teachers.head.keep={kind: top_p, p: 0.9, k_max: 20}", "policy.kind: top_k -> top_p"),
        ("teachers.head.codec=fixed", "codec: packed -> fixed"),
        ("teachers.head.temperatures=[2.0, 4.0]", "grid: [2.0] -> [2.0, 4.0]"),
        ("teachers.head.dtype=bfloat16", "dtype: float32 -> bfloat16"),
        ("corpora.train.max_length=12", "chunks.max_length: 16 -> 12"),
        ("store.shard_rows=10", "shard_rows: 16 -> 10"),
    ],
)
def test_a_recipe_that_did_not_make_the_store_is_refused_and_the_field_is_named(
    language_stores: LanguageStoresOnDisk,
    pool: HerePool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    field: str,
) -> None:
    root = language_stores.copy(tmp_path)
    flip_batch(root)
    before = snapshot(root)
    arguments = ["--recipe", language_stores.recipe_path, "--set", override]
    assert run_command(["store", "repair", str(root), *arguments]) == 4
    assert field in capsys.readouterr().err
    assert snapshot(root) == before
    assert pool.done == []


def test_a_recipe_of_the_other_task_is_refused_in_both_directions(
    language_stores: LanguageStoresOnDisk, made: ProjectStores, pool: HerePool, tmp_path: Path
) -> None:
    tokens, logits = language_stores.copy(tmp_path), made.copy(tmp_path)
    for root, recipe, held in (
        (tokens, made.recipe, "holds token rows, and this recipe makes classification ones"),
        (logits, language_stores.recipe, "holds classification rows, and this recipe makes token ones"),
    ):
        flip_batch(root)
        with pytest.raises(RefusedError, match=held) as caught:
            repair_damage(root, recipe)
        assert "\n" not in str(caught.value)
    assert pool.done == []


def test_an_unfinished_store_is_completed(
    language_stores: LanguageStoresOnDisk, pool: HerePool, tmp_path: Path
) -> None:
    root = language_stores.copy(tmp_path)
    whole = read_rows(root)
    lose_manifest(root)
    (root / "commit" / "s000000.r0.json").unlink()
    assert repair_damage(root, language_stores.recipe).computed_shards == (0,)
    assert read_rows(root).equals(whole)


def test_the_command_says_what_it_mends(
    language_stores: LanguageStoresOnDisk,
    pool: HerePool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = language_stores.copy(tmp_path)
    flip_batch(root)
    arguments = ["store", "repair", str(root), "--recipe", language_stores.recipe_path, "--json"]
    assert run_command(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["computed_shards"] == pool.done
    assert "teacher head computes 1 shards" in captured.err


def test_a_given_store_is_nobodys_to_mend(
    language_stores: LanguageStoresOnDisk, pool: HerePool, tmp_path: Path
) -> None:
    root = language_stores.copy(tmp_path)
    flip_batch(root)
    given = {"name": "head", "stores": [str(root)]}
    recipe = load_recipe(language_stores.recipe_path, [f"teachers.head={json.dumps(given)}"])
    with pytest.raises(RefusedError, match="was not made"):
        repair_damage(root, recipe)
