"""Token-level stores are examined, described and read like the others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import run_command
from cluster.store_check import diagnose_store
from cluster.store_listing import inspect_store, list_stores
from distill.token_store import TokenStore
from schemas.chunks import open_chunks, view_chunks
from tests.precompute.test_language_worker import make_target, run
from tests.precompute.tiny_language import VOCAB, make_corpus, make_documents, save_tiny_llama, write_corpus


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


def test_a_store_is_described_with_policy_codec_and_what_a_position_takes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["store", "inspect", str(root), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    expected = {
        "objective": "causal",
        "max_length": 16,
        "policy": "top_k k=5",
        "codec": "packed",
        "grid": [2.0],
        "vocab": VOCAB,
    }
    assert {name: described[name] for name in expected} == expected
    store = TokenStore.open(root)
    rows = store.gather(store.stored_rows())
    assert described["num_positions"] == int(rows.rows[-1])
    sizes = sum(path.stat().st_size for path in (root / "data").iterdir())
    assert described["bytes_per_position"] == pytest.approx(sizes / int(rows.rows[-1]), abs=0.05)
    # 5 float16 and 5 ids of 7 bits in planes padded to a byte, a uint16 count, and offsets of rows.
    assert 10 + 35 / 8 + 2 < described["entry_bytes_per_position"] < 22


def test_what_cannot_be_counted_is_left_open(root: Path) -> None:
    (path, *_) = (root / "data").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    described = inspect_store(root)
    assert described["policy"] == "top_k k=5"
    assert described["num_positions"] is None
    (root / "manifest.json").unlink()
    assert inspect_store(root)["bytes_per_position"] is None


def test_a_listing_shows_policy_and_codec(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (listed,) = list_stores(root)
    assert (listed.policy, listed.codec, listed.problem) == ("top_k k=5", "packed", None)
    assert run_command(["store", "ls", str(root.parent)]) == 0
    assert "top_k k=5" in capsys.readouterr().out


def test_a_deep_verification_says_that_tokens_were_hashed_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["store", "verify", str(root), "--deep", "--json"]) == 0
    assert "tokens lie in the store" in json.loads(capsys.readouterr().out)["corpus"]
