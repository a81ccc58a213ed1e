from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, BertTokenizer

from schemas.tokenizer import hash_tokenizer
from tests.distill.tiny_models import PIECES, save_tokenizer


def test_padding_truncation_and_inputs_of_a_model_are_no_part_of_the_hash(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "a"))
    before = hash_tokenizer(tokenizer)
    tokenizer(["a b c", "d"], padding=True, truncation=True, max_length=2)
    tokenizer.model_input_names = ["input_ids"]
    assert hash_tokenizer(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "b")
    assert hash_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "b")) == before


def test_another_vocabulary_has_another_hash(tmp_path: Path) -> None:
    first = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "a"))
    swapped = [*PIECES[:-2], PIECES[-1], PIECES[-2]]
    BertTokenizer(vocab={piece: place for place, piece in enumerate(swapped)}).save_pretrained(tmp_path / "b")
    assert hash_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "b")) != hash_tokenizer(first)
