"""``evaluation.json`` of language runs: the round trip, damage, and which task it is of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from schemas.digest import encode_document
from schemas.errors import DataError
from schemas.evaluation import RunEvaluation, read_evaluation, write_evaluation
from schemas.language_evaluation import LanguageModelRow, LanguageRunEvaluation, read_any_evaluation
from tests.cluster.language.measured_texts import make_evaluation


def test_the_document_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(path, make_evaluation())
    assert read_any_evaluation(path) == make_evaluation()
    assert json.loads(path.read_text())["task"] == "language"


def test_each_task_is_read_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    classification = RunEvaluation(run="r", corpora=())
    write_evaluation(path, classification)
    assert read_any_evaluation(path) == classification
    write_evaluation(path, LanguageRunEvaluation(run="r", corpora=()))
    assert isinstance(read_any_evaluation(path), LanguageRunEvaluation)
    with pytest.raises(DataError, match="Extra inputs are not permitted"):
        read_evaluation(path)


def test_a_changed_or_absent_document_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    with pytest.raises(DataError, match="cannot be read"):
        read_any_evaluation(path)
    write_evaluation(path, make_evaluation())
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(DataError, match="does not match its own digest"):
        read_any_evaluation(path)
    path.write_bytes(encode_document({"task": "language", "run": "r"}))
    with pytest.raises(DataError, match=r"corpora: Field required"):
        read_any_evaluation(path)


def test_infinities_are_not_representable() -> None:
    fields = make_evaluation().corpora[0].models[0].model_dump()
    for name in ("nll", "perplexity"):
        with pytest.raises(ValidationError):
            LanguageModelRow.model_validate({**fields, name: float("inf")})
        assert LanguageModelRow.model_validate({**fields, name: None})
