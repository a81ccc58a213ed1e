"""The worker end to end with a tiny BERT, without Ray."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from precompute.store_writer import StoreWriter
from precompute.tasks import ShardJob, WorkerSpec
from precompute.teacher import LoadedTeacher, TokenisedRows
from precompute.worker import ShardWorker
from schemas.errors import CorpusError, TeacherError
from schemas.plan import make_plan
from schemas.recipe import Teacher
from tests.precompute.tiny import make_identity, make_rows, open_store, save_tiny_bert, write_rows

NUM_ROWS = 50


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose embedding of `red` is NaN: rows with that word have no finite logits."""
    directory = save_tiny_bert(tmp_path_factory.mktemp("poisoned"))
    weights = load_file(directory / "model.safetensors")
    word = (directory / "vocab.txt").read_text().split("\n").index("red")
    weights["bert.embeddings.word_embeddings.weight"][word] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_spec(model: Path, **changes: object) -> WorkerSpec:
    fields = {"name": "tiny", "model": str(model), "max_length": 24, "tokens_per_batch": 100}
    return WorkerSpec(Teacher.model_validate(fields | changes), str(model), None, 1)


def make_jobs(tmp_path: Path, **changes: object) -> tuple[StoreWriter, list[ShardJob]]:
    rows = make_rows(NUM_ROWS)
    store = open_store(tmp_path / "store", rows, shard_rows=20)
    path = write_rows(rows, tmp_path / "rows.arrow")
    jobs = [ShardJob(store.root, str(path), "toy/train", task, batch_rows=7) for task in store.plan.tasks()]
    return store, [dataclasses.replace(job, **changes) for job in jobs]


def read_store(store: StoreWriter) -> pa.Table:
    tables = [
        pa.ipc.open_file(str(Path(store.root) / "data" / record.file)).read_all()
        for record in [commit.record for commit in store.commit_records().values()]
    ]
    return pa.concat_tables(tables)


def run_all(worker: ShardWorker, jobs: list[ShardJob]) -> None:
    for position, job in enumerate(jobs):
        for later in jobs[position + 1 :]:
            worker.prefetch(later)
        worker.process(job)
    worker.close()


def test_logits_are_those_of_a_plain_forward_pass_over_each_row_alone(model: Path, tmp_path: Path) -> None:
    store, jobs = make_jobs(tmp_path)
    worker = ShardWorker(make_spec(model))
    run_all(worker, jobs)
    store.finish()
    table = read_store(store)
    rows = make_rows(NUM_ROWS)
    assert table.column("example_id").to_pylist() == rows.column("example_id").to_pylist()
    assert table.column("ordinal").to_pylist() == list(range(NUM_ROWS))
    plain = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = []
    for first, second in zip(rows["text_0"].to_pylist(), rows["text_1"].to_pylist(), strict=True):
        inputs = tokenizer(first, second, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            expected.append(plain(**inputs).logits[0].numpy())
    got = np.array(table.column("logits").to_pylist(), np.float32)
    assert np.ptp(got[:, 0]) > 0.1  # The rows do differ.
    np.testing.assert_allclose(got, np.array(expected), atol=1e-5)
    assert worker.num_rows_done == NUM_ROWS


def test_a_receipt_counts_rows_tokens_and_padding(model: Path, tmp_path: Path) -> None:
    _, jobs = make_jobs(tmp_path)
    worker = ShardWorker(make_spec(model))
    receipt = worker.process(jobs[2])
    again = worker.process(jobs[2])
    worker.close()
    rows = make_rows(NUM_ROWS).slice(40, 10)
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = tokenizer(
        rows["text_0"].to_pylist(), rows["text_1"].to_pylist(), truncation=True, max_length=24
    )
    assert receipt.num_tokens == sum(map(len, encoded["input_ids"]))
    assert receipt.num_tokens <= receipt.num_padded_tokens <= 24 * 10
    assert (receipt.shard, receipt.num_rows, receipt.num_excluded, receipt.committed) == (2, 10, 0, True)
    assert receipt.seconds >= receipt.forward_seconds > 0
    assert (again.committed, again.num_rows) == (False, 10)


def test_a_shard_has_the_same_bytes_whatever_the_worker_did_before(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (first, jobs), (second, other_jobs) = make_jobs(tmp_path / "a"), make_jobs(tmp_path / "b")
    run_all(ShardWorker(make_spec(model)), jobs)
    run_all(ShardWorker(make_spec(model)), other_jobs[::-1])
    hashes = [
        [commit.record.sha256 for commit in store.commit_records().values()] for store in (first, second)
    ]
    assert hashes[0] == hashes[1]


def test_only_one_job_is_prefetched(model: Path, tmp_path: Path) -> None:
    _, jobs = make_jobs(tmp_path)
    worker = ShardWorker(make_spec(model))
    assert worker.prefetch(jobs[0])
    assert worker.prefetch(jobs[0])
    assert not worker.prefetch(jobs[1])
    worker.close()


def test_a_job_ahead_waits_for_its_turn_and_is_prepared_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, jobs = make_jobs(tmp_path)
    threads: list[str] = []
    tokenise = LoadedTeacher.tokenise

    def watch(self: LoadedTeacher, texts: Sequence[Sequence[str]]) -> TokenisedRows:
        threads.append(threading.current_thread().name)
        return tokenise(self, texts)

    monkeypatch.setattr(LoadedTeacher, "tokenise", watch)
    worker = ShardWorker(make_spec(model))
    # The driver's request to prepare may overtake the job that comes first.
    assert worker.prefetch(jobs[1])
    assert worker.process(jobs[0]).committed
    assert worker.process(jobs[1]).committed
    assert worker.process(jobs[2]).committed
    worker.close()
    # A tokenizer in two threads at once may raise.
    assert threads == ["tokenise_0"] * 3


def test_a_shard_with_non_finite_logits_fails_and_names_the_rows(poisoned: Path, tmp_path: Path) -> None:
    store, jobs = make_jobs(tmp_path)
    worker = ShardWorker(make_spec(poisoned))
    with pytest.raises(TeacherError, match=r"logits are not finite for toy/train row train/") as caught:
        worker.process(jobs[0])
    worker.close()
    texts = make_rows(NUM_ROWS)
    bad = [
        example_id
        for example_id, first, second in zip(
            texts["example_id"].to_pylist(),
            texts["text_0"].to_pylist(),
            texts["text_1"].to_pylist(),
            strict=True,
        )
        if "red" in f"{first} {second}".split()
    ]
    assert caught.value.example_ids == tuple(bad[:5])
    assert caught.value.exit_code == 5
    assert store.committed_shards() == frozenset()
    assert list((Path(store.root) / "data").iterdir()) == []


def test_rows_with_non_finite_logits_are_left_out_and_listed(poisoned: Path, tmp_path: Path) -> None:
    store, jobs = make_jobs(tmp_path, on_bad_row="exclude")
    run_all(ShardWorker(make_spec(poisoned)), jobs)
    manifest = store.finish()
    table = read_store(store)
    assert manifest.num_rows == table.num_rows == NUM_ROWS - len(manifest.excluded)
    assert 0 < len(manifest.excluded) < NUM_ROWS
    texts = make_rows(NUM_ROWS)
    for row in manifest.excluded:
        words = f"{texts['text_0'][row.ordinal]} {texts['text_1'][row.ordinal]}".split()
        assert "red" in words
        assert row.example_id == f"train/{row.ordinal}"
        assert row.reason == "logits are not finite"
    listed = {row.ordinal for row in manifest.excluded}
    assert sorted(listed | set(table.column("ordinal").to_pylist())) == list(range(NUM_ROWS))


def test_texts_that_changed_since_the_plan_are_refused(model: Path, tmp_path: Path) -> None:
    store, jobs = make_jobs(tmp_path)
    rows = make_rows(NUM_ROWS)
    texts = rows.column("text_1").to_pylist()
    texts[23] = texts[23] + " cat"
    write_rows(
        rows.set_column(4, rows.schema.field("text_1"), pa.array(texts, pa.large_string())),
        tmp_path / "rows.arrow",
    )
    worker = ShardWorker(make_spec(model))
    assert worker.process(jobs[0]).committed
    with pytest.raises(CorpusError, match=r"corpus toy/train: the text of train/23 \(1 rows in shard 1\)"):
        worker.process(jobs[1])
    worker.close()
    assert store.committed_shards() == {0}


def test_rows_of_another_corpus_are_refused(model: Path, tmp_path: Path) -> None:
    _, jobs = make_jobs(tmp_path)
    write_rows(make_rows(NUM_ROWS, part="other"), tmp_path / "rows.arrow")
    worker = ShardWorker(make_spec(model))
    worker.prefetch(jobs[0])
    with pytest.raises(CorpusError, match="example ids are not those"):
        worker.process(jobs[0])
    worker.close()


def test_a_teacher_with_another_number_of_logits_than_labels_is_refused(model: Path, tmp_path: Path) -> None:
    rows = make_rows(4)
    plan = make_plan(rows, 8)
    store = StoreWriter.open(tmp_path / "s", make_identity(plan, native_labels=("a", "b", "c")), plan)
    path = write_rows(rows, tmp_path / "rows.arrow")
    worker = ShardWorker(make_spec(model))
    with pytest.raises(TeacherError, match="gives 2 logits, its configuration names 3 labels"):
        worker.process(ShardJob(store.root, str(path), "toy/train", plan.tasks()[0]))
    worker.close()


def test_a_store_opens_with_datasets(model: Path, tmp_path: Path) -> None:
    store, jobs = make_jobs(tmp_path)
    run_all(ShardWorker(make_spec(model)), jobs)
    loaded = datasets.load_dataset(
        "arrow",
        data_files=sorted(map(str, (Path(store.root) / "data").glob("*.arrow"))),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded.column_names == ["ordinal", "example_id", "text_hash", "logits"]
    assert sorted(loaded["ordinal"]) == list(range(NUM_ROWS))
    assert np.array(loaded["logits"]).shape == (NUM_ROWS, 2)
