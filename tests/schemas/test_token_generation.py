"""The generation of a token-level store: read from an identity, and refused where it is none."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.chunks import ChunkSpec
from schemas.errors import DamagedStoreError, RefusedError
from schemas.policy import TopKPolicy
from schemas.records import StoreIdentity
from schemas.token_generation import TokenGeneration, read_generation
from schemas.token_rows import read_layout

CHUNKS = ChunkSpec(objective="causal", tokenizer="c" * 64, max_length=8, add_special_tokens=True, vocab=50)
GENERATION = TokenGeneration(
    policy=TopKPolicy(kind="top_k", k=4),
    grid=(2.0,),
    codec="packed",
    vocab=50,
    tokenizer="c" * 64,
    chunks=CHUNKS,
)


def identity(generation: dict[str, Any], level: str = "token") -> StoreIdentity:
    fields = {"plan_hash": "a" * 64, "generation_hash": "b" * 64, "native_labels": ()}
    names = {"teacher": "big", "corpus": "docs", "part": "train"}
    return StoreIdentity.model_validate({**fields, **names, "generation": generation, "level": level})


def test_a_generation_reads_back_beside_the_fields_of_the_model() -> None:
    fields = {"weights": "w", "dtype": "float32", **GENERATION.model_dump(mode="json")}
    found = read_generation(identity(fields), store="s")
    assert found == GENERATION
    layout = read_layout(found.shard_schema().metadata)
    assert (layout.codec.name, layout.entries.vocab, layout.grid) == ("packed", 50, (2.0,))


def test_a_store_of_another_level_is_refused() -> None:
    with pytest.raises(RefusedError, match="store s: holds classification rows of teacher big"):
        read_generation(identity({}, "classification"), store="s")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab": None},
        {"codec": "zip"},
        {"policy": {"kind": "top_k", "k": 51}},
        {"grid": [2.0, 2.0]},
        {"chunks": {}},
    ],
)
def test_a_generation_that_lacks_a_field_or_makes_no_layout_is_damage(changes: dict[str, Any]) -> None:
    fields = GENERATION.model_dump(mode="json") | changes
    with pytest.raises(DamagedStoreError, match="not that of a token-level store"):
        read_generation(identity(fields), store="s")
