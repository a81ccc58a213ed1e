"""Tiny language models, their tokenizers and corpora for the tests of precompute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from precompute.chunking import ChunkedPart, chunk_part, describe_chunks
from precompute.documents import materialise_documents
from precompute.tokenizer import load_tokenizer
from schemas.language import LanguageTeacher, Objective
from schemas.text_corpus import TextCorpus

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|im_start|>", "<|im_end|>")
WORDS = (*(f"w{i}" for i in range(60)), "user", "assistant", "system", "\n", "hello", ".")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = len(SPECIAL) + len(WORDS)
PADDED_VOCAB = 80


def make_tokenizer(*, template: str | None = TEMPLATE, words: Sequence[str] = WORDS) -> Any:
    """Returns a fast tokenizer of whole words, with the special tokens round a text."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = template
    return fast


def save_tiny_llama(
    directory: Path, *, seed: int = 0, tokenizer: Any = None, vocab: int = PADDED_VOCAB
) -> Path:
    """Saves a random Llama (32 wide, 2 layers) whose vocabulary is padded."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    (tokenizer or make_tokenizer()).save_pretrained(directory)
    return directory


def save_tiny_masked(directory: Path, *, seed: int = 0) -> Path:
    """Saves a random BERT with its masked-token head."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=PADDED_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    BertForMaskedLM(config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_documents(num: int, *, seed: int = 0, longest: int = 50) -> list[str]:
    """Returns documents of 1 to ``longest`` random words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS[:60], rng.integers(1, longest + 1))) for _ in range(num)]


def write_corpus(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_corpus(path: Path, **fields: Any) -> TextCorpus:
    """Returns a corpus of one JSON lines file."""
    parts = ({"kind": "file", "path": str(path), "name": "train"},)
    return TextCorpus.model_validate({"max_length": 16, "parts": parts} | fields)


def chunk_corpus(
    corpus: TextCorpus, model: Path, out: Path, objective: Objective = "causal"
) -> tuple[ChunkedPart, ...]:
    """Materialises a corpus and cuts it into chunks."""
    tokenizer = load_tokenizer(str(model))
    spec = describe_chunks(tokenizer, corpus, objective, field="teachers.tiny.model")
    parts = materialise_documents("toy", corpus, data_root=None, out=out)
    return tuple(chunk_part(part, tokenizer, spec) for part in parts)


def make_teacher(model: Path | None, **fields: Any) -> LanguageTeacher:
    """Returns a recipe's teacher."""
    return LanguageTeacher.model_validate(
        {
            "name": "tiny",
            "model": model and str(model),
            "keep": {"kind": "top_k", "k": 5},
            "tokens_per_batch": 64,
        }
        | fields
    )
