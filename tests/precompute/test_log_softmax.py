from __future__ import annotations

import numpy as np
import pytest
import torch

from precompute.log_softmax import entropy, normalise, rank_ids, rest_log_mass, temper_lse, top_ids


def logits(num: int = 6, vocab: int = 500, seed: int = 0, scale: float = 4) -> torch.Tensor:
    return scale * torch.randn(num, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.1, 4.0, 60.0])
def test_every_number_is_the_float64_one(scale: float) -> None:
    logits_NV = logits(scale=scale)
    exact = logits_NV.double()
    log_probs_NV, lse_N, is_finite_N = normalise(logits_NV)
    assert is_finite_N.all()
    torch.testing.assert_close(lse_N.double(), exact.logsumexp(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(log_probs_NV.double(), exact.log_softmax(1), rtol=1e-6, atol=2e-5)
    scratch = torch.empty_like(log_probs_NV)
    probs = exact.softmax(1)
    expected = torch.special.entr(probs).sum(1)
    torch.testing.assert_close(entropy(log_probs_NV, scratch).double(), expected, rtol=1e-5, atol=1e-5)
    grid = (0.5, 2.0, 7.0)
    wanted = torch.stack([(exact / one).logsumexp(1) for one in grid], dim=1)
    found = temper_lse(log_probs_NV, lse_N, grid, scratch).double()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-5)
    assert temper_lse(log_probs_NV, lse_N, (), scratch).shape == (6, 0)


def test_impossible_tokens_count_for_nothing() -> None:
    logits_NV = torch.tensor([[0.0, -torch.inf, 0.0]])
    log_probs_NV, lse_N, is_finite_N = normalise(logits_NV)
    assert is_finite_N.item()
    scratch = torch.empty_like(log_probs_NV)
    expected = torch.tensor([0.6931472])
    torch.testing.assert_close(lse_N, expected)
    torch.testing.assert_close(entropy(log_probs_NV, scratch), expected)
    torch.testing.assert_close(temper_lse(log_probs_NV, lse_N, (2.0,), scratch)[:, 0], expected)


def test_rows_without_a_distribution_are_flagged_and_uniform() -> None:
    rows = torch.tensor([[0.0, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf], [1.0, 1.0]])
    log_probs_NV, lse_N, is_finite_N = normalise(rows)
    assert is_finite_N.tolist() == [False, False, False, True]
    torch.testing.assert_close(log_probs_NV.exp(), torch.full((4, 2), 0.5))
    assert lse_N.isfinite().all()


def test_the_rest_is_summed_and_not_subtracted() -> None:
    # 1 - p is 0 in float32 here, but the rest has a mass of e^-40 + e^-41.
    log_probs_NV, _, _ = normalise(torch.tensor([[0.0, -40.0, -41.0]]))
    rest = rest_log_mass(log_probs_NV, torch.tensor([0]), torch.tensor([0]), torch.empty(1, 3))
    torch.testing.assert_close(rest, torch.tensor([-40 + np.log1p(np.exp(-1))], dtype=torch.float32))
    everything = rest_log_mass(
        log_probs_NV, torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]), torch.empty(1, 3)
    )
    assert everything.tolist() == [-np.inf]


def test_ties_go_to_the_lower_id() -> None:
    rows = torch.tensor([[1.0, 2.0, 1.0, 1.0, 3.0, 1.0], [5.0] * 6, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert top_ids(rows, 3).tolist() == [[0, 1, 4], [0, 1, 2], [0, 1, 2]]
    assert rank_ids(rows, 4).tolist() == [[4, 1, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert top_ids(rows, 6).tolist() == [list(range(6))] * 3


@pytest.mark.parametrize("k", [1, 7, 63, 64])
def test_the_largest_ids_are_those_of_a_stable_sort(k: int) -> None:
    # Few distinct values, as bfloat16 logits have: most rows are tied.
    rows = logits(40, 64, seed=k).round()
    expected = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(rank_ids(rows, k), expected)
    assert torch.equal(top_ids(rows, k), expected.sort(dim=1).values)
