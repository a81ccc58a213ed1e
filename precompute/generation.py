"""The generation fingerprint: every field whose change makes a teacher give other logits.

Nothing here loads weights into memory or imports torch.

Invariants (tests/precompute/test_generation.py):
    1. Label names, paths and versions change nothing: renaming labels costs nothing.
    2. Weights are hashed by content; an unchanged file (path, size, modification time) is hashed once.
    3. A converted copy of a GGUF file is described as the file (tests/cluster/language/test_model_files.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from schemas.chunks import ChunkSpec
from schemas.digest import DocumentError, hash_file, hash_value, read_document, write_document
from schemas.errors import ResourceError, TeacherError, first_line
from schemas.language import LanguageTeacher
from schemas.recipe import Corpus, Teacher
from schemas.token_generation import TokenGeneration

CONFIG_FILE = "config.json"
SOURCE_FILE = "tmkd-source.json"
"""In a copy that was converted from one file: that file's ``name`` and ``sha256``, and the copy's files."""

_NAMES_ONLY = {"id2label", "label2id", "_name_or_path", "transformers_version", "problem_type"}
_TOKENIZER_FILES = {
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}
_TOKENIZER_SUFFIXES = {".model", ".tiktoken"}


def describe_generation(
    teacher: Teacher, model_path: str, revision: str | None, corpus: Corpus, cache: Path
) -> dict[str, Any]:
    """Returns the fields of the generation fingerprint, readable in ``STORE.json``.

    Args:
        teacher: Sequence length, truncation, dtype, attention and keep policy.
        model_path: A local directory or a hub id.
        revision: On the hub.
        corpus: Its text columns are read in order.
        cache: JSON file of hashes by path, size and modification time; made if absent.

    Raises:
        TeacherError: The directory has no configuration or no safetensors.
        ResourceError: The hub cannot be reached.
    """
    return {**_describe_model(teacher, model_path, revision, cache), **asked_of_classifier(teacher, corpus)}


def asked_of_classifier(teacher: Teacher, corpus: Corpus) -> dict[str, Any]:
    """Returns the fields of ``describe_generation`` that the recipe decides, whatever the model."""
    return {
        "max_length": teacher.max_length,
        "truncation": teacher.truncation,
        "columns": list(range(len(corpus.text))),
        "dtype": teacher.dtype,
        "attention": teacher.attention,
        "keep": teacher.keep.model_dump(mode="json"),
    }


def describe_token_generation(
    teacher: LanguageTeacher, model_path: str, revision: str | None, chunks: ChunkSpec, cache: Path
) -> dict[str, Any]:
    """Returns the fields of a language model's generation fingerprint.

    Args:
        teacher: Dtype, attention, keep policy, codec and temperatures.
        model_path: A local directory or a hub id.
        revision: On the hub.
        chunks: What it reads.
        cache: See ``describe_generation``.

    Raises:
        TeacherError: The directory has no configuration or no weights.
        ResourceError: The hub cannot be reached.
    """
    asked = TokenGeneration(
        policy=teacher.keep,
        grid=teacher.temperatures,
        codec=teacher.codec,
        vocab=chunks.vocab,
        tokenizer=chunks.tokenizer,
        chunks=chunks,
    )
    return {
        **_describe_model(teacher, model_path, revision, cache),
        **asked.model_dump(mode="json"),
        **asked_of_language_model(teacher),
    }


def asked_of_language_model(teacher: LanguageTeacher) -> dict[str, Any]:
    """Returns the fields of ``describe_token_generation`` that the teacher's recipe decides."""
    return {
        "dtype": teacher.dtype,
        "attention": teacher.attention,
        "policy": teacher.keep.model_dump(mode="json"),
        "grid": list(teacher.temperatures),
        "codec": teacher.codec,
    }


def generation_hash(generation: dict[str, Any]) -> str:
    """Returns the SHA-256 (64 hex digits) of ``describe_generation``'s fields."""
    return hash_value(generation)


def resolve_commit(model_path: str, revision: str | None, *, teacher: str | None = None) -> str | None:
    """Returns the commit that a hub id's revision stands for, so that workers load just that.

    Args:
        model_path: A hub id; a local directory has no commit.
        revision: Branch, tag or commit.
        teacher: Name of the teacher for errors; by default the model's.

    Raises:
        ResourceError: The hub cannot be reached.
    """
    if Path(model_path).is_dir():
        return None
    # A fetched file lies in `snapshots/<commit>/`.
    return _find_config(model_path, revision, teacher or model_path).parent.name


def native_labels(model_path: str, revision: str | None, *, teacher: str | None = None) -> tuple[str, ...]:
    """Reads a teacher's label names from its configuration, in the order of its logits.

    Args:
        model_path: A local directory or a hub id.
        revision: On the hub.
        teacher: Name of the teacher for errors; by default the model's.

    Raises:
        TeacherError: There is no readable configuration.
        ResourceError: The hub cannot be reached.
    """
    teacher = teacher or model_path
    config = _read_config(_find_config(model_path, revision, teacher), teacher)
    names = config.get("id2label")
    if names is None:
        # As transformers names them.
        return tuple(f"LABEL_{i}" for i in range(int(config.get("num_labels", 2))))
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise TeacherError(f"its id2label does not number its labels from 0: {names}", teacher=teacher)
    return tuple(str(names[str(i)]) for i in range(len(names)))


def hash_model(model_path: str, revision: str | None, cache: Path) -> str:
    """Returns the SHA-256 over a model's weights, configuration and tokenizer, whatever is done with it.

    Args:
        model_path: A local directory or a hub id.
        revision: On the hub.
        cache: See ``describe_generation``.

    Raises:
        TeacherError: The directory has no configuration or no safetensors.
        ResourceError: The hub cannot be reached.
    """
    return hash_value(_describe_model(Teacher(name="model", model=model_path), model_path, revision, cache))


def hash_files(paths: Iterable[Path], cache: Path) -> dict[str, str]:
    """Returns the SHA-256 (64 hex digits) of files, by name.

    Args:
        paths: Files of distinct names.
        cache: See ``describe_generation``.
    """
    hashes = _FileHashes(cache)
    found = hashes.by_name(paths)
    hashes.save()
    return found


def read_source(directory: Path, cache: Path) -> dict[str, Any] | None:
    """Reads which file a copy was converted from; None if it is no copy, or was changed since.

    Args:
        directory: Of a model.
        cache: See ``describe_generation``.
    """
    try:
        source = read_document(directory / SOURCE_FILE)
        paths = [directory / name for name in source["files"]]
    except (FileNotFoundError, DocumentError, KeyError):
        return None
    if not all(path.is_file() for path in paths) or hash_files(paths, cache) != source["files"]:
        return None
    return source


def _describe_model(
    teacher: Teacher | LanguageTeacher, model_path: str, revision: str | None, cache: Path
) -> dict[str, Any]:
    if Path(model_path).is_dir():
        return _describe_directory(Path(model_path), teacher, cache)
    # The commit covers weights, tokenizer and code.
    commit = resolve_commit(model_path, revision, teacher=teacher.name)
    config = _find_config(model_path, commit, teacher.name)
    return {"weights": f"hub:{model_path}@{commit}", "config": _hash_config(config)}


def _describe_directory(directory: Path, teacher: Teacher | LanguageTeacher, cache: Path) -> dict[str, Any]:
    gguf_file = teacher.gguf_file if isinstance(teacher, LanguageTeacher) else None
    if gguf_file is not None:
        return _describe_gguf(directory / gguf_file, teacher.name, cache)
    source = read_source(directory, cache)
    if source is not None:
        return {"weights": hash_value({source["name"]: source["sha256"]})}
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise TeacherError(
            f"{directory} has no *.safetensors; other formats can run code when they are opened: "
            "save the model again with save_pretrained",
            teacher=teacher.name,
        )
    hashes = _FileHashes(cache)
    fields = {
        "weights": hashes.combine(weights),
        "config": _hash_config(_find_config(str(directory), None, teacher.name)),
        "tokenizer": hashes.combine(
            path
            for path in sorted(directory.iterdir())
            if path.name in _TOKENIZER_FILES or path.suffix in _TOKENIZER_SUFFIXES
        ),
    }
    if teacher.trust_remote_code:
        fields["code"] = hashes.combine(sorted(directory.glob("*.py")))
    hashes.save()
    return fields


def _describe_gguf(path: Path, teacher: str, cache: Path) -> dict[str, Any]:
    """One file holds weights, configuration and tokenizer."""
    if not path.is_file():
        raise TeacherError(f"there is no file {path}; correct its gguf_file", teacher=teacher)
    hashes = _FileHashes(cache)
    weights = hashes.combine([path])
    hashes.save()
    return {"weights": weights}


class _FileHashes:
    """SHA-256 of files, kept by path, size and modification time."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if cache.exists():
            # A damaged cache costs time, nothing else.
            with contextlib.suppress(DocumentError):
                self._known = read_document(cache)["files"]

    def combine(self, paths: Iterable[Path]) -> str:
        """Returns the hash of the files' names and contents."""
        return hash_value(self.by_name(paths))

    def by_name(self, paths: Iterable[Path]) -> dict[str, str]:
        """Returns the hash of each file's content."""
        return {path.name: self._hash(path) for path in paths}

    def save(self) -> None:
        """Writes the cache if it has learnt something."""
        if self._changed:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            write_document(self._cache, {"files": self._known})

    def _hash(self, path: Path) -> str:
        key, status = str(path.resolve()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if self._known.get(key, [])[:2] != stamp:
            self._known[key] = [*stamp, hash_file(path)]
            self._changed = True
        return str(self._known[key][2])


def _find_config(model_path: str, revision: str | None, teacher: str) -> Path:
    if Path(model_path).is_dir():
        path = Path(model_path) / CONFIG_FILE
        if not path.is_file():
            raise TeacherError(f"{model_path} has no {CONFIG_FILE}", teacher=teacher)
        return path
    try:
        return Path(hf_hub_download(model_path, CONFIG_FILE, revision=revision))
    except (HfHubHTTPError, OSError, ValueError) as error:
        message = f"teacher {teacher}: {model_path} cannot be fetched from the hub ({first_line(error)})"
        raise ResourceError(f"{message}; give a local directory as its model") from error


def _read_config(path: Path, teacher: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path} cannot be read ({error})", teacher=teacher) from error
    if not isinstance(config, dict):
        raise TeacherError(f"{path} is not a JSON object", teacher=teacher)
    return config


def _hash_config(path: Path) -> str:
    config = _read_config(path, path.parent.name)
    return hash_value({key: value for key, value in config.items() if key not in _NAMES_ONLY})
