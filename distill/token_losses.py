"""Losses of language models over stored sparse distributions, per position, in nats.

Shapes: N positions, K kept entries of a teacher's store (padded).

The teacher's distribution is p, the student's is q, both over the whole true vocabulary and at one
temperature T; S is the set of kept entries, and ptail, qtail are the masses outside it. Every entry of
``TOKEN_LOSSES`` is a pure function of a ``Comparison``, which holds only what S needs: no function
sees the vocabulary. Tempered losses are multiplied by T^2 (Hinton et al. 2015, arXiv:1503.02531).

Several teachers: a term is the sum over teachers m of a_m times its loss. For ``unbiased_kl`` with
sum_m a_m = 1 that is exact mixing: the loss is linear in p, so its expected gradient is
q - sum_m a_m p_m, that of the KL from the mixture (the values differ by a constant of the teachers).

Invariants (tests/distill/test_token_losses.py):
    1. Values and gradients are those of an independent dense float64 formula.
    2. Entries say truly whether they vanish where student equals teacher and whether they can be
       negative.
    3. Padding changes nothing, and a position's loss does not depend on the others.
    4. No tail mass is the difference of 1 and a sum: tail masses come in logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from distill.stored_targets import StoredTargets, SupportKind
from schemas.errors import RecipeError

LOG_FLOOR = -1e4
"""Least teacher log-probability: keeps 0 log 0 finite; exp of it is 0 in every dtype."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A student beside one teacher at one temperature.

    Attributes:
        mask_NK: True for kept entries that have their own log p (S), False for others and padding.
        teacher_NK: log p of the entries, at least ``LOG_FLOOR``.
        teacher_tail_N: log ptail, at least ``LOG_FLOOR``.
        mass_NK: Mass that an entry stands for, one that is not in S too: p, or its weight in an unbiased
            store; 0 at padding.
        inexact_N: ``sum p log p`` over the tokens outside S, where entries without their own log p stand
            for them; 0 where there are none.
        student_NK: log q of the entries; finite at padding.
        student_tail_N: log qtail.
        student_target_N: log q of the token that the position has to predict.
    """

    mask_NK: Tensor
    teacher_NK: Tensor
    teacher_tail_N: Tensor
    mass_NK: Tensor
    inexact_N: Tensor
    student_NK: Tensor
    student_tail_N: Tensor
    student_target_N: Tensor


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One summand of the loss.

    Attributes:
        name: An entry of ``TOKEN_LOSSES``.
        weight: Its factor.
        temperature: T > 0; 1 where the loss has none.
        beta: Share of the teacher in the JSD's mixture, in (0, 1).
    """

    name: str
    weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A weighted sum of losses.

    Attributes:
        terms: The summands.
        teacher_weights: Factor of each teacher in every term that has a teacher; None: 1 each.
    """

    terms: tuple[LossTerm, ...]
    teacher_weights: tuple[float, ...] | None = None

    def weights_of(self, num_teachers: int) -> tuple[float, ...]:
        """Returns a factor for each teacher."""
        return (1.0,) * num_teachers if self.teacher_weights is None else self.teacher_weights

    def check(self, targets: Sequence[StoredTargets], teachers: Sequence[str] = ()) -> None:
        """Checks that the stores can give what the terms need.

        Args:
            targets: One per teacher.
            teachers: Their names, for errors.

        Raises:
            RecipeError: A name, number or kind of store does not fit.
            TemperatureError: A temperature that a store cannot give.
        """
        if not self.terms:
            raise RecipeError("no loss is named", field="losses")
        if self.teacher_weights is not None and len(self.teacher_weights) != len(targets):
            raise RecipeError(
                f"there are {len(self.teacher_weights)} weights for {len(targets)} teachers",
                field="teacher_weights",
            )
        names = [f"the store of teacher {name}" for name in teachers] or ["the store"] * len(targets)
        for term in self.terms:
            _check_term(term, list(zip(names, targets, strict=True)))


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """One way to compare a student with a teacher, or with the target.

    Attributes:
        per_position: ``(comparison, beta) -> loss_N``, without T^2.
        uses_teacher: False: the target alone, counted once whatever the number of teachers.
        uses_temperature: Whether T other than 1 is allowed, with the factor T^2.
        needs_whole: It is biased on a truncated store and refuses one.
        vanishes_at_teacher: It is 0 where q = p.
        can_be_negative: A single position's value can be below 0.
    """

    per_position: Callable[[Comparison, float], Tensor]
    uses_teacher: bool = True
    uses_temperature: bool = True
    needs_whole: bool = False
    vanishes_at_teacher: bool = True
    can_be_negative: bool = False


def target_cross_entropy(pair: Comparison, _beta: float = 0.5) -> Tensor:
    """``-log q_target``, as ``loss_N``."""
    return -pair.student_target_N


def support_divergence(pair: Comparison, _beta: float = 0.5) -> Tensor:
    """``sum_S p' (log p' - log q')`` with p' and q' renormalised on S; 0 where S is empty.

    Biased: it says nothing of the mass outside S, and the student's logits there have no gradient.

    Source: what cached top-k distillation usually does; Anshumann et al., ACL 2025, section 3.1.
    """
    teacher_NK = _renormalise(pair.teacher_NK, pair.mask_NK)
    student_NK = _renormalise(pair.student_NK, pair.mask_NK)
    return _sum_entries(teacher_NK.exp() * (teacher_NK - student_NK), pair.mask_NK)


def ghost_divergence(pair: Comparison, _beta: float = 0.5) -> Tensor:
    """``sum_S p (log p - log q) + ptail (log ptail - log qtail)``.

    At T = 1 its gradient is q_j - p_j on S and q_j (1 - ptail / qtail) off it.

    Source: the "ghost token" of Anshumann et al., ACL 2025, arXiv:2503.16870; it is the KL divergence
    after all tokens outside S are merged into one.
    """
    kept_N = _sum_entries(pair.teacher_NK.exp() * (pair.teacher_NK - pair.student_NK), pair.mask_NK)
    return kept_N + pair.teacher_tail_N.exp() * (pair.teacher_tail_N - pair.student_tail_N)


def unbiased_divergence(pair: Comparison, _beta: float = 0.5) -> Tensor:
    """``sum w (log p - log q)``; its expectation over the draws is the whole KL, no constant missing.

    Linear in p, so that replacing p by an unbiased estimate w leaves value and gradient unbiased: the
    expected gradient is q - p. A single draw's value can be negative. log p stays in it although it
    moves no gradient: near q = p it takes most of the variance out of the value. The sampled tail of a
    hybrid store has no log p; its part of ``sum p log p`` follows from the stored entropy, exactly.

    Source: Anshumann et al., ACL 2025, arXiv:2503.16870 (sampled); Horvitz and Thompson 1952 (hybrid).
    """
    known_NK = pair.teacher_NK.masked_fill(~pair.mask_NK, 0.0)
    return (pair.mass_NK * (known_NK - pair.student_NK)).sum(dim=-1) + pair.inexact_N


def reverse_divergence(pair: Comparison, _beta: float = 0.5) -> Tensor:
    """``sum_S q (log q - log p) + qtail (log qtail - log ptail)``.

    Source: Gu et al., MiniLLM, ICLR 2024, arXiv:2306.08543; the tail merged into one token.
    """
    kept_N = _sum_entries(pair.student_NK.exp() * (pair.student_NK - pair.teacher_NK), pair.mask_NK)
    return kept_N + pair.student_tail_N.exp() * (pair.student_tail_N - pair.teacher_tail_N)


def jensen_shannon(pair: Comparison, beta: float = 0.5) -> Tensor:
    """``beta KL(p || m) + (1 - beta) KL(q || m)``, m = beta p + (1 - beta) q, the tail as one token.

    Source: Agarwal et al., GKD, ICLR 2024, arXiv:2306.13649, equation 1.
    """
    kept_N = _sum_entries(_jensen_shannon_terms(pair.teacher_NK, pair.student_NK, beta), pair.mask_NK)
    return kept_N + _jensen_shannon_terms(pair.teacher_tail_N, pair.student_tail_N, beta)


def centred_logit_error(pair: Comparison, _beta: float = 0.5) -> Tensor:
    """Mean over S of the squared difference of logits, each side less its mean over S; 0 for empty S.

    Log-probabilities do as logits: they differ by a constant, which centring removes. Tokens that the
    teacher never says (logit -inf) take no part.
    """
    mask_NK = pair.mask_NK & (pair.teacher_NK > LOG_FLOOR)
    count_N = mask_NK.sum(dim=-1).clamp(min=1)
    gap_NK = (pair.student_NK - pair.teacher_NK).masked_fill(~mask_NK, 0.0)
    centred_NK = gap_NK - (gap_NK.sum(dim=-1) / count_N)[:, None]
    return _sum_entries(centred_NK.square(), mask_NK) / count_N


TOKEN_LOSSES: Mapping[str, TokenLoss] = MappingProxyType(
    {
        "cross_entropy": TokenLoss(
            target_cross_entropy, uses_teacher=False, uses_temperature=False, vanishes_at_teacher=False
        ),
        "support_kl": TokenLoss(support_divergence),
        "ghost_kl": TokenLoss(ghost_divergence),
        "unbiased_kl": TokenLoss(unbiased_divergence, needs_whole=True, can_be_negative=True),
        "reverse_kl": TokenLoss(reverse_divergence),
        "jsd": TokenLoss(jensen_shannon),
        "logit_mse": TokenLoss(centred_logit_error, uses_temperature=False),
    }
)


def _check_term(term: LossTerm, targets: Sequence[tuple[str, StoredTargets]]) -> None:
    loss = TOKEN_LOSSES.get(term.name)
    if loss is None:
        raise RecipeError(
            f"no loss is named {term.name}; there are {', '.join(TOKEN_LOSSES)}", field="losses"
        )
    if not 0 < term.beta < 1:
        raise RecipeError(f"beta is {term.beta:g}, expected a number between 0 and 1", field="beta")
    if not 0 < term.temperature < math.inf:
        raise RecipeError(f"{term.temperature:g} is no temperature, expected T > 0", field="temperature")
    if term.temperature != 1 and not loss.uses_temperature:
        raise RecipeError(f"the loss {term.name} has no temperature other than 1", field="temperature")
    for store, stored in targets if loss.uses_teacher else ():
        stored.check_temperature(term.temperature, store)
        if loss.needs_whole and stored.kind is SupportKind.EXACT:
            raise RecipeError(
                f"{term.name} is biased on a top_k or top_p store, which {store} is; use ghost_kl, or a "
                "dense, sampled or hybrid store",
                field="losses",
            )


def _sum_entries(terms_NK: Tensor, mask_NK: Tensor) -> Tensor:
    return terms_NK.masked_fill(~mask_NK, 0.0).sum(dim=-1)


def _renormalise(log_NK: Tensor, mask_NK: Tensor) -> Tensor:
    # A finite filler: an empty support must not make 0 times infinity.
    filled_NK = log_NK.masked_fill(~mask_NK, -1e30)
    return filled_NK.log_softmax(dim=-1) if log_NK.shape[1] else log_NK


def _jensen_shannon_terms(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = (log_p + math.log(beta)).logaddexp(log_q + math.log1p(-beta))
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
