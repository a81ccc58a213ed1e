from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from schemas.errors import RecipeError
from schemas.policy import POLICY_ADAPTER, HybridPolicy, SampledPolicy, TopPPolicy, check_policy, most_kept
from tests.schemas.kept_examples import POLICIES


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_reads_back_from_its_own_json(kind: str) -> None:
    policy = POLICIES[kind]
    assert POLICY_ADAPTER.validate_json(POLICY_ADAPTER.dump_json(policy)) == policy


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "top_n", "k": 3},
        {"kind": "top_k"},
        {"kind": "top_k", "k": 0},
        {"kind": "top_p", "p": 0, "k_max": 3},
        {"kind": "top_p", "p": 0.5, "k_min": 4, "k_max": 3},
        {"kind": "sampled", "num_samples": 65536},
        {"kind": "sampled", "num_samples": 3, "tau": 0},
        {"kind": "hybrid", "k": 3, "m": 0},
        {"kind": "dense", "k": 3},
    ],
)
def test_a_policy_that_means_nothing_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        POLICY_ADAPTER.validate_python(document)


@pytest.mark.parametrize(
    ("kind", "vocab", "message"),
    [
        ("top_k", 4, "keep: k is 5, above the vocabulary of 4 tokens"),
        ("top_p", 8, "keep: k_max is 9, above the vocabulary of 8 tokens"),
        ("hybrid", 6, "keep: k + m is 7, above the vocabulary of 6 tokens"),
        ("dense", 0, "not 0"),
        ("dense", 2**31 + 1, "not 2147483649"),
    ],
)
def test_a_policy_above_the_vocabulary_is_an_error_in_one_line(kind: str, vocab: int, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        check_policy(POLICIES[kind], vocab)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_more_draws_than_tokens_are_fine() -> None:
    check_policy(POLICIES["sampled"], 3)
    assert most_kept(POLICIES["sampled"], 3) == 3


def test_the_most_entries_of_a_position() -> None:
    assert most_kept(POLICIES["dense"], 100) == 100
    assert most_kept(TopPPolicy(kind="top_p", p=1.0, k_max=12), 100) == 12
    assert most_kept(SampledPolicy(kind="sampled", num_samples=50), 100) == 50
    assert most_kept(HybridPolicy(kind="hybrid", k=12, m=8), 100) == 20
