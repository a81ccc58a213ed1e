"""From a teacher's full logits through the real keep policies to the student's gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.fused_head import fused_losses
from distill.head_form import HeadForm
from distill.stored_targets import StoredTargets, TargetOrigin
from distill.token_losses import LossSpec, LossTerm
from precompute.draws import position_keys
from precompute.truncate import Truncation, keep_entries
from schemas.policy import AnyPolicy, DensePolicy, HybridPolicy, SampledPolicy, TopKPolicy, TopPPolicy
from tests.distill.dense_reference import random_logits, reference_loss

V, GRID = 30, (2.0,)


def _targets(teacher_NV: Tensor, policy: AnyPolicy) -> StoredTargets:
    num = len(teacher_NV)
    tokens_N, places = torch.arange(num) % V, np.arange(num)
    keys = position_keys(getattr(policy, "seed", 0), "doc#0", places)
    kept = keep_entries(teacher_NV.float(), tokens_N, keys, Truncation(policy, V, GRID))
    origin = TargetOrigin(policy.kind, V, GRID)
    return StoredTargets.of_entries(kept.entries, kept.stats, origin, tokens_N)


def _gradient(student_NV: Tensor, targets: StoredTargets, term: LossTerm) -> tuple[Tensor, Tensor]:
    """The losses and their gradient with respect to the logits: the head is the identity."""
    hidden_NV = student_NV.float().requires_grad_()
    losses = fused_losses(hidden_NV, torch.eye(V), None, targets, LossSpec((term,)), HeadForm())
    (gradient_NV,) = torch.autograd.grad(losses.total, hidden_NV)
    return losses.terms_LN[0].double(), gradient_NV.double()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "policy",
    [DensePolicy(), TopKPolicy(kind="top_k", k=4), TopPPolicy(kind="top_p", p=0.7, k_min=1, k_max=12)],
    ids=["dense", "top_k", "top_p"],
)
def test_the_ghost_loss_of_a_deterministic_store_is_that_of_the_full_logits(
    policy: AnyPolicy, temperature: float
):
    teacher_NV, student_NV = random_logits(1, 6, V), random_logits(2, 6, V)
    targets = _targets(teacher_NV, policy)
    actual_N, _ = _gradient(student_NV, targets, LossTerm("ghost_kl", temperature=temperature))
    for n in range(6):
        support = targets.ids_NK[n, : int(targets.counts_N[n])].tolist()
        expected = reference_loss(
            "ghost_kl", teacher_NV[n], student_NV[n], support, temperature=temperature
        ).item()
        assert actual_N[n].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        SampledPolicy(kind="sampled", num_samples=8, tau=1.0, seed=1),
        SampledPolicy(kind="sampled", num_samples=8, tau=0.8, seed=2),
        HybridPolicy(kind="hybrid", k=3, m=4, seed=3),
    ],
    ids=["sampled", "sampled with p^0.8", "hybrid"],
)
def test_the_mean_over_positions_of_an_unbiased_store_is_full_distillation(policy: AnyPolicy):
    num = 4000
    teacher_NV, student_NV = random_logits(3, 1, V, 1.5), random_logits(4, 1, V)
    targets = _targets(teacher_NV.expand(num, -1), policy)
    values_N, gradient_NV = _gradient(student_NV.expand(num, -1), targets, LossTerm("unbiased_kl"))
    p_V, q_V = teacher_NV[0].softmax(dim=-1), student_NV[0].softmax(dim=-1)
    error_V = gradient_NV.std(dim=0).clamp(min=1e-6) / math.sqrt(num)
    assert ((gradient_NV.mean(dim=0) - (q_V - p_V)) / error_V).abs().max() < 4.5
    whole = (p_V * (p_V / q_V).log()).sum()
    assert abs(values_N.mean() - whole) < 4.5 * values_N.std() / math.sqrt(num) < 0.1 * whole
