from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from precompute.draws import position_keys
from precompute.truncate import POLICIES, KeptPositions, Truncation, keep_entries
from schemas.errors import DataError, RecipeError
from schemas.policy import (
    POLICY_ADAPTER,
    AnyPolicy,
    DensePolicy,
    HybridPolicy,
    SampledPolicy,
    TopKPolicy,
    TopPPolicy,
)

VOCAB = 300
CASES: dict[str, AnyPolicy] = {
    "dense": DensePolicy(),
    "top_k": TopKPolicy(kind="top_k", k=7),
    "top_p": TopPPolicy(kind="top_p", p=0.8, k_min=2, k_max=40),
    "sampled": SampledPolicy(kind="sampled", num_samples=20, tau=0.8, seed=5),
    "hybrid": HybridPolicy(kind="hybrid", k=4, m=9, seed=5),
}
cases = pytest.mark.parametrize("kind", CASES)


def logits(num: int, width: int = VOCAB, seed: int = 0, scale: float = 3) -> torch.Tensor:
    return scale * torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def keep(
    logits_NW: torch.Tensor,
    policy: AnyPolicy,
    *,
    vocab: int = VOCAB,
    positions: np.ndarray | None = None,
    example: str = "doc#0",
    grid: tuple[float, ...] = (),
) -> KeptPositions:
    places = np.arange(len(logits_NW)) if positions is None else positions
    targets = torch.from_numpy(places % vocab)
    keys = position_keys(getattr(policy, "seed", 0), example, places)
    return keep_entries(logits_NW, targets, keys, Truncation(policy, vocab, grid))


def ids_of(kept: KeptPositions, position: int) -> list[int]:
    start, stop = kept.entries.offsets[position : position + 2]
    return kept.entries.ids[start:stop].tolist()


def equal(left: Any, right: Any) -> bool:
    """Compares numpy values or dataclasses of them bit by bit."""
    if left is None or right is None or isinstance(left, int | float):
        return left == right
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    return all(equal(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__)


def estimate(kept: KeptPositions, values: np.ndarray) -> np.ndarray:
    """Returns for each position the sum of its entries' masses times values of their ids."""
    weights = kept.entries.weights
    assert weights is not None
    terms = weights.astype(np.float64) * values[kept.entries.ids]
    return np.add.reduceat(terms, kept.entries.offsets[:-1])


def test_every_policy_of_a_recipe_has_its_function() -> None:
    schema = POLICY_ADAPTER.json_schema()
    assert set(POLICIES) == set(schema["discriminator"]["mapping"]) == set(CASES)


@cases
def test_statistics_are_the_float64_ones(kind: str) -> None:
    logits_NV = logits(5)
    kept = keep(logits_NV, CASES[kind], grid=(2.0, 0.5))
    exact = logits_NV.double()
    log_probs = exact.log_softmax(1).numpy()
    np.testing.assert_allclose(kept.stats.lse, exact.logsumexp(1), rtol=1e-6)
    np.testing.assert_allclose(kept.stats.lse_grid[:, 0], (exact / 2).logsumexp(1), rtol=1e-6)
    np.testing.assert_allclose(kept.stats.lse_grid[:, 1], (exact / 0.5).logsumexp(1), rtol=1e-6)
    np.testing.assert_allclose(kept.stats.entropy, torch.special.entr(exact.softmax(1)).sum(1), rtol=1e-5)
    np.testing.assert_allclose(kept.stats.target_logprob, log_probs[np.arange(5), np.arange(5)], atol=1e-5)
    mask = kept.entries.head_mask()
    rows = np.repeat(np.arange(5), kept.entries.counts)
    own = log_probs[rows, kept.entries.ids]
    np.testing.assert_allclose(kept.entries.log_probs[mask], own[mask], atol=1e-5)
    for row in range(5):
        outside = np.ones(VOCAB, bool)
        outside[kept.entries.ids[(rows == row) & mask]] = False
        expected = np.log(np.exp(log_probs[row][outside]).sum()) if outside.any() else -np.inf
        np.testing.assert_allclose(kept.stats.log_tail[row], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "top_k", "top_p"])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 5.0])
def test_another_temperature_is_exact_up_to_rounding(kind: str, temperature: float) -> None:
    logits_NV = logits(5)
    kept = keep(logits_NV, CASES[kind], grid=(temperature,))
    rows = np.repeat(np.arange(5), kept.entries.counts)
    logit = kept.entries.log_probs + kept.stats.lse[rows]
    found = logit / temperature - kept.stats.lse_grid[rows, 0]
    expected = (logits_NV.double() / temperature).log_softmax(1).numpy()[rows, kept.entries.ids]
    np.testing.assert_allclose(logit, logits_NV.numpy()[rows, kept.entries.ids], atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@cases
def test_a_padded_vocabulary_is_neither_kept_nor_counted(kind: str) -> None:
    padded = torch.cat([logits(4), torch.full((4, 20), 50.0)], dim=1)
    found = keep(padded, CASES[kind], grid=(2.0,))
    assert equal(found, keep(padded[:, :VOCAB].clone(), CASES[kind], grid=(2.0,)))
    assert found.entries.ids.max() < VOCAB


@cases
@pytest.mark.parametrize("threads", [1, 2])
# Wide enough that torch would split the sums of one row between threads; rows that fill no vector.
@pytest.mark.parametrize(("num", "vocab"), [(9, 40_000), (60, 61)])
def test_what_is_kept_does_not_depend_on_the_chunk(kind: str, threads: int, num: int, vocab: int) -> None:
    logits_NV = logits(num, vocab)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = keep(logits_NV, CASES[kind], vocab=vocab, grid=(2.0,))
        for size in (1, 2, 4):
            for start in range(0, num, size):
                rows = np.arange(start, min(start + size, num))
                part = keep(logits_NV[rows], CASES[kind], vocab=vocab, positions=rows, grid=(2.0,))
                alone = [ids_of(part, row) for row in range(len(rows))]
                assert alone == [ids_of(whole, row) for row in rows]
                first, last = whole.entries.offsets[[rows[0], rows[-1] + 1]]
                assert equal(part.entries.log_probs, whole.entries.log_probs[first:last])
                assert equal(part.stats.lse, whole.stats.lse[rows])
                assert equal(part.stats.lse_grid, whole.stats.lse_grid[rows])
                assert equal(part.stats.log_tail, whole.stats.log_tail[rows])
                assert equal(part.stats.entropy, whole.stats.entropy[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["sampled", "hybrid"])
def test_draws_depend_on_seed_example_and_position(kind: str) -> None:
    same = logits(1).expand(6, -1)
    kept = keep(same, CASES[kind])
    assert len({tuple(ids_of(kept, row)) for row in range(6)}) == 6
    assert equal(kept, keep(same, CASES[kind]))
    assert not equal(kept, keep(same, CASES[kind], example="doc#1"))
    reseeded = CASES[kind].model_copy(update={"seed": 6})
    assert not equal(kept, keep(same, reseeded))


@cases
def test_positions_without_a_distribution_are_flagged_and_disturb_no_other(kind: str) -> None:
    logits_NV = logits(5)
    bad = logits_NV.clone()
    bad[1, 17] = torch.nan
    bad[3, 2] = torch.inf
    kept = keep(bad, CASES[kind], grid=(2.0,))
    assert kept.is_finite_N.tolist() == [True, False, True, False, True]
    whole = keep(logits_NV, CASES[kind], grid=(2.0,))
    assert whole.is_finite_N.all()
    for row in (0, 2, 4):
        assert ids_of(kept, row) == ids_of(whole, row)
        assert kept.stats.lse[row] == whole.stats.lse[row]
    assert np.isfinite(kept.stats.lse).all()


@cases
@pytest.mark.parametrize("num_possible", [1, 3, 6])
def test_tokens_that_are_impossible_have_no_mass(kind: str, num_possible: int) -> None:
    logits_NV = logits(3)
    logits_NV[:, num_possible:] = -torch.inf
    kept = keep(logits_NV, CASES[kind], grid=(2.0,))
    assert kept.is_finite_N.all()
    for name in ("lse", "entropy", "lse_grid"):
        assert np.isfinite(getattr(kept.stats, name)).all()
    assert not np.isnan(kept.entries.log_probs).any()
    assert not np.isnan(kept.stats.log_tail).any()
    for row in range(3):
        assert len(set(ids_of(kept, row))) == len(ids_of(kept, row))
    if kept.entries.weights is not None:
        assert (kept.entries.weights[kept.entries.ids >= num_possible] == 0).all()


def test_top_k_takes_equal_logits_with_the_lower_id_first() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 100] = 1
    assert ids_of(keep(row, CASES["top_k"]), 0) == [0, 1, 2, 3, 4, 5, 100]


@pytest.mark.parametrize(
    ("p", "k_min", "k_max", "expected"),
    [
        (0.5, 1, 6, [3]),
        (0.51, 1, 6, [1, 3]),
        (0.75, 1, 6, [1, 3]),
        (0.8, 1, 6, [0, 1, 3]),
        (0.5, 3, 6, [0, 1, 3]),
        (0.99, 1, 2, [1, 3]),
        (1.0, 1, 6, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_the_mass(
    p: float, k_min: int, k_max: int, expected: list[int]
) -> None:
    # Masses 1/8, 1/4, 1/8, 1/2 and nothing for the other two ids; of the equal ones the lower goes first.
    row = torch.tensor([[0.125, 0.25, 0.125, 0.5, 0.0, 0.0]]).log()
    policy = TopPPolicy(kind="top_p", p=p, k_min=k_min, k_max=k_max)
    assert ids_of(keep(row, policy, vocab=6), 0) == expected


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.7])
def test_sampled_masses_are_unbiased(tau: float) -> None:
    num = 4000
    logits_NV = logits(1, 60).expand(num, -1)
    policy = SampledPolicy(kind="sampled", num_samples=8, tau=tau)
    kept = keep(logits_NV, policy, vocab=60)
    assert kept.entries.draws is not None
    totals = np.add.reduceat(kept.entries.draws.counts, kept.entries.offsets[:-1])
    assert (totals == 8).all()
    check_unbiased(kept, logits_NV[0])


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 6), (5, 20), (20, 40)])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_hybrid_masses_are_unbiased_and_their_number_is_exact(k: int, m: int, scale: float) -> None:
    num = 4000
    logits_NV = logits(1, 60, scale=scale).expand(num, -1)
    policy = HybridPolicy(kind="hybrid", k=k, m=m)
    kept = keep(logits_NV, policy, vocab=60)
    assert (kept.entries.counts == k + m).all()
    assert kept.entries.num_head is not None
    assert (kept.entries.num_head >= k).all()
    assert (kept.entries.num_head < k + m).all()
    for row in range(20):
        assert len(set(ids_of(kept, row))) == k + m
    check_unbiased(kept, logits_NV[0])


def check_unbiased(kept: KeptPositions, logits_V: torch.Tensor) -> None:
    """Checks the mean of several sums, and of each id's mass, against the exact ones."""
    probs = logits_V.double().softmax(0).numpy()
    vocab, num = len(probs), kept.entries.num_positions
    generator = np.random.default_rng(1)
    for values in (np.ones(vocab), -np.log(probs), generator.normal(size=vocab)):
        sums = estimate(kept, values)
        error = sums.std(ddof=1) / np.sqrt(num)
        assert abs(sums.mean() - probs @ values) <= 5 * error + 1e-5
    weights = kept.entries.weights
    assert weights is not None
    means = np.bincount(kept.entries.ids, weights, vocab) / num
    squares = np.bincount(kept.entries.ids, weights.astype(np.float64) ** 2, vocab) / num
    errors = np.sqrt(np.maximum(squares - means**2, 0) / num)
    # An id that was never seen has an expected count that allows for that.
    seen = means > 0
    assert (np.abs(means - probs)[seen] <= 6 * errors[seen] + 1e-5).all()
    assert (probs[~seen] < 0.01).all()


def test_sampling_a_tail_costs_no_more_variance_than_its_threshold_allows() -> None:
    # Horvitz-Thompson with a fixed number: the masses of a position always add up to 1.
    kept = keep(logits(50), CASES["hybrid"])
    np.testing.assert_allclose(estimate(kept, np.ones(VOCAB)), 1, rtol=1e-5)


def test_a_hybrid_by_hand() -> None:
    # p = .4, .3, .1, .1, .05, .05 with k = 1, m = 2: of the rest .6 a threshold of .3 gives
    # .3 / .3 + .3 / .3 = 2, so id 1 is certain and one id of the others carries .3.
    row = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]]).log()
    kept = keep(row, HybridPolicy(kind="hybrid", k=1, m=2), vocab=6)
    assert kept.entries.num_head is not None
    assert kept.entries.tau is not None
    assert ids_of(kept, 0)[:2] == [0, 1]
    assert ids_of(kept, 0)[2] >= 2
    assert kept.entries.num_head.tolist() == [2]
    np.testing.assert_allclose(kept.entries.tau, [0.3], rtol=1e-5)
    np.testing.assert_allclose(np.exp(kept.entries.log_probs), [0.4, 0.3, 0.3], rtol=1e-5)
    np.testing.assert_allclose(kept.stats.log_tail, np.log([0.3]), rtol=1e-5)


def test_a_hybrid_of_the_whole_vocabulary_is_exact() -> None:
    logits_NV = logits(3, 13)
    kept = keep(logits_NV, CASES["hybrid"], vocab=13)
    np.testing.assert_allclose(
        estimate(kept, np.arange(13.0)), logits_NV.double().softmax(1).numpy() @ np.arange(13.0), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_first(dtype: torch.dtype) -> None:
    narrow = logits(4).to(dtype)
    assert equal(keep(narrow, CASES["top_k"]), keep(narrow.float(), CASES["top_k"]))


def test_logits_are_not_written_to() -> None:
    for policy in CASES.values():
        logits_NV = logits(3)
        before = logits_NV.clone()
        keep(logits_NV, policy, grid=(2.0,))
        assert torch.equal(logits_NV, before)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(RecipeError, match="k is 7, above the vocabulary of 6 tokens"):
        keep(logits(2, 6), CASES["top_k"], vocab=6)
    with pytest.raises(DataError, match="6 columns for a vocabulary of 300"):
        keep(logits(2, 6), CASES["top_k"])
    truncation = Truncation(CASES["top_k"], VOCAB)
    for wrong in (-1, VOCAB):
        with pytest.raises(DataError, match=f"target id {wrong} is out of range"):
            keep_entries(logits(2), torch.tensor([0, wrong]), None, truncation)
    with pytest.raises(ValueError, match="2 positions"):
        keep_entries(logits(2), torch.tensor([0]), None, truncation)
    with pytest.raises(ValueError, match="needs the positions' keys"):
        keep_entries(logits(2), torch.tensor([0, 1]), None, Truncation(CASES["hybrid"], VOCAB))
