"""What docs/language-models.md shows is what recipes and chunks take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from precompute.chunking import chunk_part, describe_chunks
from precompute.documents import materialise_documents
from schemas.chunks import open_chunks, view_chunks
from schemas.language import LanguageRecipe
from tests.precompute.tiny_language import make_corpus

PAGE = Path(__file__).parents[2] / "docs" / "language-models.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_parts_of_a_recipe_that_the_page_shows_make_one() -> None:
    recipe: dict[str, Any] = {"task": "language", "name": "docs"}
    for block in blocks("yaml"):
        found = yaml.safe_load(block)
        assert not recipe.keys() & found.keys()
        recipe |= found
    recipe["stages"] = [{"corpus": "chats", "teachers": ["big"], "losses": [{"name": "ghost_kl"}]}]
    made = LanguageRecipe.model_validate(recipe)
    assert set(made.corpora) == {"wiki", "rows", "hub", "chats", "here"}
    # The line that is commented out is the other kind of start.
    (other,) = re.findall(r"^  # (init: .*)$", PAGE.read_text(), re.MULTILINE)
    recipe["student"] |= yaml.safe_load(other)
    assert LanguageRecipe.model_validate(recipe).student.init.kind == "config"


def test_of_the_pages_conversation_the_reply_alone_counts(smollm2: Path, tmp_path: Path) -> None:
    (row,) = blocks("json")
    (tmp_path / "chats.jsonl").write_text(json.dumps(json.loads(row)) + "\n")
    corpus = make_corpus(tmp_path / "chats.jsonl", messages="messages", max_length=512)
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    spec = describe_chunks(tokenizer, corpus, "causal", field="student.init.model")
    (documents,) = materialise_documents("chats", corpus, data_root=None, out=tmp_path)
    chunks = view_chunks(open_chunks(chunk_part(documents, tokenizer, spec).rows_path)[1])
    said = [tokenizer.decode([token]) for token in chunks.input_ids[chunks.loss_mask.astype(bool)]]
    assert said == ["Seven", ".", "<|im_end|>"]
    assert "one chunk of 38 tokens" in PAGE.read_text()
    assert chunks.offsets.tolist() == [0, 38]


@pytest.mark.parametrize("name", ["top_k", "top_p", "sampled", "hybrid", "dense", "ghost_kl", "support_kl"])
def test_every_policy_and_loss_of_the_page_has_a_line(name: str) -> None:
    assert re.search(rf"^\| `{name}\b", PAGE.read_text(), re.MULTILINE)
