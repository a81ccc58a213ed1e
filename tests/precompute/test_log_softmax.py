from __future__ import annotations

import numpy as np
import pytest
import torch

from precompute.log_softmax import Buffers, Intervals, Softmax, rank_ids, top_ids


def logits(num: int = 6, vocab: int = 500, seed: int = 0, scale: float = 4) -> torch.Tensor:
    return scale * torch.randn(num, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.1, 4.0, 60.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_every_number_is_the_float64_one(scale: float, offset: float) -> None:
    logits_NV = logits(scale=scale) + offset
    exact = logits_NV.double()
    grid = (0.5, 2.0, 7.0)
    softmax = Softmax.of(logits_NV, grid, Buffers())
    assert softmax.is_finite_N.all()
    torch.testing.assert_close(softmax.lse_N.double(), exact.logsumexp(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(softmax.log_probs().double(), exact.log_softmax(1), rtol=1e-6, atol=2e-5)
    ids = torch.tensor([[3, 499]] * 6)
    assert torch.equal(softmax.log_probs_of(ids), softmax.log_probs().gather(1, ids))
    probs = softmax.powers_NV.double() / softmax.log_sum_N.double().exp()[:, None]
    torch.testing.assert_close(probs, exact.softmax(1), rtol=2e-5, atol=1e-30)
    expected = torch.special.entr(exact.softmax(1)).sum(1)
    torch.testing.assert_close(softmax.entropy_N.double(), expected, rtol=1e-5, atol=1e-6)
    wanted = torch.stack([(exact / one).logsumexp(1) for one in grid], dim=1)
    torch.testing.assert_close(softmax.lse_grid_NG.double(), wanted, rtol=1e-6, atol=2e-5)
    assert Softmax.of(logits_NV, (), Buffers()).lse_grid_NG.shape == (6, 0)


def test_impossible_tokens_count_for_nothing() -> None:
    softmax = Softmax.of(torch.tensor([[0.0, -torch.inf, 0.0]]), (2.0,), Buffers())
    assert softmax.is_finite_N.item()
    expected = torch.tensor([0.6931472])
    torch.testing.assert_close(softmax.lse_N, expected)
    torch.testing.assert_close(softmax.entropy_N, expected)
    torch.testing.assert_close(softmax.lse_grid_NG[:, 0], expected)


def test_rows_without_a_distribution_are_flagged_and_uniform() -> None:
    rows = torch.tensor([[0.0, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf], [1.0, 1.0]])
    softmax = Softmax.of(rows, (), Buffers())
    assert softmax.is_finite_N.tolist() == [False, False, False, True]
    torch.testing.assert_close(softmax.log_probs().exp(), torch.full((4, 2), 0.5))
    assert softmax.powers_NV.tolist() == [[1.0, 1.0]] * 4
    assert softmax.lse_N.isfinite().all()


@pytest.mark.parametrize("far", [40.0, 95.0, 300.0])
def test_the_rest_is_summed_and_not_subtracted(far: float) -> None:
    # 1 - p is 0 in float32 here, but the rest has a mass of e^-far + e^-(far + 1), however small that is.
    rows = torch.tensor([[0.0, -far, -far - 1], [-1.0, -1.0, -1.0]])
    rest = Softmax.of(rows, (), Buffers()).take_out(torch.tensor([0, 1]), torch.tensor([0, 1]))
    expected = [-far + np.log1p(np.exp(-1)), np.log(2 / 3)]
    torch.testing.assert_close(rest, torch.tensor(expected, dtype=torch.float32))
    everything = Softmax.of(rows, (), Buffers()).take_out(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    assert everything.tolist() == [-np.inf, 0.0]


@pytest.mark.parametrize("vocab", [40, 1000, 1024, 5000])
@pytest.mark.parametrize("num", [3, 200])
def test_points_lie_in_the_intervals_of_a_float64_sum(vocab: int, num: int) -> None:
    mass = logits(5, vocab).softmax(1)
    mass[:, ::3] = 0
    mass[2, : vocab // 2] = 0
    mass[3, vocab // 2 :] = 0
    line = Intervals(mass)
    ends = mass.double().cumsum(1)
    torch.testing.assert_close(line.total_N1, ends[:, -1:])
    uniforms = torch.rand(5, num, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = line.locate(uniforms * line.total_N1)
    assert torch.equal(found, torch.searchsorted(ends, uniforms * ends[:, -1:], right=True))
    assert (mass.gather(1, found) > 0).all()
    last = torch.tensor([int(row.nonzero().max()) for row in mass])
    assert torch.equal(line.locate(line.total_N1 * 1.5)[:, 0], last)


def test_ties_go_to_the_lower_id() -> None:
    rows = torch.tensor([[1.0, 2.0, 1.0, 1.0, 3.0, 1.0], [5.0] * 6, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert top_ids(rows, 3).tolist() == [[0, 1, 4], [0, 1, 2], [0, 1, 2]]
    assert rank_ids(rows, 4).tolist() == [[4, 1, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert top_ids(rows, 6).tolist() == [list(range(6))] * 3


@pytest.mark.parametrize(
    ("k", "vocab"), [(1, 64), (7, 64), (63, 64), (64, 64), (2, 1000), (7, 1100), (7, 1088)]
)
@pytest.mark.parametrize("step", [1.0, 1e-3])
def test_the_largest_ids_are_those_of_a_stable_sort(k: int, vocab: int, step: float) -> None:
    # Few distinct values, as bfloat16 logits have: most rows are tied; then many.
    rows = (logits(40, vocab, seed=k) / step).round()
    rows[0, -1] = rows[1, -vocab // 20 :] = 1e6
    expected = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(rank_ids(rows, k), expected)
    assert torch.equal(top_ids(rows, k), expected.sort(dim=1).values)
