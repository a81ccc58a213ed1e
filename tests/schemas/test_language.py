"""The recipe of a language model: what it refuses, and that the field is named."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from schemas.language import LanguageRecipe


def recipe(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "task": "language",
        "name": "lm",
        "corpora": {"docs": {"parts": [{"kind": "docstrings"}]}},
        "teachers": [{"name": "big", "model": "m", "keep": {"kind": "top_k", "k": 8}, "temperatures": [2.0]}],
        "student": {"init": {"kind": "layers", "model": "m", "layers": 2}},
        "stages": [{"corpus": "docs", "teachers": ["big"], "losses": [{"name": "ghost_kl"}]}],
    }
    return fields | changes


def stage(**changes: Any) -> dict[str, Any]:
    return {"corpus": "docs", "teachers": ["big"], "losses": [{"name": "ghost_kl"}]} | changes


def test_a_recipe_reads_back_from_its_own_dump_as_itself() -> None:
    found = LanguageRecipe.model_validate(recipe())
    assert LanguageRecipe.model_validate(found.model_dump(mode="json")) == found
    assert found.teacher("big").codec == "packed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "classification"}, "language"),
        ({"surprise": 1}, "Extra inputs"),
        ({"stages": [stage(corpus="nope")]}, "stages.0.corpus: no corpus is named 'nope'"),
        ({"stages": [stage(teachers=["nope"])]}, "stages.0.teachers: no teacher is named 'nope'"),
        ({"stages": [stage(teachers=[])]}, "stages.0.losses: ghost_kl needs teachers"),
        (
            {"stages": [stage(losses=[{"name": "cross_entropy"}])]},
            "cross_entropy alone uses no teacher",
        ),
        (
            {"stages": [stage(losses=[{"name": "ghost_kl", "temperature": 3.0}])]},
            "temperature 3 of ghost_kl is not in the grid of teacher big",
        ),
        (
            {"stages": [stage(losses=[{"name": "logit_mse", "temperature": 2.0}])]},
            "logit_mse has no temperature",
        ),
        ({"stages": [stage(losses=[{"name": "unbiased_kl"}])]}, "unbiased_kl is biased on the top_k store"),
        ({"evaluation": {"corpora": ["nope"]}}, "evaluation.corpora.0: no corpus"),
        (
            {"teachers": [{"name": "big", "model": "m", "gpus_per_actor": 1.5, "device_map": "auto"}]},
            "is a share of one GPU, or a whole number of them",
        ),
        ({"deepspeed": {"train_batch_size": 8}}, "follow from the stages"),
        (
            {"corpora": {"docs": {"messages": "chat", "parts": [{"kind": "docstrings"}]}}},
            "no column of conversations",
        ),
        ({"teachers": [{"name": "big"}]}, "give either model or stores"),
        ({"teachers": [{"name": "big", "model": "m", "device_map": "auto"}]}, "set gpus_per_actor"),
        ({"teachers": [{"name": "big", "model": "m", "gpus_per_actor": 2}]}, "needs device_map"),
        ({"teachers": [{"name": "big", "model": "m"}, {"name": "big", "model": "n"}]}, "must be distinct"),
        ({"compare": {"arms": [{"name": "a", "losses": [{"name": "jsd"}]}]}}, "compare.arms.a.losses"),
    ],
)
def test_an_impossible_recipe_is_refused_with_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LanguageRecipe.model_validate(recipe(**changes))


def test_a_temperature_of_the_grid_is_taken() -> None:
    losses = [{"name": "ghost_kl", "temperature": 2.0}, {"name": "cross_entropy", "weight": 0.1}]
    found = LanguageRecipe.model_validate(recipe(stages=[stage(losses=losses)]))
    assert found.stages[0].losses[0].temperature == 2.0


def test_an_unbiased_store_is_refused_at_another_temperature_whatever_its_grid() -> None:
    teacher = {
        "name": "big",
        "model": "m",
        "keep": {"kind": "sampled", "num_samples": 8},
        "temperatures": [2.0],
    }
    losses = [{"name": "unbiased_kl", "temperature": 2.0}]
    with pytest.raises(ValidationError, match="unbiased at temperature 1 only"):
        LanguageRecipe.model_validate(recipe(teachers=[teacher], stages=[stage(losses=losses)]))


def test_conversations_are_for_the_causal_objective() -> None:
    corpora = {"docs": {"messages": "m", "parts": [{"kind": "file", "path": "x.jsonl"}]}}
    LanguageRecipe.model_validate(recipe(corpora=corpora))
    with pytest.raises(ValidationError, match=r"corpora\.docs\.messages: conversations need objective"):
        LanguageRecipe.model_validate(recipe(corpora=corpora, objective="masked"))
