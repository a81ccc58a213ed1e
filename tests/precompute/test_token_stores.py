"""Token-level stores from end to end: documents, chunks, a tiny teacher on a real local Ray, shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from cluster.ray_session import ray_session
from precompute.chunking import ChunkedPart
from precompute.interrupt import StopFlag
from precompute.store_writer import StoreWriter
from precompute.stores import StoreKey, StoreRequest, StoreSettings, make_stores
from schemas.chunks import open_chunks, view_chunks
from schemas.errors import RecipeError, RefusedError
from schemas.language import TokenStoreOptions
from schemas.text_corpus import TextCorpus
from schemas.token_rows import TokenRows, decode_token_rows, read_layout
from tests.precompute.tiny import make_rows, open_store, write_all
from tests.precompute.tiny_language import (
    VOCAB,
    WORDS,
    chunk_corpus,
    make_corpus,
    make_documents,
    make_teacher,
    make_tokenizer,
    save_tiny_llama,
    save_tiny_masked,
    write_corpus,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def corpus(tmp_path: Path) -> TextCorpus:
    rows = [{"text": text} for text in [*make_documents(8), "", "  "]]
    return make_corpus(write_corpus(tmp_path / "text.jsonl", rows))


@contextmanager
def _no_session() -> Iterator[None]:
    raise AssertionError("a cluster was started although there is nothing to do")
    yield


def make(
    tmp_path: Path,
    *requests: StoreRequest,
    session: Any = lambda: ray_session(num_cpus=2),
    new_store: bool = False,
) -> dict[StoreKey, str]:
    settings = StoreSettings(
        root=str(tmp_path / "stores"),
        hash_cache=tmp_path / "weights.json",
        options=TokenStoreOptions(shard_rows=4, batch_rows=3, max_attempts=1),
        new_store=new_store,
    )
    opened: AbstractContextManager[object] = session
    return make_stores(
        requests, settings, session=lambda: opened(), on_progress=lambda _: None, stop=StopFlag()
    )


def read_store(root: str) -> tuple[StoreWriter, list[tuple[pa.RecordBatch, TokenRows]]]:
    store = StoreWriter.attach(root)
    found = []
    for commit in store.commit_records().values():
        with pa.memory_map(str(Path(root) / "data" / commit.record.file)) as source:
            reader = pa.ipc.open_file(source)
            layout = read_layout(reader.schema.metadata)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            found += [(batch, decode_token_rows(batch, layout)) for batch in batches]
    return store, found


def request_of(model: Path, part: ChunkedPart, corpus: TextCorpus, **teacher: Any) -> StoreRequest:
    return StoreRequest(make_teacher(model, **teacher), str(model), None, corpus, part)


@pytest.mark.usefixtures("local_ray")
def test_a_store_of_a_causal_model_holds_what_the_whole_model_says(
    llama: Path, corpus: TextCorpus, tmp_path: Path
) -> None:
    (part,) = chunk_corpus(corpus, llama, tmp_path)
    roots = make(tmp_path, request_of(llama, part, corpus, temperatures=(2.0,)))
    (root,) = roots.values()
    store, found = read_store(root)
    assert store.identity.level == "token"
    assert store.identity.generation["chunks"]["vocab"] == VOCAB
    assert sum(batch.num_rows for batch, _ in found) == part.num_rows
    assert sum(int(rows.rows[-1]) for _, rows in found) == part.num_positions
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    for _, rows in found:
        for row in range(len(rows.rows) - 1):
            compare_chunk(model, rows, row, shift=1)
    # Run again: nothing is computed.
    assert make(tmp_path, request_of(llama, part, corpus, temperatures=(2.0,)), session=_no_session) == roots


def compare_chunk(
    model: Any, rows: TokenRows, row: int, *, shift: int, mask_token: int | None = None
) -> None:
    """Compares a stored chunk with float64 logits of the whole model."""
    tokens = slice(rows.chunks.offsets[row], rows.chunks.offsets[row + 1])
    ids_T, mask_T = rows.chunks.input_ids[tokens].astype(np.int64), rows.chunks.loss_mask[tokens]
    seen_T = ids_T.copy()
    if mask_token is not None:
        seen_T[mask_T == 1] = mask_token
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(seen_T)[None]).logits[0, :, :VOCAB].double()
    for position, place in zip(
        np.flatnonzero(mask_T), range(rows.rows[row], rows.rows[row + 1]), strict=True
    ):
        logits_V = logits_TV[position - shift]
        log_p_V = logits_V.log_softmax(-1)
        kept = slice(rows.entries.offsets[place], rows.entries.offsets[place + 1])
        expected = log_p_V.topk(5)
        assert rows.entries.ids[kept].tolist() == sorted(expected.indices.tolist())
        np.testing.assert_allclose(
            rows.entries.log_probs[kept], log_p_V[rows.entries.ids[kept].tolist()], rtol=1e-3, atol=1e-4
        )
        rest = (1 - log_p_V[expected.indices].exp().sum()).log()
        np.testing.assert_allclose(rows.stats.log_tail[place], rest, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rows.stats.lse[place], logits_V.logsumexp(-1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            rows.stats.target_logprob[place], log_p_V[ids_T[position]], rtol=1e-4, atol=1e-5
        )
        if rows.stats.lse_grid.shape[1]:
            np.testing.assert_allclose(
                rows.stats.lse_grid[place, 0], (logits_V / 2).logsumexp(-1), rtol=1e-4, atol=1e-5
            )


@pytest.mark.usefixtures("local_ray")
def test_a_store_of_a_masked_model_holds_what_it_says_of_the_hidden_tokens(
    corpus: TextCorpus, tmp_path: Path
) -> None:
    model_path = save_tiny_masked(tmp_path / "bert")
    (part,) = chunk_corpus(corpus, model_path, tmp_path, "masked")
    roots = make(tmp_path, request_of(model_path, part, corpus))
    _, found = read_store(*roots.values())
    spec, table = open_chunks(part.rows_path)
    assert spec.mask is not None
    stored = np.concatenate([rows.chunks.input_ids for _, rows in found])
    np.testing.assert_array_equal(stored, view_chunks(table).input_ids)
    assert spec.mask.token not in stored
    model = AutoModelForMaskedLM.from_pretrained(model_path, dtype=torch.float64)
    for _, rows in found:
        for row in range(len(rows.rows) - 1):
            compare_chunk(model, rows, row, shift=0, mask_token=spec.mask.token)


def test_a_policy_that_keeps_more_than_the_vocabulary_is_refused_before_any_work(
    llama: Path, corpus: TextCorpus, tmp_path: Path
) -> None:
    (part,) = chunk_corpus(corpus, llama, tmp_path)
    request = request_of(llama, part, corpus, keep={"kind": "top_k", "k": VOCAB + 1})
    with pytest.raises(RecipeError, match=f"teachers.tiny.keep.*k is {VOCAB + 1}, above the vocabulary"):
        make(tmp_path, request, session=_no_session)


def test_a_teacher_with_another_tokenizer_is_refused_before_any_work(
    llama: Path, corpus: TextCorpus, tmp_path: Path
) -> None:
    (part,) = chunk_corpus(corpus, llama, tmp_path)
    swapped = (WORDS[1], WORDS[0], *WORDS[2:])
    other = save_tiny_llama(tmp_path / "other", tokenizer=make_tokenizer(words=swapped))
    with pytest.raises(RecipeError, match="tokenizer is not the one that the corpus was cut"):
        make(tmp_path, request_of(other, part, corpus), session=_no_session)


def test_a_store_of_classification_rows_is_refused_by_a_language_teacher(
    corpus: TextCorpus, llama: Path, tmp_path: Path
) -> None:
    given = open_store(tmp_path / "given", make_rows(20), 8)
    write_all(given)
    given.finish()
    (part,) = chunk_corpus(corpus, llama, tmp_path)
    teacher = make_teacher(None, stores=(given.root,))
    with pytest.raises(RefusedError, match="level classification, this recipe needs one of level token"):
        make(tmp_path, StoreRequest(teacher, None, None, corpus, part), session=_no_session)
