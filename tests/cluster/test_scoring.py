"""Teachers from stores, students from their predictions, on the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.scoring import read_predictions, read_teacher, score_corpus
from distill.evaluate import evaluate_student
from schemas.errors import DataError
from tests.cluster.tiny_students import LABELS, finished, make_corpus, make_recipe, save_student

# Columns are (no, yes): the teacher is right on rows 0, 1 and 2 and wrong on row 3.
LOGITS = np.array([[0, 2], [3, 0], [1, 0], [5, 0], [0, 0]], np.float32)


def test_a_teachers_logits_come_in_the_corpuss_order_with_gaps_where_it_has_none(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, logits=LOGITS, excluded=(2,))
    logits, present = read_teacher(make_recipe(tmp_path), "t", corpus)
    assert present.tolist() == [True, True, False, True, True]
    assert logits.tolist() == [[2, 0], [0, 3], [0, 0], [0, 5], [0, 0]]


def test_rows_that_a_teacher_excluded_are_left_out_for_every_model(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, logits=LOGITS, excluded=(2,))
    student = finished(save_student(tmp_path / "student"))
    recipe = make_recipe(tmp_path)
    scored = score_corpus(recipe, corpus, [student], teacher_speeds={}, predictions=tmp_path / "p")
    assert (scored.num_rows, scored.num_excluded, scored.num_unlabelled) == (3, 1, 1)
    teacher, ours = scored.models
    assert teacher.accuracy == pytest.approx(2 / 3)
    probabilities = evaluate_student(student.directory, [corpus.parts[0].rows], LABELS).probabilities_NC
    assert ours.accuracy == pytest.approx((probabilities.argmax(1)[[0, 1, 3]] == [0, 1, 0]).mean())
    # Question a has both its rows; question b has lost its irrelevant one and the third is unlabelled.
    assert teacher.ranking is not None
    assert (teacher.ranking.num_questions, teacher.ranking.mrr) == (1, 1.0)


def test_a_student_reads_an_evaluation_corpus_once(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    student = finished(save_student(tmp_path / "student"))
    first = read_predictions(student, corpus, tmp_path / "p")
    gone = replace(student, directory=tmp_path / "gone")
    assert np.array_equal(read_predictions(gone, corpus, tmp_path / "p"), first)


@pytest.mark.parametrize("what", ["student", "labels", "rows"])
def test_kept_predictions_are_not_taken_for_those_of_another(tmp_path: Path, what: str) -> None:
    corpus = make_corpus(tmp_path)
    student = finished(save_student(tmp_path / "student"))
    first = read_predictions(student, corpus, tmp_path / "p")
    if what == "student":
        save_student(tmp_path / "student", seed=2)
        second = read_predictions(replace(student, fingerprint="g"), corpus, tmp_path / "p")
        assert not np.array_equal(second, first)
    elif what == "labels":
        turned = corpus.corpus.model_copy(update={"labels": LABELS[::-1]})
        second = read_predictions(student, replace(corpus, corpus=turned), tmp_path / "p")
        assert np.array_equal(second, first[:, ::-1])
    else:
        twice = replace(corpus, parts=(*corpus.parts, *corpus.parts))
        assert len(read_predictions(student, twice, tmp_path / "p")) == 2 * len(first)


def test_damaged_predictions_are_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    student = finished(save_student(tmp_path / "student"))
    read_predictions(student, corpus, tmp_path / "p")
    (path,) = (tmp_path / "p").rglob("*.npy")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=path.name):
        read_predictions(student, corpus, tmp_path / "p")
