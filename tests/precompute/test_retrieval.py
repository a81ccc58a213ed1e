"""Lexical retrieval against an independent BM25 in float64."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections import Counter

import numpy as np
import pytest

from precompute.retrieval import RetrievedPairs, retrieve_pairs
from schemas.errors import ResourceError

# bm25s's stop words that occur below.
_STOP_WORDS = {"is", "the", "of", "in", "and", "on"}

ROWS = [
    ("Where is the red fox?", "The red fox sleeps in the den, a red den."),
    ("Where is the red fox?", "A grey wolf hunts at night."),
    ("Which wolf hunts the fox?", "No fox hunts the grey wolf; the wolf hunts the fox, and the fox sleeps."),
    ("Who sleeps at night?", "Owls hunt at night and the moon sleeps."),
    ("Is night red?", "The red fox sleeps in the den, a red den."),
    ("Xylophone of glass", "Snow fell on the den."),
    ("FOX fox den night", "Night. Night. Night. Red night."),
]


def retrieve(rows: list[tuple[str, str]], top: int) -> RetrievedPairs:
    return retrieve_pairs([row[0] for row in rows], [row[1] for row in rows], top)


def as_list(pairs: RetrievedPairs) -> list[tuple[int, int]]:
    return list(zip(pairs.question_rows.tolist(), pairs.passage_rows.tolist(), strict=True))


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"\w{2,}", text.lower()) if word not in _STOP_WORDS | {"at", "no"}]


def reference(rows: list[tuple[str, str]], top: int) -> list[tuple[int, int, float]]:
    """Lucene's BM25 (Kamphuis et al., ECIR 2020, table 1), one sum at a time, in Python's floats."""
    first_rows: dict[str, int] = {}
    for row, (_, passage) in enumerate(rows):
        first_rows.setdefault(passage, row)
    bags = {row: Counter(words_of(passage)) for passage, row in first_rows.items()}
    mean_length = sum(bag.total() for bag in bags.values()) / len(bags)
    found = []
    seen: dict[str, int] = {}
    for row, (question, _) in enumerate(rows):
        seen.setdefault(question, row)
    for question, question_row in seen.items():
        scored = []
        for passage_row, bag in bags.items():
            score = 0.0
            for word in words_of(question):
                df = sum(word in other for other in bags.values())
                idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
                length = bag.total() / mean_length
                score += idf * bag[word] / (bag[word] + 1.5 * (1 - 0.75 + 0.75 * length))
            if score > 0 and (question, rows[passage_row][1]) not in rows:
                scored.append((-score, passage_row))
        found += [(question_row, passage_row, -score) for score, passage_row in sorted(scored)[:top]]
    return found


@pytest.mark.parametrize("top", [1, 2, 3, 100])
def test_the_ranking_is_that_of_an_independent_bm25(top: int) -> None:
    pairs = retrieve(ROWS, top)
    expected = reference(ROWS, top)
    assert as_list(pairs) == [(question, passage) for question, passage, _ in expected]
    np.testing.assert_allclose(pairs.scores, [score for *_, score in expected], rtol=1e-12)
    assert pairs.scores.dtype == np.float64


def test_a_score_is_the_one_worked_out_by_hand() -> None:
    pairs = retrieve([("apple", "zebra zebra"), ("pear", "apple tree"), ("fig", "apple apple apple tree")], 2)
    # N = 3, df = 2: ln(1 + 1.5 / 2.5) = 0.4700036; lengths 2, 2, 4, mean 8/3.
    # Row 2: 3 / (3 + 1.5 (0.25 + 0.75 * 1.5)) = 3 / 5.0625.
    # Row 1: 1 / (1 + 1.5 (0.25 + 0.75 * 0.75)) = 1 / 2.21875.
    assert as_list(pairs) == [(0, 2), (0, 1)]
    np.testing.assert_allclose(pairs.scores, [0.4700036 * 3 / 5.0625, 0.4700036 / 2.21875], rtol=1e-6)


def test_no_pair_of_the_source_comes_back_and_the_next_best_takes_its_place() -> None:
    rows = [
        ("fox", "fox fox fox"),
        ("fox", "fox fox tail"),
        ("owl", "fox tail"),
        ("cat", "tail fox log wood"),
    ]
    assert as_list(retrieve(rows, 1)) == [(0, 2)]
    assert as_list(retrieve(rows, 9)) == [(0, 2), (0, 3)]


def test_each_question_and_passage_counts_once_and_by_its_first_row() -> None:
    rows = [
        ("a fox", "an owl"),
        ("an owl", "a fox"),
        ("an owl", "a fox"),
        ("a fox", "an owl"),
        ("x1", "big owl"),
    ]
    assert as_list(retrieve(rows, 5)) == [(0, 1), (1, 0), (1, 4)]


def test_ties_go_to_the_earlier_row_even_at_the_cut() -> None:
    words = [f"w{i:03}" for i in range(200)]
    rows = [("fox", "none here"), *((word, f"fox {word}") for word in words)]
    pairs = retrieve(rows, 7)
    assert as_list(pairs)[:7] == [(0, row) for row in range(1, 8)]
    assert len(set(pairs.scores[:7].tolist())) == 1


def test_passages_that_share_no_word_are_not_paired() -> None:
    assert as_list(retrieve([("xylophone", "owl"), ("the of", "fox"), ("", "")], 3)) == []


@pytest.mark.parametrize("rows", [[], [("fox", "")], [("fox", "the of")], [("", "fox"), ("?", "owl")]])
def test_texts_without_words_give_no_pairs(rows: list[tuple[str, str]]) -> None:
    assert as_list(retrieve(rows, 3)) == []


def test_nothing_is_printed_or_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        retrieve(ROWS, 2)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(
        ResourceError, match=r"needs the package bm25s: pip install '\.\[retrieval\]'$"
    ) as caught:
        retrieve(ROWS, 2)
    assert "\n" not in str(caught.value)
