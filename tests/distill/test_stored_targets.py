"""Stored targets: padding, joining, checks and exact temperatures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from distill.stored_targets import StoredTargets, SupportKind, TargetOrigin, join_targets
from schemas.errors import DataError
from schemas.kept_entries import Draws, KeptEntries, PositionStats, offsets_of
from tests.distill.dense_reference import random_logits, store, top_supports

V = 40


def test_parts_of_different_widths_are_joined_and_cut_apart_again():
    teacher_NV = random_logits(1, 4, V)
    parts = [
        store(teacher_NV[:1], top_supports(teacher_NV[:1], (2,)), [1]),
        store(teacher_NV[1:], top_supports(teacher_NV[1:], (5, 0, 3)), [2, 3, 4]),
    ]
    joined = join_targets(parts)
    joined.check()
    assert joined.ids_NK.shape == (4, 5)
    assert joined.mask_NK.sum(dim=1).tolist() == [2, 5, 0, 3]
    assert joined.ids_NK[0, :2].tolist() == parts[0].ids_NK[0].tolist()
    again = joined.select(torch.tensor([1, 2, 3]))
    assert torch.equal(again.ids_NK[again.mask_NK], parts[1].ids_NK[parts[1].mask_NK])
    assert torch.equal(again.lse_N, joined.narrow(1, 4).lse_N)
    with pytest.raises(ValueError, match="cannot be joined"):
        join_targets([parts[0], dataclasses.replace(parts[1], vocab_size=V + 1)])
    with pytest.raises(ValueError, match="no targets"):
        join_targets([])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_distributions_at_a_temperature_of_the_grid_are_exact(temperature: float):
    teacher_NV = random_logits(2, 5, V)
    supports = top_supports(teacher_NV, (3, 1, V, 0, 20))
    targets = store(teacher_NV, supports, [0] * 5)
    log_probs_NK, log_tail_N = targets.tempered(temperature)
    exact_NV = (teacher_NV / temperature).log_softmax(dim=-1)
    for n, support in enumerate(supports):
        torch.testing.assert_close(log_probs_NK[n, : len(support)], exact_NV[n, support])
        outside = [v for v in range(V) if v not in support]
        tail = exact_NV[n, outside].logsumexp(dim=0) if outside else torch.tensor(-torch.inf).double()
        torch.testing.assert_close(log_tail_N[n], tail)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_tail_that_rounding_would_drown_stays_within_its_bounds(temperature: float):
    # 1 - sum at T is about 1e-10, far below the rounding of half-precision log-probabilities.
    teacher_NV = torch.cat([torch.tensor([60.0, 59.0]), torch.linspace(9, 10, V - 2)]).double()[None]
    targets = store(teacher_NV, [[0, 1]], [0])
    rounded = dataclasses.replace(targets, log_probs_NK=targets.log_probs_NK.half())
    exact = (teacher_NV / temperature).log_softmax(dim=-1)[0, 2:].logsumexp(dim=0).item()
    _, log_tail_N = rounded.tempered(temperature)
    # The bounds are log(V - K) (1 - 1/T) apart, and the tail is nearly uniform: near the upper one.
    assert abs(log_tail_N.item() - exact) <= abs(1 - 1 / temperature) * torch.tensor(V - 2.0).log().item()
    drowned = (-(torch.expm1(rounded.log_probs_NK.double().logsumexp(dim=-1)))).abs().log().item()
    assert drowned - exact > 5


def _entries(**columns: object) -> KeptEntries:
    offsets, ids = np.array([0, 2, 2, 5]), np.array([4, 9, 1, 7, 3], np.uint16)
    return KeptEntries(offsets, ids, np.array([-1, -2, -0.5, -3, -2], np.float16), **columns)


def _stats(num: int = 3) -> PositionStats:
    rows = np.arange(num, dtype=np.float32)
    return PositionStats(-rows, rows + 1, rows + 2, -rows - 3, np.stack([rows, rows + 5], axis=1))


def test_decoded_entries_become_padded_targets_and_are_copied():
    entries, stats = _entries(), _stats()
    for column in (entries.ids, entries.log_probs, stats.lse):
        column.flags.writeable = False
    targets = StoredTargets.of_entries(
        entries, stats, TargetOrigin("top_p", V, (0.5, 2.0)), torch.tensor([1, 2, 3])
    )
    targets.check()
    assert (targets.kind, targets.weights_NK, targets.num_exact_N) == (SupportKind.EXACT, None, None)
    assert targets.ids_NK.tolist() == [[4, 9, 0], [0, 0, 0], [1, 7, 3]]
    assert targets.log_probs_NK.tolist() == [[-1, -2, 0], [0, 0, 0], [-0.5, -3, -2]]
    assert targets.lse_grid_NG is not None
    assert targets.lse_grid_NG.tolist() == [[0, 5], [1, 6], [2, 7]]
    assert (targets.lse_N.tolist(), targets.entropy_N.tolist()) == ([1, 2, 3], [2, 3, 4])
    targets.lse_N.add_(1)
    assert stats.lse.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("counts", "ids"), [([2, 2], [[4, 9], [1, 7]]), ([0, 0], [[], []]), ([], [])])
def test_positions_with_equally_many_entries_need_no_padding(counts: list[int], ids: list[list[int]]):
    entries = dataclasses.replace(_entries(), offsets=offsets_of(np.array(counts, np.int64)))
    tokens_N = torch.zeros(len(counts), dtype=torch.int64)
    targets = StoredTargets.of_entries(entries, _stats(len(counts)), TargetOrigin("top_k", V), tokens_N)
    targets.check()
    assert targets.ids_NK.tolist() == ids
    assert targets.mask_NK.all()


def test_a_part_of_decoded_entries_is_taken_where_its_offsets_say():
    entries = dataclasses.replace(_entries(), offsets=np.array([2, 2, 5]))
    targets = StoredTargets.of_entries(entries, _stats(2), TargetOrigin("top_k", V), torch.tensor([1, 2]))
    assert targets.ids_NK.tolist() == [[0, 0, 0], [1, 7, 3]]
    assert (targets.lse_grid_NG, targets.temperatures) == (None, ())


def test_weights_of_sampled_and_hybrid_entries_are_the_masses_they_stand_for():
    counts = np.array([3, 1, 2, 1, 1], np.uint16)
    sampled = _entries(draws=Draws(counts, np.zeros(3, np.float32), num_samples=4, tau=1.0))
    origin, tokens_N = TargetOrigin("sampled", V), torch.tensor([1, 2, 3])
    targets = StoredTargets.of_entries(sampled, _stats(), origin, tokens_N)
    assert targets.weights_NK is not None
    assert targets.weights_NK.tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0.5, 0.25, 0.25]]
    hybrid = _entries(num_head=np.array([2, 0, 1], np.uint8), tau=np.exp(np.array([0, 0, -2], np.float32)))
    targets = StoredTargets.of_entries(hybrid, _stats(), TargetOrigin("hybrid", V), tokens_N)
    targets.check()
    assert targets.exact_NK.tolist() == [[True, True, False], [False] * 3, [True, False, False]]
    assert targets.weights_NK is not None
    torch.testing.assert_close(targets.weights_NK[2], torch.tensor([-0.5, -3.0, -2.0]).exp())


def test_ids_shapes_and_weights_are_checked():
    targets = store(random_logits(1, 2, V), [[0, 1], [5]], [0, 1])
    targets.check()
    ids_NK = targets.ids_NK.clone()
    ids_NK[1, 0] = V
    with pytest.raises(DataError, match=f"kept id {V} or 0 is out of range; the vocabulary has {V}"):
        dataclasses.replace(targets, ids_NK=ids_NK).check()
    with pytest.raises(DataError, match=r"lse_N has shape \(1,\), expected \(2,\)"):
        dataclasses.replace(targets, lse_N=targets.lse_N[:1]).check()
    with pytest.raises(DataError, match="weights do not go together"):
        dataclasses.replace(targets, kind=SupportKind.UNBIASED).check()
    with pytest.raises(DataError, match="inexact entries need weights and the teacher's entropy"):
        dataclasses.replace(targets, num_exact_N=torch.tensor([1, 1])).check()


def test_targets_without_a_teacher_have_only_tokens():
    tokens = StoredTargets.of_tokens(torch.tensor([1, 2]), V)
    tokens.check()
    assert tokens.ids_NK.shape == (2, 0)
    assert tokens.position_weights_N.tolist() == [1.0, 1.0]
