"""A language recipe for the tests of pure functions: nothing that it names exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.language.arms import LanguageInputs
from schemas.chunks import ChunkSpec
from schemas.language import LanguageRecipe
from schemas.records import LockedPart, StoresLock

CHUNKS = ChunkSpec(
    objective="causal",
    tokenizer="a" * 64,
    max_length=16,
    add_special_tokens=True,
    vocab=90,
)
GHOST = {"name": "ghost_kl", "temperature": 2.0}
ENTROPY = {"name": "cross_entropy"}


def recipe(**changes: Any) -> LanguageRecipe:
    """Two stages with teachers, one arm without, one with another teacher."""
    fields: dict[str, Any] = {
        "task": "language",
        "name": "run",
        "seed": 1,
        "corpora": {
            name: {"max_length": 16, "parts": [{"kind": "docstrings"}]} for name in ("first", "second")
        },
        "teachers": [
            {"name": "a", "model": "m", "temperatures": [2.0], "weight": 0.5},
            {"name": "b", "model": "m", "keep": {"kind": "sampled", "num_samples": 4}},
            {"name": "unused", "model": "m"},
        ],
        "student": {"init": {"kind": "layers", "model": "m", "layers": 2}, "max_length": 32},
        "stages": [
            {"corpus": "first", "teachers": ["a"], "losses": [GHOST]},
            {"corpus": "second", "teachers": ["a"], "losses": [GHOST, ENTROPY]},
        ],
        "compare": {
            "arms": [
                {"name": "golden", "losses": [ENTROPY]},
                {"name": "drawn", "teachers": ["b"], "losses": [{"name": "unbiased_kl"}]},
            ]
        },
    }
    return LanguageRecipe.model_validate(fields | changes)


def inputs(**changes: Any) -> LanguageInputs:
    """What planning would have found."""
    parts = {
        name: (
            LockedPart(
                part="p",
                fingerprint=letter * 64,
                plan_hash=letter * 64,
                num_rows=9,
                shard_rows=4,
                rows=f"/{name}/chunks.arrow",
                stores={teacher: f"/stores/{name}-{teacher}" for teacher in ("a", "b")},
            ),
        )
        for name, letter in (("first", "1"), ("second", "2"))
    }
    fields: dict[str, Any] = {
        "lock": StoresLock(corpora=parts),
        "chunks": dict.fromkeys(parts, CHUNKS),
        "dropped_rows": {"second": "/dropped/f00.npy"},
        "init": recipe().student.init,
        "init_hash": "e" * 64,
        "threads": 1,
    }
    return LanguageInputs(**(fields | changes))


STUDENTS = Path("/students")
