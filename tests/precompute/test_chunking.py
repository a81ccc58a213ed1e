"""Documents to chunks: cuts, masks, conversations, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precompute.chunking import chunk_part, describe_chunks
from precompute.conversation import encode_conversation
from precompute.documents import materialise_documents
from precompute.draws import draw_uniforms, position_keys
from schemas.chunks import open_chunks, view_chunks
from schemas.digest import canonical_json
from schemas.errors import CorpusError, RecipeError
from schemas.text_corpus import TextCorpus
from tests.precompute.tiny_language import (
    SPECIAL,
    VOCAB,
    WORDS,
    make_corpus,
    make_documents,
    make_tokenizer,
    write_corpus,
)

IDS = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3 w4 ."},
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6"},
]


def chunk(corpus: TextCorpus, out: Path, objective: Any = "causal", tokenizer: Any = None) -> Any:
    tokenizer = tokenizer or make_tokenizer()
    spec = describe_chunks(tokenizer, corpus, objective, field="teachers.t.model")
    (part,) = materialise_documents("toy", corpus, data_root=None, out=out)
    return chunk_part(part, tokenizer, spec)


def read(part: Any) -> list[tuple[str, list[int], list[int]]]:
    _, table = open_chunks(part.rows_path)
    chunks = view_chunks(table)
    cuts = chunks.offsets.tolist()
    return [
        (name, chunks.input_ids[a:b].tolist(), chunks.loss_mask[a:b].tolist())
        for name, a, b in zip(table.column("example_id").to_pylist(), cuts[:-1], cuts[1:], strict=True)
    ]


def test_a_document_is_cut_into_consecutive_pieces_without_overlap(tmp_path: Path) -> None:
    text = " ".join(f"w{i}" for i in range(20))
    corpus = make_corpus(write_corpus(tmp_path / "a.jsonl", [{"text": text}]), max_length=8)
    part = chunk(corpus, tmp_path)
    found = read(part)
    assert [name for name, _, _ in found] == ["train/0#0", "train/0#1", "train/0#2"]
    whole = [IDS["[CLS]"], *(IDS[f"w{i}"] for i in range(20)), IDS["[SEP]"]]
    assert [ids for _, ids, _ in found] == [whole[:8], whole[8:16], whole[16:]]
    # The first token of a chunk is never predicted.
    assert all(mask == [0] + [1] * (len(ids) - 1) for _, ids, mask in found)
    assert (part.num_tokens, part.num_positions, part.num_dropped) == (22, 19, 0)


def test_a_last_piece_of_one_token_is_dropped_and_counted(tmp_path: Path) -> None:
    # 15 words and two special tokens: 8 + 8 + 1.
    text = " ".join(f"w{i}" for i in range(15))
    corpus = make_corpus(write_corpus(tmp_path / "a.jsonl", [{"text": text}]), max_length=8)
    part = chunk(corpus, tmp_path)
    assert [len(ids) for _, ids, _ in read(part)] == [8, 8]
    assert part.num_dropped == 1


def test_without_special_tokens_there_are_none(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{"text": "w1 w2 w3"}])
    part = chunk(make_corpus(path, add_special_tokens=False), tmp_path)
    assert read(part)[0][1] == [IDS["w1"], IDS["w2"], IDS["w3"]]


def test_the_same_chunks_are_made_once_and_other_options_make_others(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{"text": text} for text in make_documents(5)])
    first = chunk(make_corpus(path), tmp_path)
    written = first.rows_path.stat().st_mtime_ns
    assert chunk(make_corpus(path), tmp_path) == first
    assert first.rows_path.stat().st_mtime_ns == written
    assert chunk(make_corpus(path, max_length=32), tmp_path).rows_path != first.rows_path
    first.rows_path.with_name("meta.json").write_text("damaged")
    assert chunk(make_corpus(path), tmp_path) == first


def test_the_true_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{"text": "w1 w2"}])
    assert chunk(make_corpus(path), tmp_path).spec.vocab == VOCAB


def test_hidden_tokens_are_drawn_once_and_ids_are_kept(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{"text": text} for text in make_documents(40)])
    part = chunk(make_corpus(path), tmp_path, "masked")
    special = {IDS[token] for token in SPECIAL}
    found = read(part)
    for _, ids, mask in found:
        assert any(mask)
        assert IDS["[MASK]"] not in ids
        assert not {token for token, hidden in zip(ids, mask, strict=True) if hidden} & special
    words = sum(token not in special for _, ids, _ in found for token in ids)
    # 0.15 of the words, and one at least of a chunk.
    assert 0.12 < part.num_positions / words < 0.25
    assert read(chunk(make_corpus(path), tmp_path / "again", "masked")) == found
    other = chunk(make_corpus(path, mask={"seed": 1}), tmp_path, "masked")
    assert read(other) != found


def test_which_tokens_are_hidden_says_nothing_of_what_a_policy_of_the_same_seed_draws(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{"text": text} for text in make_documents(200)])
    keys = [
        position_keys(0, name, np.flatnonzero(mask))
        for name, _, mask in read(chunk(make_corpus(path), tmp_path, "masked"))
    ]
    uniforms = draw_uniforms(np.concatenate(keys), 1)[:, 0]
    assert abs(uniforms.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(uniforms))


def test_of_a_conversation_only_replies_and_their_end_marks_count() -> None:
    ids, mask = encode_conversation(make_tokenizer(), canonical_json(CHAT).decode())
    names = [(*SPECIAL, *WORDS)[token] for token in ids]
    replied = [name for name, is_reply in zip(names, mask, strict=True) if is_reply]
    assert replied == ["w3", "w4", ".", "<|im_end|>", "w6", "<|im_end|>"]
    assert names[0] == "<|im_start|>"


def test_conversations_become_chunks_without_further_special_tokens(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{"chat": CHAT}, {"chat": CHAT[:1]}, {"chat": []}])
    part = chunk(make_corpus(path, messages="chat", max_length=64), tmp_path)
    ((_, ids, mask),) = read(part)
    assert IDS["[CLS]"] not in ids
    assert sum(mask) == 6
    # Without a reply there is nothing to predict; without messages there is no document.
    assert part.num_dropped == 1
    assert part.excluded == (("train/2", "the document is empty"),)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{"chat": CHAT}])
    with pytest.raises(RecipeError, match=r"teachers\.t\.model.*has no chat template"):
        chunk(make_corpus(path, messages="chat"), tmp_path, tokenizer=make_tokenizer(template=None))


def test_a_template_that_rewrites_what_was_said_is_refused() -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="in another way once the conversation goes on"):
        encode_conversation(make_tokenizer(template=template), canonical_json(CHAT).decode())


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    path = write_corpus(tmp_path / "a.jsonl", [{"text": "w1 w2"}])
    with pytest.raises(RecipeError, match="has no mask token"):
        chunk(make_corpus(path), tmp_path, "masked", tokenizer)


def test_a_corpus_without_a_chunk_is_an_error(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{"text": "w1"}])
    with pytest.raises(CorpusError, match="toy/train: no document gives a chunk"):
        chunk(make_corpus(path, add_special_tokens=False), tmp_path)


def test_ids_and_masks_have_the_dtypes_of_their_columns(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{"text": "w1 w2"}])
    _, table = open_chunks(chunk(make_corpus(path), tmp_path).rows_path)
    chunks = view_chunks(table)
    assert (chunks.input_ids.dtype, chunks.loss_mask.dtype) == (np.int32, np.uint8)


def test_a_conversation_that_the_assistant_begins_is_refused() -> None:
    """What introduces its first reply cannot be told from the reply."""
    with pytest.raises(ValueError, match="it begins with the assistant"):
        encode_conversation(make_tokenizer(), canonical_json(CHAT[1:]).decode())
