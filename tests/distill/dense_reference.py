"""Stored targets made from full logits, and every token loss as a plain dense float64 formula.

Nothing here uses the code under test but the dataclass: distributions are softmaxes of full logits,
sums run over Python lists of ids, one position after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.stored_targets import StoredTargets, SupportKind

GRID = (0.5, 2.0)


def random_logits(seed: int, num: int, vocab_size: int, spread: float = 2.0) -> Tensor:
    """float64, ``[N, V]``."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(num, vocab_size, generator=generator, dtype=torch.float64)


def top_supports(teacher_NV: Tensor, sizes: Sequence[int]) -> list[list[int]]:
    """The ``sizes[n]`` most probable ids of each position, ascending."""
    return [sorted(row.topk(size).indices.tolist()) for row, size in zip(teacher_NV, sizes, strict=True)]


def store(
    teacher_NV: Tensor,
    supports: list[list[int]],
    target_ids: Sequence[int],
    *,
    kind: SupportKind = SupportKind.EXACT,
    weights: list[list[float]] | None = None,
    num_exact: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    position_weights: Sequence[float] | None = None,
) -> StoredTargets:
    """What a store would say of ``teacher_NV``, with garbage (NaN, a wild id) at padding.

    ``num_exact``: of a hybrid store, how many entries of each position, the first, are its head.
    """
    num, vocab_size = teacher_NV.shape
    width = max((len(support) for support in supports), default=0)
    log_p_NV = teacher_NV.log_softmax(dim=-1)
    ids = torch.full((num, width), vocab_size + 7, dtype=torch.int32)
    log_probs = torch.full((num, width), torch.nan, dtype=dtype)
    mass = torch.full((num, width), torch.nan, dtype=dtype)
    log_tail = torch.full((num,), -torch.inf, dtype=dtype)
    for n, support in enumerate(supports):
        ids[n, : len(support)] = torch.tensor(support, dtype=torch.int32)
        exact = support if num_exact is None else support[: num_exact[n]]
        log_probs[n, : len(exact)] = log_p_NV[n, exact].to(dtype)
        if weights is not None:
            mass[n, : len(support)] = torch.tensor(weights[n], dtype=dtype)
        outside = [v for v in range(vocab_size) if v not in exact]
        if outside:
            log_tail[n] = log_p_NV[n, outside].logsumexp(dim=0).to(dtype)
    return StoredTargets(
        kind=kind,
        vocab_size=vocab_size,
        ids_NK=ids,
        log_probs_NK=log_probs,
        counts_N=torch.tensor([len(support) for support in supports]),
        num_exact_N=None if num_exact is None else torch.tensor(num_exact),
        weights_NK=mass if weights is not None else None,
        log_tail_N=log_tail,
        entropy_N=-(log_p_NV.exp() * log_p_NV).sum(dim=-1).to(dtype),
        lse_N=teacher_NV.logsumexp(dim=-1).to(dtype),
        lse_grid_NG=torch.stack([(teacher_NV / t).logsumexp(dim=-1) for t in GRID], dim=-1).to(dtype),
        temperatures=GRID,
        target_ids_N=torch.tensor(target_ids),
        position_weights_N=torch.ones(num) if position_weights is None else torch.tensor(position_weights),
    )


def reference_loss(
    name: str,
    teacher_V: Tensor,
    student_V: Tensor,
    support: list[int],
    *,
    target: int = 0,
    temperature: float = 1.0,
    beta: float = 0.5,
    weights: list[float] | None = None,
) -> Tensor:
    """One position's loss, with T^2, from full logits in float64."""
    p_V, q_V = (teacher_V / temperature).softmax(dim=-1), (student_V / temperature).softmax(dim=-1)
    outside = [v for v in range(len(p_V)) if v not in support]
    zero = 0.0 * student_V.sum()
    if name == "cross_entropy":
        return -q_V[target].log()
    if name == "logit_mse":
        if not support:
            return zero
        z_S, t_S = student_V[support], teacher_V[support]
        return ((z_S - z_S.mean()) - (t_S - t_S.mean())).square().mean()
    if name == "support_kl":
        p_S, q_S = p_V[support] / p_V[support].sum(), q_V[support] / q_V[support].sum()
        return zero + temperature**2 * (p_S * (p_S / q_S).log()).sum()
    if name == "unbiased_kl":
        w_S = p_V[support] if weights is None else torch.tensor(weights, dtype=torch.float64)
        return temperature**2 * (w_S * (p_V[support] / q_V[support]).log()).sum()
    p_B, q_B = p_V[support], q_V[support]
    if outside:
        p_B, q_B = torch.cat([p_B, p_V[outside].sum()[None]]), torch.cat([q_B, q_V[outside].sum()[None]])
    if name == "ghost_kl":
        value = (p_B * (p_B / q_B).log()).sum()
    elif name == "reverse_kl":
        value = (q_B * (q_B / p_B).log()).sum()
    elif name == "jsd":
        m_B = beta * p_B + (1 - beta) * q_B
        value = beta * (p_B * (p_B / m_B).log()).sum() + (1 - beta) * (q_B * (q_B / m_B).log()).sum()
    else:
        raise ValueError(name)
    return temperature**2 * value
