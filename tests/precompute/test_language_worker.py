"""The worker of language models, without Ray: shards that are committed, and rows that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from precompute.chunking import ChunkedPart
from precompute.language_worker import LanguageWorker
from precompute.store_writer import StoreWriter
from precompute.stores import StoreRequest, StoreSettings, StoreTarget, describe_targets, make_job
from schemas.chunks import open_chunks
from schemas.errors import CorpusError, TeacherError
from schemas.language import TokenStoreOptions
from schemas.text_corpus import TextCorpus
from schemas.token_rows import decode_token_rows, read_layout
from tests.precompute.tiny_language import (
    VOCAB,
    chunk_corpus,
    make_corpus,
    make_documents,
    make_teacher,
    save_tiny_llama,
    write_corpus,
)

OPTIONS = TokenStoreOptions(shard_rows=4, batch_rows=3)
POLICIES: list[tuple[dict[str, Any], str]] = [
    ({"kind": "dense"}, "fixed"),
    ({"kind": "dense"}, "compact"),
    ({"kind": "top_k", "k": 5}, "fixed"),
    ({"kind": "top_p", "p": 0.8, "k_max": 20}, "compact"),
    ({"kind": "sampled", "num_samples": 12}, "packed"),
    ({"kind": "sampled", "num_samples": 12, "tau": 0.7}, "compact"),
    ({"kind": "hybrid", "k": 4, "m": 3}, "packed"),
    ({"kind": "hybrid", "k": 4, "m": 3}, "compact"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def corpus(tmp_path: Path) -> TextCorpus:
    rows = [{"text": text} for text in make_documents(8)]
    return make_corpus(write_corpus(tmp_path / "text.jsonl", rows))


def make_target(
    model: Path, corpus: TextCorpus, tmp_path: Path, part: ChunkedPart | None = None, **teacher: Any
) -> StoreTarget:
    if part is None:
        (part,) = chunk_corpus(corpus, model, tmp_path)
    settings = StoreSettings(str(tmp_path / "stores"), tmp_path / "weights.json", OPTIONS)
    request = StoreRequest(make_teacher(model, **teacher), str(model), None, corpus, part)
    (target,) = describe_targets([request], settings)
    return target


def run(target: StoreTarget, **job: Any) -> tuple[StoreWriter, list[Any]]:
    store = StoreWriter.open(target.root, target.identity, target.plan)
    worker = LanguageWorker(target.spec)  # type: ignore[arg-type]
    try:
        receipts = [
            worker.process(replace(make_job(target, store, task, OPTIONS), **job))
            for task in store.plan.tasks()
        ]
    finally:
        worker.close()
    return store, receipts


def read(store: StoreWriter) -> list[pa.RecordBatch]:
    batches = []
    for commit in store.commit_records().values():
        with pa.memory_map(f"{store.root}/data/{commit.record.file}") as source:
            reader = pa.ipc.open_file(source)
            batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
    return batches


@pytest.mark.parametrize(("keep", "codec"), POLICIES)
def test_every_policy_and_codec_gives_shards_that_pass_their_own_check(
    llama: Path, corpus: TextCorpus, tmp_path: Path, keep: dict[str, Any], codec: str
) -> None:
    target = make_target(llama, corpus, tmp_path, keep=keep, codec=codec, temperatures=(0.5, 2.0))
    store, receipts = run(target)
    assert all(receipt.committed for receipt in receipts)
    store.finish()
    batches = read(store)
    assert sum(batch.num_rows for batch in batches) == store.plan.num_rows
    assert pa.concat_tables(map(pa.Table.from_batches, [[b] for b in batches])).column(
        "ordinal"
    ).to_pylist() == list(range(store.plan.num_rows))
    layout = read_layout(store.schema.metadata)
    assert (layout.codec.name, layout.entries.vocab, layout.grid) == (codec, VOCAB, (0.5, 2.0))
    assert store.schema.metadata[b"tmkd.format"] == b"1.0"
    assert all(decode_token_rows(batch, layout).stats.lse_grid.shape[1] == 2 for batch in batches)


def test_a_receipt_counts_tokens_and_padding(llama: Path, corpus: TextCorpus, tmp_path: Path) -> None:
    target = make_target(llama, corpus, tmp_path)
    _, receipts = run(target)
    part = target.request.part
    assert isinstance(part, ChunkedPart)
    assert sum(receipt.num_tokens for receipt in receipts) == part.num_tokens
    assert all(receipt.num_padded_tokens >= receipt.num_tokens for receipt in receipts)


def test_a_shard_is_the_same_whatever_the_worker_did_before(
    llama: Path, corpus: TextCorpus, tmp_path: Path
) -> None:
    keep = {"kind": "sampled", "num_samples": 12}
    (part,) = chunk_corpus(corpus, llama, tmp_path)
    first = make_target(llama, corpus, tmp_path / "a", part, keep=keep)
    second = make_target(llama, corpus, tmp_path / "b", part, keep=keep)
    store, _ = run(first)
    expected = {shard: commit.record.sha256 for shard, commit in store.commit_records().items()}
    other = StoreWriter.open(second.root, second.identity, second.plan)
    worker = LanguageWorker(second.spec)  # type: ignore[arg-type]
    for task in reversed(other.plan.tasks()):
        worker.process(make_job(second, other, task, OPTIONS))
    worker.close()
    found = {shard: commit.record.sha256 for shard, commit in other.commit_records().items()}
    assert found == expected


def break_token(model: Path, token: int, tmp_path: Path) -> Path:
    """Saves the model with an embedding that is not a number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    broken = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "broken")
    return tmp_path / "broken"


def test_chunks_with_logits_that_are_no_numbers_fail_or_are_left_out(llama: Path, tmp_path: Path) -> None:
    texts = ["w1 w2 w3", "w4 w5", "w6 w59 w7", "w8"]
    corpus = make_corpus(write_corpus(tmp_path / "text.jsonl", [{"text": text} for text in texts]))
    model = break_token(llama, 7 + 59, tmp_path)
    target = make_target(model, corpus, tmp_path)
    with pytest.raises(TeacherError, match="logits are not finite for toy/train row train/2#0"):
        run(target)
    store, receipts = run(target, on_bad_row="exclude")
    assert [receipt.num_excluded for receipt in receipts] == [1]
    (record,) = [commit.record for commit in store.commit_records().values()]
    assert [row.example_id for row in record.excluded] == ["train/2#0"]
    ids = pa.Table.from_batches(read(store)).column("example_id").to_pylist()
    assert ids == ["train/0#0", "train/1#0", "train/3#0"]


def test_chunks_that_are_not_those_of_the_plan_are_refused_before_the_model_runs(
    llama: Path, corpus: TextCorpus, tmp_path: Path
) -> None:
    target = make_target(llama, corpus, tmp_path)
    store = StoreWriter.open(target.root, target.identity, target.plan)
    path = target.request.part.rows_path
    _, table = open_chunks(path)
    lists = table.column("loss_mask").to_pylist()
    lists[0][-1] = 0
    column = table.schema.get_field_index("loss_mask")
    changed = table.set_column(
        column, table.schema.field(column), pa.array(lists, table.schema.types[column])
    )
    path.unlink()
    with pa.ipc.new_file(str(path), changed.schema) as writer:
        writer.write_table(changed)
    worker = LanguageWorker(replace(target.spec, model_path="/nowhere"))  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match=r"the text of train/0#0 .* has changed since the plan"):
        worker.process(make_job(target, store, store.plan.tasks()[0], OPTIONS))
    worker.close()


def test_chunks_longer_than_the_model_are_refused(llama: Path, tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "text.jsonl", [{"text": text} for text in make_documents(3)])
    target = make_target(llama, make_corpus(documents, max_length=65), tmp_path)
    with pytest.raises(TeacherError, match="max_length is 65, the model has 64 positions"):
        run(target)


def test_rows_say_what_the_chunks_say(llama: Path, corpus: TextCorpus, tmp_path: Path) -> None:
    target = make_target(llama, corpus, tmp_path)
    store, _ = run(target)
    found = pa.Table.from_batches(read(store))
    _, expected = open_chunks(target.request.part.rows_path)
    for name in ("example_id", "text_hash", "input_ids", "loss_mask"):
        assert found.column(name).to_pylist() == expected.column(name).to_pylist()
    assert np.array_equal(found.column("ordinal").to_numpy(), np.arange(expected.num_rows))
