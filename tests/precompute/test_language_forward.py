"""What is kept of chunks, against float64 logits of the whole model, whatever the batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from precompute.kept_positions import concatenate_kept, slice_positions, take_positions
from precompute.language_forward import ChunkRows, LanguageResult, compute_kept, leave_out
from precompute.language_teacher import LoadedLanguageModel
from precompute.truncate import Truncation
from schemas.kept_entries import offsets_of
from schemas.policy import POLICY_ADAPTER
from schemas.token_rows import TokenChunks
from tests.precompute.test_language_teacher import spec_of
from tests.precompute.tiny_language import VOCAB, save_tiny_llama

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "top_k": {"kind": "top_k", "k": 6},
    "top_p": {"kind": "top_p", "p": 0.7, "k_max": 30},
    "sampled": {"kind": "sampled", "num_samples": 9, "seed": 3},
    "hybrid": {"kind": "hybrid", "k": 3, "m": 4, "seed": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def make_rows(num: int = 7, *, seed: int = 0) -> ChunkRows:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 20, num)
    offsets = offsets_of(lengths)
    ids = rng.integers(5, VOCAB, offsets[-1]).astype(np.int32)
    mask = (rng.random(offsets[-1]) < 0.7).astype(np.uint8)
    mask[offsets[:-1]] = 0
    mask[offsets[:-1] + 1] = 1
    return ChunkRows(TokenChunks(ids, mask, offsets), tuple(f"d/{i}#0" for i in range(num)), 1, None)


def truncation_of(name: str) -> Truncation:
    return Truncation(POLICY_ADAPTER.validate_python(POLICIES[name]), VOCAB, (0.5, 2.0))


def assert_same(left: LanguageResult, right: LanguageResult) -> None:
    np.testing.assert_array_equal(left.rows, right.rows)
    np.testing.assert_array_equal(left.kept.entries.offsets, right.kept.entries.offsets)
    np.testing.assert_array_equal(left.kept.entries.ids, right.kept.entries.ids)
    for a, b in (
        (left.kept.entries.log_probs, right.kept.entries.log_probs),
        (left.kept.stats.lse, right.kept.stats.lse),
        (left.kept.stats.log_tail, right.kept.stats.log_tail),
        (left.kept.stats.lse_grid, right.kept.stats.lse_grid),
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_kept_does_not_depend_on_batches_or_pieces(name: str, model: Path) -> None:
    rows = make_rows()
    together = LoadedLanguageModel.load(spec_of(model, tokens_per_batch=4096, chunk_positions=1000))
    apart = LoadedLanguageModel.load(spec_of(model, tokens_per_batch=8, chunk_positions=3))
    result = compute_kept(together, rows, truncation_of(name))
    assert_same(result, compute_kept(apart, rows, truncation_of(name)))
    # A chunk by itself gives what it gives among others.
    for row in range(len(rows.example_ids)):
        tokens = slice(rows.chunks.offsets[row], rows.chunks.offsets[row + 1])
        alone = ChunkRows(
            TokenChunks(
                rows.chunks.input_ids[tokens],
                rows.chunks.loss_mask[tokens],
                np.array([0, tokens.stop - tokens.start]),
            ),
            (rows.example_ids[row],),
            1,
            None,
        )
        kept = compute_kept(apart, alone, truncation_of(name)).kept
        expected = slice_positions(result.kept, result.rows[row], result.rows[row + 1])
        np.testing.assert_array_equal(kept.entries.ids, expected.entries.ids)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_kept_does_not_depend_on_the_number_of_threads(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.language_forward._CACHED_BYTES", 4 * VOCAB * 3)
    rows = make_rows()
    teacher = LoadedLanguageModel.load(spec_of(model, tokens_per_batch=4096, chunk_positions=20))
    alone = compute_kept(teacher, rows, truncation_of(name))
    several = LoadedLanguageModel(replace(teacher.spec, num_threads=3), teacher.model, teacher.num_logits)
    before = torch.get_num_threads()
    try:
        together = compute_kept(several, rows, truncation_of(name))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert_same(alone, together)


def test_what_is_kept_is_what_the_whole_model_says_in_float64(model: Path) -> None:
    rows = make_rows(seed=1)
    teacher = LoadedLanguageModel.load(spec_of(model, tokens_per_batch=32, chunk_positions=5))
    result = compute_kept(teacher, rows, truncation_of("dense"))
    exact = LoadedLanguageModel.load(spec_of(model)).model.double()
    place = 0
    for row, (start, stop) in enumerate(zip(rows.chunks.offsets[:-1], rows.chunks.offsets[1:], strict=True)):
        ids_T = rows.chunks.input_ids[start:stop].astype(np.int64)
        with torch.no_grad():
            logits_TV = exact(torch.from_numpy(ids_T)[None]).logits[0, :, :VOCAB]
        targets = np.flatnonzero(rows.chunks.loss_mask[start:stop])
        assert result.rows[row + 1] - result.rows[row] == len(targets)
        for target in targets:
            log_p_V = logits_TV[target - 1].log_softmax(-1).numpy()
            kept = slice(result.kept.entries.offsets[place], result.kept.entries.offsets[place + 1])
            np.testing.assert_allclose(result.kept.entries.log_probs[kept], log_p_V, atol=3e-5)
            stats = result.kept.stats
            np.testing.assert_allclose(stats.target_logprob[place], log_p_V[ids_T[target]], atol=3e-5)
            entropy = -(np.exp(log_p_V) * log_p_V).sum()
            np.testing.assert_allclose(stats.entropy[place], entropy, atol=3e-5)
            for column, temperature in enumerate((0.5, 2.0)):
                lse = (logits_TV[target - 1] / temperature).logsumexp(-1)
                np.testing.assert_allclose(stats.lse_grid[place, column], lse, rtol=1e-5)
            place += 1
    assert place == result.rows[-1]


def test_no_piece_of_logits_is_larger_than_the_recipe_says(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    original = LoadedLanguageModel.predict

    def predict(self: LoadedLanguageModel, output: Any, hidden_ND: torch.Tensor) -> torch.Tensor:
        shapes.append(len(hidden_ND))
        return original(self, output, hidden_ND)

    monkeypatch.setattr(LoadedLanguageModel, "predict", predict)
    teacher = LoadedLanguageModel.load(spec_of(model, tokens_per_batch=4096, chunk_positions=4))
    rows = make_rows()
    result = compute_kept(teacher, rows, truncation_of("top_k"))
    assert max(shapes) == 4
    # Only positions with a token to predict go through the head.
    assert sum(shapes) == int(rows.chunks.loss_mask.sum()) == result.rows[-1]


def test_a_chunk_whose_logits_are_no_numbers_is_flagged_and_changes_no_other(model: Path) -> None:
    rows = make_rows()
    teacher = LoadedLanguageModel.load(spec_of(model, tokens_per_batch=4096))
    expected = compute_kept(teacher, rows, truncation_of("top_k"))
    # Token 3 occurs in chunk 2 alone.
    rows.chunks.input_ids[rows.chunks.offsets[2]] = 3
    with torch.no_grad():
        teacher.model.get_input_embeddings().weight[3] = float("nan")
    result = compute_kept(teacher, rows, truncation_of("top_k"))
    assert result.finite_R.tolist() == [row != 2 for row in range(7)]
    left, kept = leave_out(result, rows)
    assert left.example_ids == tuple(f"d/{i}#0" for i in range(7) if i != 2)
    assert np.diff(left.chunks.offsets).tolist() == np.delete(np.diff(rows.chunks.offsets), 2).tolist()
    keep = np.delete(np.arange(expected.rows[-1]), np.arange(expected.rows[2], expected.rows[3]))
    others = take_positions(expected.kept, keep)
    np.testing.assert_array_equal(kept.kept.entries.ids, others.entries.ids)
    np.testing.assert_allclose(kept.kept.stats.lse, others.stats.lse, rtol=1e-5)


def test_padding_is_within_the_budget(model: Path) -> None:
    rows = make_rows()
    teacher = LoadedLanguageModel.load(spec_of(model, tokens_per_batch=24))
    seen: list[int] = []
    result = compute_kept(teacher, rows, truncation_of("top_k"), seen.append)
    assert sum(seen) == len(rows.example_ids)
    assert int(rows.chunks.offsets[-1]) <= result.num_padded_tokens <= 24 * len(seen)


@pytest.mark.parametrize("name", POLICIES)
def test_positions_keep_their_entries_when_they_are_joined_and_reordered(name: str, model: Path) -> None:
    teacher = LoadedLanguageModel.load(spec_of(model))
    kept = compute_kept(teacher, make_rows(), truncation_of(name)).kept
    num = kept.entries.num_positions
    joined = concatenate_kept([slice_positions(kept, 5, num), slice_positions(kept, 0, 5)])
    back = take_positions(joined, np.roll(np.arange(num), 5))
    np.testing.assert_array_equal(back.entries.offsets, kept.entries.offsets)
    np.testing.assert_array_equal(back.entries.ids, kept.entries.ids)
    np.testing.assert_array_equal(back.entries.log_probs, kept.entries.log_probs)
    if kept.entries.draws is not None and back.entries.draws is not None:
        np.testing.assert_array_equal(back.entries.draws.counts, kept.entries.draws.counts)
        np.testing.assert_array_equal(back.entries.draws.log_norm, kept.entries.draws.log_norm)
    if kept.entries.num_head is not None:
        np.testing.assert_array_equal(back.entries.num_head, kept.entries.num_head)
        np.testing.assert_array_equal(back.entries.tau, kept.entries.tau)
    np.testing.assert_array_equal(back.stats.lse_grid, kept.stats.lse_grid)
