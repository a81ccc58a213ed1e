"""The scripts in ``docs/`` read token-level shards of all codecs with pyarrow and numpy alone."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.codec import CODECS
from schemas.kept_entries import offsets_of
from schemas.policy import AnyPolicy, DensePolicy, SampledPolicy, TopKPolicy
from schemas.rows import hash_texts
from schemas.token_rows import (
    TokenChunks,
    TokenRows,
    decode_token_rows,
    encode_token_rows,
    read_layout,
    token_schema,
)
from tests.precompute.test_language_worker import make_target, read, run
from tests.precompute.tiny_language import make_corpus, make_documents, save_tiny_llama, write_corpus
from tests.schemas.kept_examples import POLICIES, make_entries, make_stats

DOCS = Path(__file__).parents[2] / "docs"
READERS = {
    "fixed": DOCS / "read_kept_entries.py",
    "packed": DOCS / "read_kept_entries.py",
    "compact": DOCS / "read_compact_entries.py",
}
# Without docstrings and empty lines. The third codec has frames to expand and another coding of ids.
MOST_LINES = {"read_kept_entries.py": 30, "read_compact_entries.py": 37}
codecs = pytest.mark.parametrize("codec", CODECS)


def read_with_script(codec: str, path: Path) -> list[tuple[dict[str, Any], Any, Any, Any]]:
    return list(runpy.run_path(str(READERS[codec]))["read_shard"](str(path)))


def write_shard(
    path: Path, codec: str, policy: AnyPolicy, vocab: int, rows: Sequence[int], grid: Sequence[float] = ()
) -> pa.RecordBatch:
    """Writes a shard of random entries; row r has ``rows[r]`` positions, each of a token."""
    bounds = offsets_of(np.array(rows))
    entries, log_tail = make_entries(policy, vocab, int(bounds[-1]), seed=2, empty=0.2)
    tokens = np.random.default_rng(3).integers(0, vocab, bounds[-1]).astype(np.int32)
    chunks = TokenChunks(tokens, np.ones(len(tokens), np.uint8), bounds)
    made = TokenRows(chunks, entries, make_stats(log_tail, len(grid), seed=1), bounds)
    keys = pa.record_batch(
        {
            "ordinal": pa.array(range(len(rows)), pa.int64()),
            "example_id": pa.array([f"train/0#{row}" for row in range(len(rows))], pa.string()),
            "text_hash": pa.array([hash_texts([str(row)]) for row in range(len(rows))], pa.binary(16)),
        }
    )
    batch = encode_token_rows(keys, made, token_schema(codec, policy, vocab, grid))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return batch


def compare(codec: str, path: Path, batches: Sequence[pa.RecordBatch]) -> None:
    """Compares what the script reads of a shard with what the library reads of its batches."""
    layout = read_layout(batches[0].schema.metadata)
    found = iter(read_with_script(codec, path))
    for batch in batches:
        decoded = decode_token_rows(batch, layout)
        for row in range(batch.num_rows):
            part = decode_token_rows(batch.slice(row, 1), layout)
            compare_row(next(found), part, layout.entries.policy)
        assert batch.num_rows == len(decoded.rows) - 1
    assert next(found, None) is None


def compare_row(found: tuple[dict[str, Any], Any, Any, Any], expected: TokenRows, policy: AnyPolicy) -> None:
    row, kept, ids, probs = found
    entries, stats = expected.entries, expected.stats
    np.testing.assert_array_equal(row["input_ids"], expected.chunks.input_ids)
    np.testing.assert_array_equal(row["loss_mask"], expected.chunks.loss_mask)
    for name in ("log_tail", "lse", "entropy", "target_logprob"):
        np.testing.assert_array_equal(row[name], getattr(stats, name))
    np.testing.assert_array_equal(np.asarray(row["lse_grid"]).reshape(stats.lse_grid.shape), stats.lse_grid)
    if isinstance(policy, DensePolicy):
        ids = np.tile(ids, len(row["lse"]))
    if "tail" in row:
        kept, ids = join_tail(kept, ids, *row["tail"])
    np.testing.assert_array_equal(kept, entries.counts)
    np.testing.assert_array_equal(ids, entries.ids)
    exact = entries.head_mask()
    np.testing.assert_allclose(probs, np.exp(entries.log_probs[exact].astype(np.float64)), rtol=1e-4)
    # What docs/store-format.md says of masses.
    if entries.num_head is not None:
        tau = np.exp(row["log_tail"]) / np.maximum(entries.counts - entries.num_head, 1)
        assert entries.weights is not None
        np.testing.assert_allclose(np.repeat(tau, entries.counts)[~exact], entries.weights[~exact], rtol=1e-5)
    if isinstance(policy, SampledPolicy):
        scale = row["draw_counts"] / policy.num_samples * np.exp(np.repeat(row["log_norm"], kept))
        np.testing.assert_allclose(scale * probs ** (1 - policy.tau), entries.weights, rtol=1e-4)


def join_tail(head: Any, head_ids: Any, tail: Any, tail_ids: Any) -> tuple[Any, Any]:
    pieces = [
        np.split(values, np.cumsum(counts)[:-1]) for values, counts in ((head_ids, head), (tail_ids, tail))
    ]
    return head + tail, np.concatenate([piece for pair in zip(*pieces, strict=True) for piece in pair])


@codecs
@pytest.mark.parametrize("kind", POLICIES)
def test_a_script_reads_what_the_library_reads_in_a_store_of_a_model(
    codec: str, kind: str, llama: Path, tmp_path: Path
) -> None:
    texts = write_corpus(tmp_path / "text.jsonl", [{"text": text} for text in make_documents(8)])
    keep = POLICIES[kind].model_dump()
    target = make_target(llama, make_corpus(texts), tmp_path, keep=keep, codec=codec, temperatures=(2.0, 4.0))
    store, _ = run(target)
    batches = iter(read(store))
    for commit in store.commit_records().values():
        path = Path(store.root) / "data" / commit.record.file
        compare(codec, path, [next(batches) for _ in commit.record.batches])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@codecs
@pytest.mark.parametrize("kind", POLICIES)
def test_rows_and_positions_without_entries_are_read(codec: str, kind: str, tmp_path: Path) -> None:
    batch = write_shard(tmp_path / "s.arrow", codec, POLICIES[kind], 500, (4, 0, 7), (2.0, 4.0))
    compare(codec, tmp_path / "s.arrow", [batch])


@codecs
@pytest.mark.parametrize("vocab", [2, 255, 256, 257, 65536, 65537, 152064])
def test_ids_of_any_width_and_many_draws_are_read(codec: str, vocab: int, tmp_path: Path) -> None:
    for number, policy in enumerate(
        (TopKPolicy(kind="top_k", k=2), SampledPolicy(kind="sampled", num_samples=256, tau=0.9))
    ):
        path = tmp_path / f"{number}.arrow"
        compare(codec, path, [write_shard(path, codec, policy, vocab, (3, 30))])


@codecs
def test_a_script_needs_no_python_object_for_each_token(codec: str, tmp_path: Path) -> None:
    policy = TopKPolicy(kind="top_k", k=64)
    write_shard(tmp_path / "s.arrow", codec, policy, 49152, [511] * 16)
    began = time.perf_counter()
    read_with_script(codec, tmp_path / "s.arrow")
    # 0.5 million entries: a loop over them takes longer than this, the script a hundredth of it.
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_script_is_short_and_imports_pyarrow_and_numpy_alone(name: str) -> None:
    tree = ast.parse((DOCS / name).read_text())
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert imported == ["json", "sys", "numpy", "pyarrow"]
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    assert num_code_lines((DOCS / name).read_text(), tree) <= MOST_LINES[name]


def num_code_lines(source: str, tree: ast.Module) -> int:
    described = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.FunctionDef)]
    docstrings = [node.body[0] for node in described if ast.get_docstring(node) is not None]
    left_out = {line for node in docstrings for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    return sum(
        1 for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in left_out
    )


@codecs
def test_a_script_runs_alone(codec: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "s.arrow", codec, POLICIES["hybrid"], 500, (4, 0, 7))
    command = [sys.executable, "-I", str(READERS[codec]), str(tmp_path / "s.arrow")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("positions") == 3
