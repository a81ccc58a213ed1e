"""A model's tokenizer by itself, for chunks and for the check that a teacher reads them.

Invariants (tests/precompute/test_token_stores.py):
    1. A teacher whose tokenizer gives other ids is refused before any work.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from precompute.pretrained import reading_pretrained
from schemas.errors import TeacherError
from schemas.tokenizer_hash import hash_tokenizer


def load_tokenizer(
    model_path: str,
    revision: str | None = None,
    gguf_file: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """Loads a tokenizer; the same one again where it was loaded before and its files are as they were.

    Args:
        model_path: A local directory or a hub id.
        revision: On the hub.
        gguf_file: The file of the directory that holds it.
        trust_remote_code: See transformers.

    Raises:
        TeacherError: The directory has none.
        ResourceError: The hub cannot be reached.
    """
    return _load(model_path, revision, gguf_file, trust_remote_code, _stamp(model_path))


@lru_cache(maxsize=4)
def _load(
    model_path: str,
    revision: str | None,
    gguf_file: str | None,
    trust_remote_code: bool,
    _files: tuple[tuple[str, int, int], ...],
) -> Any:
    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    with reading_pretrained(model_path, model_path):
        return AutoTokenizer.from_pretrained(
            model_path, use_fast=True, revision=revision, trust_remote_code=trust_remote_code, **options
        )


def _stamp(model_path: str) -> tuple[tuple[str, int, int], ...]:
    """Returns names, sizes and times of a directory's files; of a hub id nothing."""
    directory = Path(model_path)
    if not directory.is_dir():
        return ()
    stats = [(path.name, path.stat()) for path in sorted(directory.iterdir())]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def read_tokenizer_hash(tokenizer: Any, *, teacher: str) -> str:
    """Returns the hash of a fast tokenizer (64 hex digits).

    Raises:
        TeacherError: It is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TeacherError("its tokenizer is not a fast one (tokenizer.json)", teacher=teacher)
    return hash_tokenizer(tokenizer.backend_tokenizer.to_str())
