"""Lexical retrieval: questions paired with the passages that rank highest for them by BM25.

Invariants (tests/precompute/test_retrieval.py):
    1. The ranking is that of the formula in ``retrieve_pairs``, in float64; ties go to the earlier row.
    2. No pair of the source comes back, and no passage that shares no word with its question.
    3. The same texts give the same pairs, bit for bit. One thread works, whatever the machine has.

Memory holds the postings and the scores of one question at a time, never all questions times all passages.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import ResourceError

_K1 = 1.5
_B = 0.75


@dataclass(frozen=True, slots=True)
class RetrievedPairs:
    """Pairs in order of their questions' first rows, each question's best first.

    Attributes:
        question_rows: Row in which the question first stands, ``[P]``, ascending.
        passage_rows: Row in which the passage first stands, ``[P]``.
        scores: BM25 scores, float64, above 0, ``[P]``.
    """

    question_rows: npt.NDArray[np.int64]
    passage_rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Distinct:
    """The distinct values of a column, numbered by first appearance."""

    texts: list[str]
    first_rows: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]

    @classmethod
    def of(cls, column: Sequence[str]) -> _Distinct:
        known: dict[str, int] = {}
        numbers = np.array([known.setdefault(text, len(known)) for text in column], np.int64)
        return cls(list(known), np.unique(numbers, return_index=True)[1], numbers)


def retrieve_pairs(questions: Sequence[str], passages: Sequence[str], top: int) -> RetrievedPairs:
    """Pairs each distinct question with its best passages among those it does not stand beside.

    The score of passage d for question q is the sum, over the words w of q with their repetitions, of
    ``ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 (1 - b + b |d| / mean |d|))`` with k1 = 1.5,
    b = 0.75, N distinct passages of which df hold w, and tf times w in d. Words are runs of two or more
    letters, digits and underscores, in lower case, less some 30 English stop words; they are not stemmed.
    So a language that is written without spaces is not cut into words.

    Source: the Lucene variant ("accurate") in Kamphuis et al., ECIR 2020, as bm25s has it (Lù, 2024,
    arXiv:2407.03618); Lucene's own 8-bit document lengths are not imitated.

    Args:
        questions: Of each row of the source, ``[R]``.
        passages: The rows' passages, ``[R]``.
        top: Passages of each question, at most.

    Raises:
        ResourceError: bm25s is not installed.
    """
    bm25s = _import_bm25s()
    asked, found = _Distinct.of(questions), _Distinct.of(passages)
    words = bm25s.tokenize(found.texts, stopwords="english", show_progress=False)
    if not words.vocab:
        return _join(asked, found, [])
    # The numpy backend: what is installed besides must not change the result.
    index = bm25s.BM25(method="lucene", k1=_K1, b=_B, dtype="float64", backend="numpy", csc_backend="numpy")
    index.index(words, create_empty_token=False, show_progress=False)
    asked_words = bm25s.tokenize(asked.texts, stopwords="english", return_ids=False, show_progress=False)
    best = []
    for words_of_question, own in zip(asked_words, _passages_of_questions(asked, found), strict=True):
        scores_N = index.get_scores_from_ids(index.get_tokens_ids(words_of_question))
        scores_N[own] = 0.0
        best.append(_select_top(scores_N, top))
    return _join(asked, found, best)


def _passages_of_questions(asked: _Distinct, found: _Distinct) -> list[npt.NDArray[np.int64]]:
    """Returns the numbers of the passages that stand beside each question."""
    order = np.argsort(asked.numbers, kind="stable")
    bounds = np.searchsorted(asked.numbers[order], np.arange(1, len(asked.texts)))
    return np.split(found.numbers[order], bounds)


def _select_top(
    scores_N: npt.NDArray[np.float64], top: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Returns the best passages with a score above 0, and their scores; ties by number."""
    passages = np.flatnonzero(scores_N > 0)
    scores = scores_N[passages]
    if len(passages) > top:
        # All that tie with the last one stay until the stable sort: a partition alone picks any of them.
        candidates = scores >= np.partition(scores, -top)[-top]
        passages, scores = passages[candidates], scores[candidates]
    order = np.argsort(-scores, kind="stable")[:top]
    return passages[order], scores[order]


def _join(
    asked: _Distinct,
    found: _Distinct,
    best: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]],
) -> RetrievedPairs:
    if not best:
        return RetrievedPairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    question_numbers = np.repeat(np.arange(len(best)), [len(passages) for passages, _ in best])
    return RetrievedPairs(
        asked.first_rows[question_numbers],
        found.first_rows[np.concatenate([passages for passages, _ in best])],
        np.concatenate([scores for _, scores in best]),
    )


def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ResourceError(
            "a corpus part of kind retrieved needs the package bm25s: pip install '.[retrieval]'"
        ) from error
    # It sets its logger to DEBUG, and so reaches every handler of the root logger.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
