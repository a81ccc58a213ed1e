"""What keep policies would cost and lose on a recipe's corpora, measured on a sample: ``plan.json``.

p is the teacher's whole distribution at a position, m the masses that a loss uses in its place. All means
are over the sample's positions.

Invariants (tests/schemas/test_keep_trial.py):
    1. A document reads back as itself; what is infinite or was not measured is null.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.fields import Count, Fraction, Frozen
from schemas.language import CodecName, LossName
from schemas.policy import KeepPolicy

_Amount = Annotated[float, Field(ge=0)]


class Quantisation(Frozen):
    """What a codec's rounding does to the masses of kept entries, m, and makes m'.

    Attributes:
        total_variation: Mean of ``1/2 sum |m - m'|``.
        divergence: Mean of ``sum m log(m / m') - m + m'``, in nats; null where infinite.
    """

    total_variation: _Amount
    divergence: _Amount | None


class LossTrial(Frozen):
    """What one loss makes of what is kept.

    m is for ``ghost_kl`` the kept p and the tail's mass spread evenly over the other tokens (of all
    distributions that agree with what is stored, that of most entropy); for ``support_kl`` the kept p,
    renormalised; for ``unbiased_kl`` the kept entries' weights, of which one draw is far from p and the
    mean over draws is p.

    Attributes:
        loss: Which.
        total_variation: Mean of ``1/2 sum |p - m|``, before the codec.
        kl_to_full: Mean of KL(m || p) in nats, before the codec; with ``- m + p`` in the sum where the
            weights do not add up to 1. Null where infinite.
        kl_from_full: Mean of KL(p || m); null where infinite, as it is if m leaves out what p has.
        calibration_error: ECE of the event that the teacher's most probable token comes, with m's
            probability of it; positions go into 15 equally wide bins by p's, so that a random draw does
            not choose its bin. Source: Guo et al. 2017, arXiv:1706.04599, equation 3; that top-k
            renormalised is overconfident: Anshumann et al., ACL 2025, arXiv:2503.16870.
        gradient_angle: Between the student's gradient with the decoded entries and that with the whole
            distributions, in degrees; null where it was not measured.
        gradient_ratio: Length of the first over that of the second.
    """

    loss: LossName
    total_variation: _Amount
    kl_to_full: float | None
    kl_from_full: float | None
    calibration_error: Fraction
    gradient_angle: Annotated[float, Field(ge=0, le=180)] | None = None
    gradient_ratio: _Amount | None = None


class CandidateTrial(Frozen):
    """One policy in one codec.

    Attributes:
        policy, codec: Which.
        is_recipe: Whether it is the recipe's own.
        mean_kept: Kept entries of a position.
        missed_mass: Mean mass of the tokens that are not kept.
        entry_bytes: Bytes of kept entries a position.
        row_bytes: Bytes of the store's data files a position, all columns and framing included.
        store_bytes: Of the data files over all of the teacher's corpora; plan and records, some kilobytes
            a shard, come on top.
        quantisation: Of the codec.
        teacher_s: Time of one actor for all of these corpora: model, policy and codec.
        wall_s: The same over the recipe's actors.
        gpu_hours: What the actors take up; null without GPUs, or where the trial ran on a CPU instead.
        cost: ``gpu_hours`` times the recipe's price, in its unit; null without either.
        losses: Those that fit the policy.
    """

    policy: KeepPolicy
    codec: CodecName
    is_recipe: bool
    mean_kept: _Amount
    missed_mass: Fraction
    entry_bytes: _Amount
    row_bytes: _Amount
    store_bytes: Annotated[int, Field(ge=0)]
    quantisation: Quantisation
    teacher_s: _Amount
    wall_s: _Amount
    gpu_hours: _Amount | None
    cost: _Amount | None
    losses: tuple[LossTrial, ...]


class TrialSize(Frozen):
    """Chunks, their tokens, and the positions that are stored of them."""

    num_chunks: Count
    num_tokens: Count
    num_positions: Count


class KeepTrial(Frozen):
    """One teacher over a sample of its corpora.

    Attributes:
        teacher: Its name.
        vocab: V, the true vocabulary.
        sample: What it ran over.
        corpora: What its stores will hold, of ``corpus_names``; each part of a corpus counts once.
        num_shards: Of these stores.
        device, num_threads: What it ran on.
        tokens_per_s: Of the model with its head over the sample, padding not counted, after a warm-up.
        num_actors, gpus_per_actor: Of the recipe.
        perplexity: Of the teacher on the sample.
        calibration_error: Of the teacher's whole distributions; see ``LossTrial``.
        student: What the gradients are of, or null.
        candidates: The recipe's own first.
    """

    teacher: str
    vocab: Count
    sample: TrialSize
    corpora: TrialSize
    corpus_names: tuple[str, ...]
    num_shards: Count
    device: Literal["cpu", "cuda"]
    num_threads: Count
    tokens_per_s: _Amount
    num_actors: Count
    gpus_per_actor: _Amount
    perplexity: _Amount
    calibration_error: Fraction
    student: str | None
    candidates: Annotated[tuple[CandidateTrial, ...], Field(min_length=1)]

    @property
    def codecs(self) -> tuple[CodecName, ...]:
        """Those of the candidates, the recipe's first."""
        return tuple(dict.fromkeys(one.codec for one in self.candidates))


class KeepPlan(Frozen):
    """``plan.json`` of a run.

    Attributes:
        run: Its name.
        gpu_hour_price: Of the recipe.
        trials: One for each teacher that has a model.
    """

    run: str
    gpu_hour_price: _Amount | None
    trials: tuple[KeepTrial, ...]


def name_policy(policy: KeepPolicy) -> str:
    """Returns a policy as people write it, such as ``top 64`` or ``hybrid 30+20``."""
    match policy.kind:
        case "top_k":
            return f"top {policy.k}"
        case "top_p":
            least = "" if policy.k_min == 1 else f"{policy.k_min} "
            return f"top-p {policy.p:g}, {least}to {policy.k_max}"
        case "sampled":
            tau = "" if policy.tau == 1 else f", tau {policy.tau:g}"
            return f"sampled {policy.num_samples}{tau}"
        case "hybrid":
            return f"hybrid {policy.k}+{policy.m}"
        case _:
            return "dense"
