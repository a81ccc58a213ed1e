from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from precompute.deviation import (
    USES,
    CalibrationBins,
    Support,
    fitting_losses,
    renormalised,
    rounding,
    spread_tail,
    weighted,
)
from precompute.draws import position_keys
from precompute.truncate import Truncation, keep_entries
from schemas.kept_entries import KeptEntries, offsets_of
from schemas.policy import (
    AnyPolicy,
    DensePolicy,
    HybridPolicy,
    SampledPolicy,
    TopKPolicy,
    TopPPolicy,
)

VOCAB = 17
# Two of four tokens are kept: 0.5 and 0.25; 0.15 and 0.1 are not.
P = torch.tensor([[0.5, 0.15, 0.25, 0.1]])
TOP_2 = KeptEntries(np.array([0, 2]), np.array([0, 2]), np.log(np.array([0.5, 0.25], np.float32)))
POLICIES: tuple[AnyPolicy, ...] = (
    TopKPolicy(kind="top_k", k=1),
    TopKPolicy(kind="top_k", k=5),
    TopKPolicy(kind="top_k", k=VOCAB),
    TopPPolicy(kind="top_p", p=0.7, k_max=9),
    SampledPolicy(kind="sampled", num_samples=6),
    SampledPolicy(kind="sampled", num_samples=6, tau=0.7),
    HybridPolicy(kind="hybrid", k=3, m=4),
    DensePolicy(),
)


def support_of(policy: AnyPolicy, num: int = 30) -> tuple[Support, KeptEntries]:
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 3, (num, VOCAB)).astype(np.float32))
    keys = position_keys(5, "doc#0", np.arange(num))
    kept = keep_entries(logits, torch.zeros(num, dtype=torch.int64), keys, Truncation(policy, VOCAB))
    return Support.of(logits.log_softmax(dim=1), kept.entries), kept.entries


def dense_masses(loss: str, support: Support, entries: KeptEntries) -> np.ndarray:
    """Writes the masses that a loss uses out in full."""
    p = support.log_probs_NV.double().exp().numpy()
    m = np.zeros_like(p)
    for n in range(len(p)):
        some = slice(entries.offsets[n], entries.offsets[n + 1])
        ids = entries.ids[some]
        if loss == "unbiased_kl":
            m[n, ids] = p[n, ids] if entries.weights is None else entries.weights[some]
            continue
        m[n, ids] = p[n, ids]
        rest = np.setdiff1d(np.arange(VOCAB), ids)
        if loss == "support_kl":
            m[n] /= m[n].sum()
        elif len(rest):
            m[n, rest] = p[n, rest].sum() / len(rest)
    return m


def divergence(m: np.ndarray, p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(m > 0, m * np.log(m / p), 0.0)
    return (terms - m + p).sum(axis=1)


def test_what_two_of_four_tokens_leave_worked_out_by_hand() -> None:
    support = Support.of(P.log(), TOP_2)
    assert support.missed_mass().item() == pytest.approx(0.25)
    ghost = spread_tail(support)
    # 0.15 and 0.1 become 0.125 each.
    assert ghost.total_variation == pytest.approx(0.025, rel=1e-5)
    to_full = 0.125 * math.log(0.125 / 0.15) + 0.125 * math.log(0.125 / 0.1)
    assert ghost.kl_to_full == pytest.approx(to_full, rel=1e-4)
    from_full = 0.15 * math.log(0.15 / 0.125) + 0.1 * math.log(0.1 / 0.125)
    assert ghost.kl_from_full == pytest.approx(from_full, rel=1e-4)
    assert ghost.confidence == pytest.approx(0.5)
    scaled = renormalised(support)
    assert scaled.total_variation == pytest.approx(0.25, rel=1e-6)
    assert scaled.kl_to_full == pytest.approx(-math.log(0.75), rel=1e-6)
    assert np.isinf(scaled.kl_from_full).all()
    assert scaled.confidence == pytest.approx(2 / 3)


def test_the_weights_of_a_draw_worked_out_by_hand() -> None:
    logits = P.log()
    kept = keep_entries(
        logits,
        torch.tensor([0]),
        position_keys(0, "a", np.arange(1)),
        Truncation(HybridPolicy(kind="hybrid", k=1, m=1), 4),
    )
    entries = kept.entries
    # The head has 0.5; one id of the rest stands for 0.5.
    assert entries.weights == pytest.approx([0.5, 0.5])
    found = weighted(Support.of(logits, entries))
    drawn = P[0, entries.ids[1]].item()
    assert found.total_variation == pytest.approx(0.5 - drawn)
    assert found.kl_to_full == pytest.approx(0.5 * math.log(0.5 / drawn), rel=1e-5)
    assert np.isinf(found.kl_from_full).all()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_distances_are_those_of_distributions_written_out_in_full(policy: AnyPolicy) -> None:
    support, entries = support_of(policy)
    p = support.log_probs_NV.double().exp().numpy()
    top = p.argmax(axis=1)
    losses = set(fitting_losses(policy)) | ({"unbiased_kl"} if policy.kind == "dense" else set())
    for loss in losses:
        m = dense_masses(loss, support, entries)
        found = USES[loss](support)
        assert found.total_variation == pytest.approx(0.5 * np.abs(p - m).sum(axis=1), abs=2e-7)
        assert found.kl_to_full == pytest.approx(divergence(m, p), abs=1e-6)
        backward = divergence(p, m)
        finite = np.isfinite(backward)
        np.testing.assert_array_equal(np.isfinite(found.kl_from_full), finite)
        assert found.kl_from_full[finite] == pytest.approx(backward[finite], abs=1e-6)
        assert found.confidence == pytest.approx(m[np.arange(len(m)), top], abs=1e-7)


@pytest.mark.parametrize("policy", [DensePolicy(), TopKPolicy(kind="top_k", k=VOCAB)], ids=["dense", "top_k"])
def test_what_keeps_everything_has_no_distance(policy: AnyPolicy) -> None:
    support, _ = support_of(policy)
    assert (support.missed_mass() == 0).all()
    for loss in ("ghost_kl", "support_kl", "unbiased_kl"):
        found = USES[loss](support)
        for values in (found.total_variation, found.kl_to_full, found.kl_from_full):
            assert values == pytest.approx(np.zeros(len(values)), abs=1e-7)


def test_a_token_that_is_never_said_is_infinitely_far_from_an_even_share() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -math.inf]])
    entries = KeptEntries(np.array([0, 1]), np.array([0]), np.zeros(1, np.float32))
    found = spread_tail(Support.of(logits.log_softmax(dim=1), entries))
    assert np.isinf(found.kl_to_full).all()
    assert np.isfinite(found.kl_from_full).all()
    assert np.isfinite(found.total_variation).all()


def test_rounding_is_measured_on_masses() -> None:
    exact = KeptEntries(np.array([0, 2]), np.array([1, 2]), np.log(np.array([0.5, 0.2], np.float32)))
    decoded = KeptEntries(np.array([0, 2]), np.array([1, 2]), np.log(np.array([0.4, 0.25], np.float32)))
    variation, lost = rounding(exact, decoded)
    assert variation == pytest.approx(0.075, rel=1e-5)
    expected = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.25) + 0.65 - 0.7
    assert lost == pytest.approx(expected, rel=1e-4)
    assert rounding(exact, exact) == (0.0, 0.0)


def test_calibration_goes_by_the_whole_distributions_bins() -> None:
    bins = CalibrationBins.empty()
    # Two bins of two positions each: 0.5 with one hit, 0.9 with two.
    whole = np.array([0.5, 0.5, 0.9, 0.9])
    bins.add(whole, np.array([0.7, 0.5, 1.0, 1.0]), np.array([True, False, True, True]))
    # |1 - 1.2| + |2 - 2| over 4.
    assert bins.error() == pytest.approx(0.05)
    exact = CalibrationBins.empty()
    exact.add(whole, whole, np.array([True, False, True, True]))
    assert exact.error() == pytest.approx(0.2 / 4)


def test_a_mean_of_many_draws_is_calibrated_like_the_whole() -> None:
    num = 4000
    logits = torch.tensor([[math.log(0.6), math.log(0.3), math.log(0.1)]]).repeat(num, 1)
    keys = position_keys(1, "doc", np.arange(num))
    kept = keep_entries(
        logits,
        torch.zeros(num, dtype=torch.int64),
        keys,
        Truncation(SampledPolicy(kind="sampled", num_samples=3), 3),
    )
    found = weighted(Support.of(logits, kept.entries))
    assert offsets_of(kept.entries.counts)[-1] == len(kept.entries.ids)
    assert found.confidence.mean() == pytest.approx(0.6, abs=0.02)
    # One draw by itself is far away.
    assert found.total_variation.mean() > 0.1
