"""A model as a directory that loads at once: one in a GGUF file is converted, once per content.

A GGUF file of 100 MB takes half a minute to read, and every teacher actor, rank and evaluation reads it.
The copy holds float32 safetensors, configuration and tokenizer below ``<out>/cache/models``, in a directory
named by the file's SHA-256.

Invariants (tests/cluster/language/test_model_files.py):
    1. A copy gives the file's logits and its tokenizer's ids.
    2. It is whole or absent, also where several processes make it at once; one that was damaged is made
       again.
    3. Stores and students of a copy are those of its file: its hash in their fingerprints is the file's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.console import say
from precompute.generation import SOURCE_FILE, hash_files, read_source
from schemas.digest import hash_file, sync_directory, write_document
from schemas.errors import RecipeError, ResourceError, first_line
from schemas.model_ref import resolve_model
from schemas.storage.os_errors import translated_os_errors

MODELS_DIRECTORY = "models"
_HASHES_FILE = "weights.json"
_PACKAGES = ("gguf", "accelerate")


def local_model(
    reference: str, revision: str | None, gguf_file: str | None, cache: Path, *, field: str | None = None
) -> str:
    """Returns what ``from_pretrained`` takes, without ``gguf_file``, which may then be forgotten.

    Args:
        reference: How a recipe names the model: see ``schemas.model_ref``.
        revision: On the hub.
        gguf_file: Name of a GGUF file in it, of a causal language model; without one, the model is taken
            as it is.
        cache: ``<out>/cache``.
        field: The recipe's field of the model, for errors.

    Returns:
        A local directory; or the hub id, where there is no ``gguf_file``.

    Raises:
        RecipeError: There is no such model or file.
        TeacherError: The file cannot be read as a causal language model.
        ResourceError: The hub cannot be reached, packages are missing, or the disk is full.
    """
    path = resolve_model(reference, field=field)
    if gguf_file is None:
        return path
    file = _find_file(path, revision, gguf_file, field)
    with translated_os_errors(cache):
        return str(_find_copy(file, cache))


def _find_file(path: str, revision: str | None, gguf_file: str, field: str | None) -> Path:
    if Path(path).is_dir():
        file = Path(path) / gguf_file
        if not file.is_file():
            raise RecipeError(f"there is no file {file}; correct its gguf_file", field=field)
        return file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(path, gguf_file, revision=revision))
    except (HfHubHTTPError, OSError, ValueError) as error:
        message = f"{path}/{gguf_file} cannot be fetched from the hub ({first_line(error)})"
        raise ResourceError(f"{message}; give a local directory as its model") from error


def _find_copy(file: Path, cache: Path) -> Path:
    models, hashes = cache / MODELS_DIRECTORY, cache / _HASHES_FILE
    models.mkdir(parents=True, exist_ok=True)
    target = models / hash_files([file], hashes)[file.name]
    if read_source(target, hashes) is not None:
        return target
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise ResourceError(
            f"{file}: reading GGUF needs the package {' and '.join(missing)}: pip install 'tmkd[gguf]'"
        )
    say(f"  converting {file.name}, once")
    with tempfile.TemporaryDirectory(dir=models, prefix=".converting-") as scratch:
        # Made here, because the scratch directory is its owner's alone.
        made = Path(scratch) / "model"
        made.mkdir()
        _convert(file, made)
        _seal(file, made, target.name)
        _put(made, target, hashes)
    return target


def _convert(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from precompute.pretrained import check_weights, reading_pretrained

    if not torch.accelerator.is_available():
        # Saving loads DeepSpeed, which says on stdout that it guessed.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with reading_pretrained(file.name, str(file.parent)):
        # What else a model may have is not looked for on the hub: that takes long where there is no network.
        found: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **found)
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            **found,
            # Otherwise the model counts as quantised, and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
        )
        check_weights(report, file.name, "it is no causal language model")
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _seal(file: Path, directory: Path, sha256: str) -> None:
    """Writes what the copy was made of and what it holds, and syncs it."""
    paths = sorted(directory.iterdir())
    body = {"name": file.name, "sha256": sha256, "files": {path.name: hash_file(path) for path in paths}}
    write_document(directory / SOURCE_FILE, body)
    for path in paths:
        with path.open("rb+") as written:
            os.fsync(written.fileno())


def _put(made: Path, target: Path, hashes: Path) -> None:
    """Moves a copy to its place, unless another process has put one there meanwhile."""
    if target.exists() and read_source(target, hashes) is None:
        aside = made.parent / uuid.uuid4().hex
        target.rename(aside)
        shutil.rmtree(aside)
    try:
        made.rename(target)
    except OSError:
        if read_source(target, hashes) is None:
            raise
    sync_directory(target.parent)
