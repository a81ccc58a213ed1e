"""What makes a generation another one, and what does not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import precompute.generation
from precompute.generation import describe_generation, generation_hash, native_labels, resolve_commit
from schemas.errors import ResourceError, TeacherError
from schemas.recipe import Corpus, Teacher

CORPUS = Corpus.model_validate(
    {"labels": ["a", "b"], "text": ["x", "y"], "parts": [{"kind": "file", "path": "a.jsonl"}]}
)
CONFIG = {"model_type": "bert", "hidden_size": 32, "id2label": {"1": "no", "0": "yes"}, "_name_or_path": "q"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling.py").write_text("pass")
    (directory / "README.md").write_text("x")
    return directory


def describe(model: Path, corpus: Corpus = CORPUS, **changes: Any) -> dict[str, Any]:
    teacher = Teacher.model_validate({"name": "t", "model": str(model)} | changes)
    return describe_generation(teacher, str(model), None, corpus, model.parent / "cache" / "hashes.json")


def test_a_generation_names_every_field_that_changes_logits(model: Path) -> None:
    fields = describe(model)
    assert set(fields) == (
        {"weights", "config", "tokenizer", "max_length", "truncation", "columns", "dtype"}
        | {"attention", "keep"}
    )
    assert fields["columns"] == [0, 1]
    assert fields["keep"] == {"kind": "dense"}
    assert len(generation_hash(fields)) == 64
    assert describe(model) == fields


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 64},
        {"truncation": "only_first"},
        {"dtype": "bfloat16"},
        {"attention": "eager"},
        {"trust_remote_code": True},
    ],
    ids=str,
)
def test_a_setting_that_changes_logits_changes_the_hash(model: Path, changes: dict[str, Any]) -> None:
    assert generation_hash(describe(model, **changes)) != generation_hash(describe(model))


@pytest.mark.parametrize(
    "changes", [{"num_actors": 4}, {"tokens_per_batch": 256}, {"name": "other"}], ids=str
)
def test_a_setting_that_changes_no_logits_keeps_the_hash(model: Path, changes: dict[str, Any]) -> None:
    assert describe(model, **changes) == describe(model)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_another_file_changes_the_hash(model: Path, name: str) -> None:
    before = describe(model)
    text = json.dumps(CONFIG | {"hidden_size": 64}) if name == "config.json" else "other"
    (model / name).write_text(text)
    assert generation_hash(describe(model)) != generation_hash(before)


def test_one_text_column_is_another_generation_than_two(model: Path) -> None:
    assert describe(model, CORPUS.model_copy(update={"text": ("x",)})) != describe(model)


def test_code_counts_only_where_it_runs(model: Path) -> None:
    plain, trusted = describe(model), describe(model, trust_remote_code=True)
    (model / "modeling.py").write_text("other")
    assert describe(model) == plain
    assert describe(model, trust_remote_code=True) != trusted


def test_label_names_versions_and_other_files_change_nothing(model: Path) -> None:
    before = describe(model)
    renamed = CONFIG | {"id2label": {"0": "a", "1": "b"}, "transformers_version": "9", "_name_or_path": "z"}
    (model / "config.json").write_text(json.dumps(renamed))
    (model / "README.md").write_text("y")
    assert describe(model) == before


def test_the_same_files_elsewhere_are_the_same_generation(model: Path) -> None:
    before = describe(model)
    assert describe(model.rename(model.with_name("moved"))) == before


def test_unchanged_files_are_hashed_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = precompute.generation.hash_file

    def hash_file(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(precompute.generation, "hash_file", hash_file)
    describe(model)
    assert sorted(hashed) == ["model.safetensors", "tokenizer.json"]
    hashed.clear()
    describe(model)
    assert hashed == []
    os.utime(model / "model.safetensors", ns=(1, 1))
    describe(model)
    assert hashed == ["model.safetensors"]


def test_a_damaged_cache_is_made_again(model: Path) -> None:
    before = describe(model)
    cache = model.parent / "cache" / "hashes.json"
    cache.write_text(cache.read_text().replace("0", "1"))
    assert describe(model) == before


def test_a_model_without_safetensors_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"teacher t: .* has no \*.safetensors") as caught:
        describe(model)
    assert caught.value.exit_code == 5


def test_labels_come_in_the_order_of_the_logits(model: Path) -> None:
    assert native_labels(str(model), None) == ("yes", "no")


def test_a_model_without_label_names_has_those_that_transformers_gives(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"num_labels": 3}))
    assert native_labels(str(model), None) == ("LABEL_0", "LABEL_1", "LABEL_2")
    (model / "config.json").write_text("{}")
    assert native_labels(str(model), None) == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "is not a JSON object"),
        ('{"id2label": {"1": "a", "2": "b"}}', "does not number its labels from 0"),
        ('{"id2label": {"zero": "a"}}', "does not number its labels from 0"),
        ('{"id2label": ["a", "b"]}', "does not number its labels from 0"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(model: Path, text: str | None, message: str) -> None:
    (model / "config.json").unlink()
    if text is not None:
        (model / "config.json").write_text(text)
    with pytest.raises(TeacherError, match=f"teacher t: .*{message}"):
        native_labels(str(model), None, teacher="t")


def test_a_hub_model_is_its_commit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = model.rename(model.with_name("0123abcd"))
    monkeypatch.setattr(
        precompute.generation, "hf_hub_download", lambda repo, name, revision: str(snapshot / name)
    )
    teacher = Teacher(name="t", model="org/model")
    fields = describe_generation(teacher, "org/model", "main", CORPUS, model.parent / "hashes.json")
    assert fields["weights"] == "hub:org/model@0123abcd"
    assert resolve_commit("org/model", "main") == "0123abcd"
    assert native_labels("org/model", "main") == ("yes", "no")


def test_a_hub_that_cannot_be_reached_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="teacher t: no/such cannot be fetched from the hub"):
        native_labels("no/such", None, teacher="t")
    assert resolve_commit(str(tmp_path), None) is None
