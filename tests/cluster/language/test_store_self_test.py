"""The self-test of token-level stores: hashes are right, and numbers are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli import run_command
from cluster.recipe_file import load_recipe
from cluster.self_test import SelfTest
from cluster.store_check import diagnose_store
from cluster.store_self_test import compare_with_teacher
from distill.token_store import TokenStore
from precompute.kept_positions import take_positions
from precompute.store_writer import StoreWriter
from precompute.truncate import KeptPositions
from schemas.errors import DataError, RefusedError
from schemas.token_rows import TokenRows, encode_token_rows
from tests.cluster.language.project_stores import LanguageStoresOnDisk, make_language_stores
from tests.cluster.store_damage import flip_batch
from tests.precompute.tiny_language import save_tiny_llama
from tests.store_factory import take_keys

KEPT: list[tuple[dict[str, Any], str]] = [
    ({"kind": "dense"}, "fixed"),
    ({"kind": "dense"}, "compact"),
    ({"kind": "top_p", "p": 0.8, "k_max": 20}, "compact"),
    ({"kind": "sampled", "num_samples": 12, "tau": 0.7}, "packed"),
    ({"kind": "hybrid", "k": 4, "m": 3}, "compact"),
    ({"kind": "hybrid", "k": 4, "m": 3}, "fixed"),
]
Change = Callable[[TokenRows], TokenRows]


def forge(made: LanguageStoresOnDisk, root: Path, change: Change, teacher: str = "head") -> Path:
    """Writes a store of the same teacher whose hashes are right and whose rows are changed."""
    origin = TokenStore.open(made.roots[teacher])
    store = StoreWriter.open(root, origin.identity, origin.plan)
    for task in store.plan.tasks():
        rows = np.arange(task.start, task.stop)
        found = origin.gather(rows)
        changed = change(replace(found, entries=found.entries.widen()))
        batch = encode_token_rows(take_keys(store.plan, rows), changed, store.schema)
        store.write_shard(task, [batch], ())
    store.finish()
    assert diagnose_store(root, deep=True).is_sound
    return root


def shift(rows: TokenRows, by: int) -> TokenRows:
    """Takes all that a position has from a neighbour in the same chunk."""
    places = np.arange(rows.rows[-1])
    owners = np.repeat(np.arange(len(rows.rows) - 1), np.diff(rows.rows))
    moved = np.clip(places + by, rows.rows[owners], rows.rows[owners + 1] - 1)
    kept = take_positions(KeptPositions(rows.entries, rows.stats, np.ones(len(places), bool)), moved)
    return replace(rows, entries=kept.entries, stats=kept.stats)


def run(made: LanguageStoresOnDisk, root: Path | str, **options: Any) -> SelfTest:
    return compare_with_teacher(root, made.recipe, **options)


@pytest.mark.parametrize("teacher", ["head", "drawn"])
def test_a_true_store_agrees_with_its_teacher(
    language_stores: LanguageStoresOnDisk, capsys: pytest.CaptureFixture[str], teacher: str
) -> None:
    root = language_stores.roots[teacher]
    arguments = [
        "store",
        "self-test",
        root,
        "--recipe",
        language_stores.recipe_path,
        "--rows",
        "12",
        "--json",
    ]
    assert run_command(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_rows"], result["num_differing"], result["num_other_ids"]) == (12, 0, 0)
    assert 12 <= result["num_positions"] < result["num_ids"]
    assert result["largest_difference"] < 1e-4


@pytest.mark.parametrize(("keep", "codec"), KEPT)
def test_every_policy_and_codec_agrees(keep: dict[str, Any], codec: str, tmp_path: Path) -> None:
    made = make_language_stores(tmp_path, **one_teacher(tmp_path, keep=keep, codec=codec))
    result = run(made, made.roots["only"], num_rows=1000)
    assert result.num_differing == 0
    assert result.largest_difference < 1e-4


def one_teacher(root: Path, **fields: Any) -> dict[str, Any]:
    teacher = {"name": "only", "model": str(root / "model"), "tokens_per_batch": 64, "temperatures": [2.0]}
    loss = "ghost_kl" if fields["keep"]["kind"] in ("dense", "top_k", "top_p") else "unbiased_kl"
    stage = {"corpus": "train", "teachers": ["only"], "losses": [{"name": loss}], "max_steps": 1}
    return {"teachers": [teacher | fields], "stages": [stage], "compare": {}}


def test_a_masked_models_store_agrees(tmp_path: Path) -> None:
    made = make_language_stores(tmp_path, objective="masked", compare={})
    assert run(made, made.roots["head"]).num_differing == 0


@pytest.mark.parametrize(("by", "where"), [(1, "before"), (-1, "after")])
def test_a_store_that_is_off_by_one_position_is_told_as_such(
    language_stores: LanguageStoresOnDisk, tmp_path: Path, by: int, where: str
) -> None:
    root = forge(language_stores, tmp_path / "s", lambda rows: shift(rows, by))
    result = run(language_stores, root, num_rows=20)
    assert result.num_differing == 20
    found = {"after": result.num_shifted_forward, "before": result.num_shifted_back}
    # A chunk of a single position has no neighbour.
    assert found.pop(where) >= 18
    assert set(found.values()) == {0}
    with pytest.raises(DataError, match=f"are stored with the position {where}: the store is shifted"):
        result.raise_if_failed()


def spoil(name: str) -> Change:
    """Changes one number of the first chunk of each shard by 0.01."""

    def change(rows: TokenRows) -> TokenRows:
        values = getattr(rows.stats, name).copy()
        values[0] += -0.01 if name == "target_logprob" else 0.01
        return replace(rows, stats=replace(rows.stats, **{name: values}))

    return change


@pytest.mark.parametrize("name", ["lse", "entropy", "target_logprob", "lse_grid"])
def test_a_single_wrong_number_is_found_and_named(
    language_stores: LanguageStoresOnDisk, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = forge(language_stores, tmp_path / "s", spoil(name))
    arguments = ["store", "self-test", str(root), "--recipe", language_stores.recipe_path, "--rows", "1000"]
    assert run_command(arguments) == 3
    captured = capsys.readouterr()
    num_shards = StoreWriter.attach(root).plan.num_shards
    assert f"num_differing\t{num_shards}\n" in captured.out
    assert "worst_row\ttrain/" in captured.out
    assert "are not what teacher head gives" in captured.err
    assert run_command([*arguments, "--tolerance", "0.1"]) == 0


def test_a_wrong_probability_and_other_ids_are_found(
    language_stores: LanguageStoresOnDisk, tmp_path: Path
) -> None:
    def dampen(rows: TokenRows) -> TokenRows:
        log_probs = rows.entries.log_probs.copy()
        # Of the least likely entry, whose mass nothing else checks.
        log_probs[np.argmin(log_probs)] -= 0.05
        return replace(rows, entries=replace(rows.entries, log_probs=log_probs))

    result = run(language_stores, forge(language_stores, tmp_path / "a", dampen), num_rows=1000)
    assert 1 <= result.num_differing <= StoreWriter.attach(tmp_path / "a").plan.num_shards
    assert result.largest_difference == pytest.approx(0.05, rel=0.3)

    def mirror(rows: TokenRows) -> TokenRows:
        vocab = 73
        ids = np.sort(vocab - 1 - rows.entries.ids.reshape(-1, 5), axis=1).reshape(-1)
        return replace(rows, entries=replace(rows.entries, ids=ids.astype(np.int32)))

    result = run(language_stores, forge(language_stores, tmp_path / "b", mirror), num_rows=10)
    assert result.num_differing == 10


def test_a_tail_that_is_not_the_teachers_is_found(
    language_stores: LanguageStoresOnDisk, tmp_path: Path
) -> None:
    def enlarge(rows: TokenRows) -> TokenRows:
        # Within what the check of a shard allows for rounding.
        tail = np.log(np.exp(rows.stats.log_tail) + 0.01)
        return replace(rows, stats=replace(rows.stats, log_tail=np.minimum(tail, 0).astype(np.float32)))

    result = run(language_stores, forge(language_stores, tmp_path / "s", enlarge), num_rows=10)
    assert result.num_differing == 10


def test_another_recipe_and_a_damaged_store_are_refused(
    language_stores: LanguageStoresOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = language_stores.copy(tmp_path)
    arguments = ["store", "self-test", str(root), "--recipe", language_stores.recipe_path]
    assert run_command([*arguments, "--set", "teachers.head.keep.k=6"]) == RefusedError.exit_code
    assert "policy.k: 5 -> 6" in capsys.readouterr().err
    flip_batch(root)
    assert run_command([*arguments, "--rows", "1000"]) == DataError.exit_code


def test_the_models_of_the_other_task_are_refused(
    language_stores: LanguageStoresOnDisk, made: Any, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match="logits of a classifier"):
        compare_with_teacher(made.roots["second", "train"], language_stores.recipe)
    with pytest.raises(RefusedError, match="token-level output of a language model"):
        compare_with_teacher(language_stores.roots["head"], made.recipe)


def test_a_chunk_that_changed_since_is_not_taken_for_a_wrong_store(
    language_stores: LanguageStoresOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.language.store_self_test.hash_chunk", lambda *_: bytes(16))
    with pytest.raises(DataError, match=r"the tokens of train/.* have changed since the plan"):
        run(language_stores, language_stores.roots["head"])


def test_a_teacher_whose_weights_changed_is_another_one(tmp_path: Path) -> None:
    made = make_language_stores(tmp_path)
    save_tiny_llama(tmp_path / "model", seed=5)
    with pytest.raises(RefusedError, match="weights"):
        compare_with_teacher(made.roots["head"], load_recipe(made.recipe_path))
