"""Token-level stores are examined, described and read like the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.store_check import diagnose_store
from cluster.store_listing import inspect_store
from distill.token_store import TokenStore
from schemas.chunks import open_chunks, view_chunks
from tests.precompute.test_language_worker import make_target, run
from tests.precompute.tiny_language import make_corpus, make_documents, save_tiny_llama, write_corpus


@pytest.fixture
def root(tmp_path: Path) -> Path:
    model = save_tiny_llama(tmp_path / "llama")
    rows = [{"text": text} for text in make_documents(8)]
    corpus = make_corpus(write_corpus(tmp_path / "text.jsonl", rows))
    store, _ = run(make_target(model, corpus, tmp_path, temperatures=(2.0,)))
    store.finish()
    return Path(store.root)


def test_a_whole_store_has_no_problem_and_is_described(root: Path) -> None:
    assert diagnose_store(root, deep=True).problems == ()
    described = inspect_store(root)
    assert described["level"] == "token"
    assert described["columns"]["input_ids"].startswith("list<")


def test_what_precompute_writes_distill_reads(root: Path, tmp_path: Path) -> None:
    store = TokenStore.open(root)
    (path,) = tmp_path.glob("corpora/*/chunks-*/chunks.arrow")
    _, table = open_chunks(path)
    rows = store.gather(np.arange(table.num_rows, dtype=np.int64))
    np.testing.assert_array_equal(rows.chunks.input_ids, view_chunks(table).input_ids)
    assert int(rows.rows[-1]) == int(view_chunks(table).loss_mask.sum())


@pytest.mark.parametrize("deep", [True])
def test_a_flipped_byte_in_kept_entries_is_found(root: Path, deep: bool) -> None:
    (path, *_) = sorted((root / "data").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert [problem.fault for problem in diagnose_store(root, deep=deep).problems] != []
