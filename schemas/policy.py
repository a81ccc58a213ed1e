"""Keep policies: which entries of a teacher's distribution a store keeps.

Classification stores are ``dense``; language models may use any of them.

Invariants:
    1. A policy that a vocabulary cannot satisfy is refused in one line (tests/schemas/test_policy.py).
    2. A policy reads back from its own JSON as itself (tests/schemas/test_policy.py).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias, assert_never

from pydantic import Field, TypeAdapter, model_validator

from schemas.errors import RecipeError
from schemas.fields import Count, Frozen

MAX_DRAWS = 65535
# Token ids are int32 wherever they are decoded.
MAX_VOCAB = 2**31
_Seed = Annotated[int, Field(ge=0, lt=2**63)]


class DensePolicy(Frozen):
    """Keeps every entry; the only policy for classification, whose logits are kept raw."""

    kind: Literal["dense"] = "dense"


class TopKPolicy(Frozen):
    """Keeps the ``k`` largest entries; of equal ones, those with lower ids."""

    kind: Literal["top_k"]
    k: Count


class TopPPolicy(Frozen):
    """Keeps the fewest entries, largest first, with a mass of ``p`` or more: ``k_min`` to ``k_max``."""

    kind: Literal["top_p"]
    p: Annotated[float, Field(gt=0, le=1)]
    k_min: Count = 1
    k_max: Count

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min is {self.k_min}, above k_max, which is {self.k_max}")
        return self


class SampledPolicy(Frozen):
    """Keeps the distinct ids of ``num_samples`` draws, with replacement, from q proportional to ``p^tau``.

    Each carries the mass ``count / (num_samples q) p``: the sum of mass times f is an unbiased estimate
    of ``sum_v p_v f(v)``.

    Source: Anshumann et al., ACL 2025, arXiv:2503.16870, "Sparse Logit Sampling".
    """

    kind: Literal["sampled"]
    num_samples: Annotated[int, Field(ge=1, le=MAX_DRAWS)]
    tau: Annotated[float, Field(gt=0, le=4)] = 1.0
    seed: _Seed = 0


class HybridPolicy(Frozen):
    """Keeps the ``k`` largest entries exactly, and ``m`` further ids that stand for all of the rest.

    The tail is a systematic sample with inclusion probability ``min(1, p_v / c)``, c such that it has m
    ids. Those that are certain (p_v >= c) join the exact head; each of the others carries the mass c in
    place of p_v, so that sums linear in p are unbiased (Horvitz and Thompson 1952).
    """

    kind: Literal["hybrid"]
    k: Count
    m: Count
    seed: _Seed = 0


AnyPolicy: TypeAlias = DensePolicy | TopKPolicy | TopPPolicy | SampledPolicy | HybridPolicy
KeepPolicy: TypeAlias = Annotated[AnyPolicy, Field(discriminator="kind")]
POLICY_ADAPTER: TypeAdapter[AnyPolicy] = TypeAdapter(KeepPolicy)


def most_kept(policy: AnyPolicy, vocab: int) -> int:
    """Returns the largest number of entries that a position can keep under a policy.

    Args:
        policy: Any policy.
        vocab: V, the true vocabulary.
    """
    match policy:
        case DensePolicy():
            return vocab
        case TopKPolicy():
            return policy.k
        case TopPPolicy():
            return policy.k_max
        case SampledPolicy():
            return min(policy.num_samples, vocab)
        case HybridPolicy():
            return policy.k + policy.m
        case _:
            assert_never(policy)


def check_policy(policy: AnyPolicy, vocab: int, *, field: str = "keep") -> None:
    """Checks that a policy can be carried out over a vocabulary.

    Args:
        policy: Any policy.
        vocab: V, the true vocabulary.
        field: Path of the policy in the recipe, for the message.

    Raises:
        RecipeError: It keeps more entries than there are, or there is no such vocabulary.
    """
    if not 1 <= vocab <= MAX_VOCAB:
        raise RecipeError(f"a vocabulary has 1 to {MAX_VOCAB} tokens, not {vocab}", field=field)
    kept = most_kept(policy, vocab)
    if kept > vocab:
        names = {"top_k": "k", "top_p": "k_max", "hybrid": "k + m"}
        name = names.get(policy.kind, "kept")
        raise RecipeError(f"{name} is {kept}, above the vocabulary of {vocab} tokens; lower it", field=field)
