from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from schemas.recipe import Corpus, Recipe


def document(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "run",
        "corpora": {
            "train": {"labels": ["a", "b"], "text": ["x"], "parts": [{"kind": "file", "path": "t.jsonl"}]},
            "raw": {
                "labels": ["a", "b"],
                "text": ["x"],
                "label": None,
                "parts": [{"kind": "file", "path": "u.jsonl"}],
            },
        },
        "teachers": [{"name": "t1", "model": "some/model"}],
        "student": {"init": {"kind": "layers", "model": "some/model", "layers": 2}},
        "stages": [
            {"kind": "pretrain", "corpus": "raw", "teachers": ["t1"]},
            {"kind": "finetune", "corpus": "train", "teachers": ["t1"]},
        ],
    }
    return {**base, **changes}


def test_a_minimal_recipe_is_valid_and_frozen() -> None:
    recipe = Recipe.model_validate(document())
    assert recipe.stages[1].kind == "finetune"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def test_label_names_that_are_matched_alike_are_refused() -> None:
    fields = {"text": ["x"], "parts": [{"kind": "file", "path": "t.jsonl"}]}
    for labels in (["Not entailed", "not_entailed"], ["yes", "YES"]):
        with pytest.raises(ValidationError, match="labels must be distinct"):
            Corpus.model_validate({**fields, "labels": labels})


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    recipe = Recipe.model_validate(document())
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stages": [{"kind": "finetune", "corpus": "tain"}]}, "no corpus is named 'tain'"),
        (
            {"stages": [{"kind": "finetune", "corpus": "train", "teachers": ["t9"]}]},
            "no teacher is named 't9'",
        ),
        ({"stages": [{"kind": "finetune", "corpus": "raw", "alpha": 0.5}]}, "no label column"),
        (
            {"stages": [{"kind": "finetune", "corpus": "train", "teachers": ["t1"]}]},
            "arm tmkd needs two stages",
        ),
        ({"teachers": [{"name": "t1"}]}, "either model or stores"),
        ({"teachers": [{"name": "t1", "model": "m", "stores": ["s"]}]}, "either model or stores"),
        ({"teachers": [{"name": "t1", "model": "m"}] * 2}, "distinct"),
        ({"teachers": [{"name": "t1", "model": "m", "tokens_per_batch": 16}]}, "at least max_length"),
        (
            {"teachers": [{"name": "t1", "model": "m", "keep": {"kind": "top_k", "k": 3}}]},
            "keep is top_k; classification stores are dense",
        ),
        ({"deepspeed": {"train_batch_size": 8}}, "batch, optimizer and scheduler"),
        (
            {"student": {"init": {"kind": "layers", "model": "m"}, "deepspeed": {"optimizer": {}}}},
            "batch, optimizer and scheduler",
        ),
        ({"compare": {"arms": ["m-o-m"]}}, "m-o-m is computed"),
        (
            {
                "stages": [
                    {"kind": "pretrain", "corpus": "raw", "teachers": ["t1"]},
                    {"kind": "finetune", "corpus": "train"},
                ],
                "compare": {"arms": ["m-o-1"]},
            },
            "arm m-o-1 needs a stage of kind finetune that names teachers",
        ),
        ({"compare": {"seeds": [1, 1]}}, "1 is given twice"),
        ({"compare": {"arm_seeds": {"golden": [2, 2]}}}, "2 is given twice"),
        ({"compare": {"teachers": {"tmkd": ["t1"]}}}, "tmkd has no student per teacher"),
        ({"compare": {"arms": ["1-o-1"], "teachers": {"1-o-1": ["t9"]}}}, "no teacher is named 't9'"),
        (
            {
                "student": {"init": {"kind": "layers", "model": "m"}, "arm": "m-o-1"},
                "compare": {"arms": ["golden-long"]},
            },
            "golden-long takes as many steps as tmkd",
        ),
        ({"name": "../escape"}, "pattern"),
        ({"name": "students"}, "a directory that all runs share"),
        ({"evaluation": {"corpora": ["nowhere"]}}, "no corpus is named 'nowhere'"),
        ({"typo": 1}, "Extra inputs"),
    ],
)
def test_impossible_recipes_say_what_is_wrong(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Recipe.model_validate(document(**changes))


def retrieved(columns: list[str], **fields: Any) -> Corpus:
    part = {"kind": "retrieved", "top": 3, "source": {"kind": "file", "path": "t.jsonl"}, **fields}
    return Corpus.model_validate({"labels": ["a", "b"], "text": columns, "parts": [part]})


def test_a_retrieved_part_is_named_so_and_reads_back_as_itself() -> None:
    corpus = retrieved(["q", "p"], source={"kind": "hub", "repo": "r", "split": "test", "text": ["s", "t"]})
    assert corpus.part_names() == ("retrieved",)
    assert Corpus.model_validate(corpus.model_dump(mode="json")) == corpus


@pytest.mark.parametrize(
    ("columns", "fields", "expected"),
    [
        (["q"], {}, "pairs two texts; the corpus's text names one column"),
        (["q", "p"], {"top": 0}, "greater than"),
        (["q", "p"], {"text": ["s", "t"]}, "name them in source.text"),
        (["q", "p"], {"source": {"kind": "file", "path": "t", "text": ["s"]}}, "as many columns"),
        (["q", "p"], {"source": {"kind": "retrieved", "top": 1}}, "'hub', 'file', 'pydocqa'"),
        (
            ["q", "p"],
            {"source": {"kind": "file", "path": "t", "fold": {"of": 2, "take": "rest"}}},
            "source.fold: pairs are retrieved from a whole source",
        ),
    ],
)
def test_impossible_retrieved_parts_say_what_is_wrong(
    columns: list[str], fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValidationError, match=expected):
        retrieved(columns, **fields)
