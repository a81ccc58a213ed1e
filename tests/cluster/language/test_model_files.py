"""Models in GGUF files: converted once, whole or not at all, and the file's in every fingerprint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.language import model_files
from cluster.language.model_files import local_model
from precompute.generation import describe_token_generation, hash_model
from precompute.tokenizer import load_tokenizer, read_tokenizer_hash
from schemas.chunks import ChunkSpec
from schemas.errors import RecipeError, ResourceError, TeacherError
from schemas.language import LanguageTeacher
from tests.tiny_gguf import write_tiny_gguf

pytest.importorskip("gguf", reason="the extra gguf is not installed")
NAME = "tiny.gguf"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    write_tiny_gguf(directory / NAME)
    return directory


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the copy in it."""
    cache = tmp_path_factory.mktemp("out") / "cache"
    local_model(str(source), None, NAME, cache)
    return cache


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def convert(source: Path, cache: Path) -> Path:
    return Path(local_model(str(source), None, NAME, cache))


def never(*_args: object) -> None:
    raise AssertionError("it was converted again")


def test_a_copy_gives_the_logits_and_the_ids_of_the_file(source: Path, cache: Path) -> None:
    copy = convert(source, cache)
    ids_BL = torch.arange(12)[None]
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=NAME, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(copy, use_safetensors=True)
    assert ours.dtype == torch.float32
    assert torch.equal(ours(ids_BL).logits, theirs(ids_BL).logits)
    before, after = load_tokenizer(str(source), gguf_file=NAME), AutoTokenizer.from_pretrained(copy)
    assert before("ab cdh")["input_ids"] == after("ab cdh")["input_ids"] == [12, 11, 13, 10]
    assert read_tokenizer_hash(before, teacher="t") == read_tokenizer_hash(after, teacher="t")


def test_a_file_is_converted_once_wherever_it_lies(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = convert(source, cache)
    monkeypatch.setattr(model_files, "_convert", never)
    elsewhere = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    assert convert(source, cache) == convert(elsewhere, cache) == first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tmkd-source.json"])
@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_copy_that_was_damaged_is_made_again(source: Path, cache: Path, name: str, harm: str) -> None:
    copy = convert(source, cache)
    before = (copy / name).read_bytes()
    if harm == "changed":
        (copy / name).write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
    else:
        (copy / name).unlink()
    assert convert(source, cache) == copy
    assert (copy / name).read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_conversion_that_fails_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_file: Path, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise TeacherError("no", teacher="t")

    monkeypatch.setattr(model_files, "_convert", fail)
    with pytest.raises(TeacherError):
        convert(source, tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_of_two_processes_that_convert_at_once_the_first_ones_copy_stays(
    source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (theirs,) = (made / "models").iterdir()

    def convert_slowly(_file: Path, directory: Path) -> None:
        shutil.copytree(theirs, tmp_path / "models" / theirs.name)
        (directory / "model.safetensors").write_bytes(b"the second one's")

    monkeypatch.setattr(model_files, "_convert", convert_slowly)
    copy = convert(source, tmp_path)
    assert (copy / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_fingerprints_of_a_copy_are_those_of_its_file(source: Path, cache: Path, tmp_path: Path) -> None:
    copy, hashes = convert(source, cache), tmp_path / "weights.json"
    spec = ChunkSpec(objective="causal", tokenizer="a" * 64, max_length=8, add_special_tokens=True, vocab=14)
    teacher = LanguageTeacher(name="t", model=str(source), gguf_file=NAME)
    read = teacher.model_copy(update={"gguf_file": None})
    expected = describe_token_generation(teacher, str(source), None, spec, hashes)
    assert describe_token_generation(read, str(copy), None, spec, hashes) == expected
    moved = Path(shutil.copytree(copy, tmp_path / "moved"))
    assert hash_model(str(moved), None, hashes) == hash_model(str(copy), None, hashes)
    # What is written over a copy is another model.
    (moved / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes() + b" ")
    assert hash_model(str(moved), None, hashes) != hash_model(str(copy), None, hashes)


def test_other_models_are_taken_as_they_are(source: Path, tmp_path: Path) -> None:
    assert local_model(str(source), None, None, tmp_path) == str(source.resolve())
    assert local_model("owner/model", "main", None, tmp_path) == "owner/model"
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_converted_is_told_in_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*/absent.gguf") as refused:
        local_model(str(source), None, "absent.gguf", tmp_path, field="teachers.t.model")
    assert refused.value.field == "teachers.t.model"
    (tmp_path / "bad.gguf").write_bytes(b"no model at all")
    with pytest.raises(TeacherError, match=r"bad.gguf: cannot be loaded") as failed:
        local_model(str(tmp_path), None, "bad.gguf", tmp_path / "cache")
    assert "\n" not in failed.value.message
    monkeypatch.setattr(model_files, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ResourceError, match=r"needs the package gguf: pip install 'tmkd\[gguf\]'"):
        local_model(str(source), None, NAME, tmp_path / "cache")


def test_converting_writes_nothing_to_stdout(source: Path, tmp_path: Path) -> None:
    # In a process of its own: DeepSpeed, which accelerate loads, speaks once.
    code = (
        f"from cluster.language.model_files import *; local_model({str(source)!r}, None, {NAME!r}, Path('c'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment["PYTHONPATH"] = str(Path(model_files.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == b""
    assert b"converting tiny.gguf" in done.stderr
