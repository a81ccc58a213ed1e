"""Scores against the plain model's logits in float64, and what is kept of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from cluster.language import scoring
from cluster.language.evaluated_text import EvaluatedText
from cluster.language.measures import LanguageOutput, measure_models
from cluster.language.scoring import ModelSource, PositionScores, read_scores
from precompute.language_teacher import LoadedLanguageModel
from schemas.errors import DataError, TeacherError
from schemas.language import Objective
from tests.precompute.tiny_language import (
    VOCAB,
    chunk_corpus,
    make_corpus,
    make_documents,
    make_teacher,
    save_tiny_llama,
    save_tiny_masked,
    write_corpus,
)


def open_text(root: Path, model: Path, objective: Objective = "causal", **fields: Any) -> EvaluatedText:
    rows = [{"text": text} for text in make_documents(12)]
    corpus = make_corpus(write_corpus(root / "dev.jsonl", rows), **fields)
    return EvaluatedText.open("dev", chunk_corpus(corpus, model, root / "runs", objective))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scores")
    save_tiny_llama(root / "llama")
    save_tiny_masked(root / "bert")
    return root


@pytest.fixture(scope="module")
def text(root: Path) -> EvaluatedText:
    return open_text(root, root / "llama")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded."""
    names: list[str] = []
    original = LoadedLanguageModel.load

    def load(spec: Any) -> LoadedLanguageModel:
        names.append(spec.model_path)
        return original(spec)

    monkeypatch.setattr(scoring.LoadedLanguageModel, "load", load)
    return names


def score(
    source: ModelSource, text: EvaluatedText, directory: Path, cache: Path | None = None
) -> PositionScores:
    return read_scores(source, [text], directory, cache or directory / "weights.json")[0]


def plain_log_probs(text: EvaluatedText, path: Path, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns float64 log-probabilities over the true vocabulary where targets are predicted, and targets.

    Each chunk goes through plain transformers by itself; ``shift`` is how far before its token a target is
    predicted.
    """
    kind = AutoModelForCausalLM if text.spec.objective == "causal" else AutoModelForMaskedLM
    model = kind.from_pretrained(path).double().eval()
    chunks, found, targets = text.rows.chunks, [], []
    for start, stop in zip(chunks.offsets[:-1], chunks.offsets[1:], strict=True):
        ids_T, mask_T = chunks.input_ids[start:stop].astype(np.int64), chunks.loss_mask[start:stop]
        seen_T = ids_T.copy()
        if text.spec.mask is not None:
            seen_T[mask_T == 1] = text.spec.mask.token
        with torch.no_grad():
            logits_TW = model(torch.from_numpy(seen_T)[None]).logits[0]
        log_probs_TV = logits_TW[:, :VOCAB].log_softmax(-1).numpy()
        found.append(log_probs_TV[np.flatnonzero(mask_T) - shift])
        targets.append(ids_T[mask_T == 1])
    return np.concatenate(found), np.concatenate(targets)


def ece_of(log_probs_PV: np.ndarray, targets_P: np.ndarray) -> float:
    """Guo et al., equation 3, bin by bin."""
    confidence_P, hit_P = np.exp(log_probs_PV.max(1)), log_probs_PV.argmax(1) == targets_P
    total = 0.0
    for place in range(15):
        inside = (confidence_P > place / 15) & (confidence_P <= (place + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(confidence_P[inside].mean() - hit_P[inside].mean())
    return total


@pytest.mark.parametrize(("name", "objective", "shift"), [("llama", "causal", 1), ("bert", "masked", 0)])
def test_measures_are_those_of_the_plain_models_logits_in_float64(
    root: Path, tmp_path: Path, name: str, objective: Objective, shift: int
) -> None:
    text = open_text(root, root / name, objective)
    scores = score(ModelSource.of_directory("a/seed-1", root / name), text, tmp_path)
    log_probs_PV, targets_P = plain_log_probs(text, root / name, shift)
    assert np.array_equal(text.targets_P, targets_P)
    expected_P = log_probs_PV[np.arange(len(targets_P)), targets_P]
    np.testing.assert_allclose(scores.target_logprob_P, expected_P, atol=3e-5)
    assert np.array_equal(scores.top_id_P, log_probs_PV.argmax(1))
    np.testing.assert_allclose(scores.top_logprob_P, log_probs_PV.max(1), atol=3e-5)
    (row,) = measure_models(text, [LanguageOutput(name, "teacher", scores)]).models
    assert row.perplexity == pytest.approx(math.exp(-expected_P.mean()), rel=1e-5)
    assert row.accuracy == pytest.approx(float((log_probs_PV.argmax(1) == targets_P).mean()))
    assert row.ece == pytest.approx(ece_of(log_probs_PV, targets_P), abs=1e-5)
    # One position off, the same model has another perplexity: the check above can see it.
    off_PV, _ = plain_log_probs(text, root / name, 1 - shift)
    off = math.exp(-off_PV[np.arange(len(targets_P)), targets_P].mean())
    assert abs(off - math.exp(-expected_P.mean())) > 1


def test_a_model_is_measured_once(root: Path, tmp_path: Path, text: EvaluatedText, loads: list[str]) -> None:
    source = ModelSource.of_teacher(make_teacher(root / "llama", name="t"), str(root / "llama"), None)
    heard: list[int] = []
    first = read_scores(source, [text], tmp_path, tmp_path / "weights.json", heard.append)[0]
    assert sum(heard) == len(text.rows.example_ids)
    again = read_scores(source, [text], tmp_path, tmp_path / "weights.json", heard.append)[0]
    assert loads == [str(root / "llama")]
    assert sum(heard) == len(text.rows.example_ids)
    for name in ("target_logprob_P", "top_logprob_P", "top_id_P", "is_finite_P"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    assert first.num_parameters == again.num_parameters == model.num_parameters()


def test_what_is_kept_of_a_teacher_changes_no_score(
    root: Path, tmp_path: Path, text: EvaluatedText, loads: list[str]
) -> None:
    for fields in ({}, {"keep": {"kind": "dense"}, "codec": "compact", "temperatures": [2.0]}):
        teacher = make_teacher(root / "llama", name="t", **fields)
        score(ModelSource.of_teacher(teacher, str(root / "llama"), None), text, tmp_path)
    assert len(loads) == 1


def test_other_weights_other_chunks_and_another_dtype_are_measured_anew(
    root: Path, tmp_path: Path, text: EvaluatedText, loads: list[str]
) -> None:
    cache = tmp_path / "weights.json"
    other = save_tiny_llama(tmp_path / "other", seed=5)
    first = score(ModelSource.of_directory("a/seed-1", root / "llama"), text, tmp_path, cache)
    second = score(ModelSource.of_directory("a/seed-1", other), text, tmp_path, cache)
    assert not np.array_equal(first.target_logprob_P, second.target_logprob_P)
    shorter = open_text(root, root / "llama", max_length=12)
    score(ModelSource.of_directory("a/seed-1", root / "llama"), shorter, tmp_path, cache)
    half = make_teacher(root / "llama", dtype="bfloat16")
    source = ModelSource("a/seed-1", half, str(root / "llama"))
    score(source, text, tmp_path, cache)
    assert len(loads) == 4


def test_a_model_is_loaded_once_for_all_corpora(
    root: Path, tmp_path: Path, text: EvaluatedText, loads: list[str]
) -> None:
    other = replace(text, corpus="other", fingerprint="other")
    source = ModelSource.of_directory("a/seed-1", root / "llama")
    first, second = read_scores(source, [text, other], tmp_path, tmp_path / "weights.json")
    assert np.array_equal(first.top_id_P, second.top_id_P)
    assert len(loads) == 1


def test_kept_scores_that_were_damaged_are_an_error_that_says_what_to_do(
    root: Path, tmp_path: Path, text: EvaluatedText
) -> None:
    source = ModelSource.of_directory("a/seed-1", root / "llama")
    score(source, text, tmp_path)
    (path,) = tmp_path.glob("a/seed-1/dev-*.npz")
    whole = path.read_bytes()
    for data in (b"", whole[:100], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"dev-.*\.npz: cannot be read .* delete it"):
            score(source, text, tmp_path)
    np.savez(path, **{name: np.zeros(3, dtype) for name, dtype in scoring._DTYPES.items()})
    with pytest.raises(DataError, match="another form"):
        score(source, text, tmp_path)


def test_errors_call_a_teacher_by_its_name_and_a_student_by_its_directory(
    root: Path, tmp_path: Path, text: EvaluatedText
) -> None:
    long = open_text(root, root / "llama", max_length=65)
    teacher = ModelSource.of_teacher(make_teacher(root / "llama", name="t"), str(root / "llama"), None)
    with pytest.raises(TeacherError, match=r"^teacher t: max_length is 65, the model has 64 positions"):
        score(teacher, long, tmp_path)
    with pytest.raises(DataError, match=r"/llama: max_length is 65, the model has 64 positions"):
        score(ModelSource.of_directory("a/seed-1", root / "llama"), long, tmp_path)
    broken = save_tiny_llama(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(DataError, match=r"^/.*/broken: cannot be loaded: "):
        score(ModelSource.of_directory("a/seed-1", broken), text, tmp_path)


def test_chunks_that_are_not_as_planned_are_refused(root: Path, tmp_path: Path) -> None:
    rows = [{"text": text} for text in make_documents(3)]
    path = write_corpus(tmp_path / "dev.jsonl", rows)
    (first,) = chunk_corpus(make_corpus(path), root / "llama", tmp_path / "a")
    (second,) = chunk_corpus(make_corpus(path, max_length=12), root / "llama", tmp_path / "b")
    with pytest.raises(DataError, match="made in another way than planned"):
        EvaluatedText.open("dev", [first, second])
