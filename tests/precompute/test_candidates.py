from __future__ import annotations

import pytest

from precompute.candidates import list_candidates, match_bytes
from schemas.policy import (
    AnyPolicy,
    DensePolicy,
    SampledPolicy,
    TopKPolicy,
    check_policy,
    most_kept,
)


def four_bytes_an_entry(policy: AnyPolicy) -> float:
    """Bytes of a fake codec; draws merge, as they do."""
    kept = most_kept(policy, 1000)
    return 6 * kept**0.9 if policy.kind == "sampled" else 4 * kept


def sampled(num: int) -> SampledPolicy:
    return SampledPolicy(kind="sampled", num_samples=num)


@pytest.mark.parametrize("vocab", [1, 2, 9, 50, 73, 49152])
@pytest.mark.parametrize("own", [TopKPolicy(kind="top_k", k=1), DensePolicy(), sampled(30)])
def test_the_recipes_own_comes_first_and_all_fit_the_vocabulary(vocab: int, own: AnyPolicy) -> None:
    found = list_candidates(own, ["packed", "compact"], vocab, four_bytes_an_entry)
    assert found[0].policy == own
    assert [one.is_recipe for one in found] == [True, *[False] * (len(found) - 1)]
    assert len({(one.policy, one.codec) for one in found}) == len(found)
    for one in found:
        check_policy(one.policy, vocab)
    kinds = [one.policy.kind for one in found if one.codec == "packed"]
    assert "dense" in kinds
    assert "top_k" in kinds
    assert [one.policy for one in found if one.codec == "compact"] == [
        one.policy for one in found if one.codec == "packed"
    ]


@pytest.mark.parametrize("wanted", [1, 200, 203, 4000])
def test_a_matched_policy_takes_as_many_bytes_as_it_can_be_made_to(wanted: int) -> None:
    found = match_bytes(sampled, wanted, four_bytes_an_entry, (1, 1000))
    best = min(
        (sampled(num) for num in range(1, 1001)), key=lambda one: abs(four_bytes_an_entry(one) - wanted)
    )
    assert found == best
