"""Keep policies that a trial compares: the recipe's own, a stated set, and draws that take as many bytes.

Invariants (tests/precompute/test_candidates.py):
    1. The recipe's own comes first, and no policy is there twice.
    2. Every policy fits the vocabulary.
    3. A matched policy takes as many bytes as it can be made to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from schemas.language import CodecName
from schemas.policy import (
    MAX_DRAWS,
    AnyPolicy,
    DensePolicy,
    HybridPolicy,
    SampledPolicy,
    TopKPolicy,
    TopPPolicy,
)

TOP_K = (12, 50, 64, 128)
TOP_P = (0.9, 0.95)
TOP_P_MAX = 512
# What draws are matched with where the recipe's own policy is dense.
_REFERENCE_K = 50


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy in a codec.

    Attributes:
        is_recipe: Whether it is the recipe's own.
    """

    policy: AnyPolicy
    codec: CodecName
    is_recipe: bool = False


def list_candidates(
    own: AnyPolicy,
    codecs: Sequence[CodecName],
    vocab: int,
    measure_bytes: Callable[[AnyPolicy], float],
    *,
    seed: int = 0,
) -> tuple[Candidate, ...]:
    """Returns what to try: policies in the first codec, then all of them in each further one.

    Args:
        own: The recipe's policy.
        codecs: The recipe's first.
        vocab: V, the true vocabulary.
        measure_bytes: Bytes of kept entries a position, of a policy in the first codec.
        seed: Of draws.
    """
    policies: list[AnyPolicy] = [own]
    policies += [TopKPolicy(kind="top_k", k=min(k, vocab)) for k in TOP_K]
    widest = min(TOP_P_MAX, vocab)
    policies += [TopPPolicy(kind="top_p", p=p, k_max=widest) for p in TOP_P]
    dense = own.kind == "dense"
    matched = TopKPolicy(kind="top_k", k=min(_REFERENCE_K, vocab)) if dense else own
    wanted = measure_bytes(matched)
    policies.append(
        match_bytes(
            lambda num: SampledPolicy(kind="sampled", num_samples=num, seed=seed),
            wanted,
            measure_bytes,
            (1, MAX_DRAWS),
        )
    )
    if vocab > 1:
        policies.append(
            match_bytes(
                lambda num: HybridPolicy(kind="hybrid", k=num // 2, m=num - num // 2, seed=seed),
                wanted,
                measure_bytes,
                (2, vocab),
            )
        )
    policies.append(DensePolicy())
    distinct = list(dict.fromkeys(policies))
    return tuple(
        Candidate(policy, codec, policy == own and codec == codecs[0])
        for codec in codecs
        for policy in distinct
    )


def match_bytes(
    make: Callable[[int], AnyPolicy],
    wanted: float,
    measure_bytes: Callable[[AnyPolicy], float],
    bounds: tuple[int, int],
) -> AnyPolicy:
    """Returns the policy whose bytes are nearest to what is wanted.

    Args:
        make: Makes the policy of a size; bytes do not fall with it, but for noise.
        wanted: Bytes a position.
        measure_bytes: Of a policy.
        bounds: The smallest and the largest size.
    """
    low, most = bounds
    high = low
    while high < most and measure_bytes(make(high)) < wanted:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if measure_bytes(make(middle)) < wanted:
            low = middle
        else:
            high = middle
    return min((make(low), make(high)), key=lambda policy: abs(measure_bytes(policy) - wanted))
