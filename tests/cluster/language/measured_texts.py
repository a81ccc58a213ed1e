"""Chunks and scores by hand, for the tests of measures, table and report of language models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from cluster.language.evaluated_text import EvaluatedText, OnBadRow
from cluster.language.measures import LanguageOutput, measure_models
from cluster.language.scoring import PositionScores
from precompute.language_forward import ChunkRows
from schemas.chunks import ChunkSpec
from schemas.kept_entries import offsets_of
from schemas.language_evaluation import LanguageRunEvaluation
from schemas.token_rows import TokenChunks

SPEC = ChunkSpec(objective="causal", tokenizer="0" * 64, max_length=512, add_special_tokens=False, vocab=1000)


def make_text(counts: Sequence[int], *, on_bad_row: OnBadRow = "fail", seed: int = 0) -> EvaluatedText:
    """Returns chunks with ``counts`` positions each: a first token, then targets."""
    lengths = np.array(counts) + 1
    offsets = offsets_of(lengths)
    ids = np.random.default_rng(seed).integers(0, SPEC.vocab, offsets[-1]).astype(np.int32)
    mask = np.ones(len(ids), np.uint8)
    mask[offsets[:-1]] = 0
    rows = ChunkRows(
        TokenChunks(ids, mask, offsets), tuple(f"dev/{i}#0" for i in range(len(counts))), 1, None
    )
    return EvaluatedText("dev", SPEC, rows, ids[mask == 1], offsets_of(np.array(counts)), "f", on_bad_row)


def make_scores(text: EvaluatedText, target_probs: Sequence[float], **changes: Any) -> PositionScores:
    """Returns scores with these probabilities of the targets; one with over half is the top."""
    probs_P = np.array(target_probs)
    is_top_P = probs_P > 0.5
    top_id_P = np.where(is_top_P, text.targets_P, (text.targets_P + 1) % SPEC.vocab)
    fields: dict[str, Any] = {
        "target_logprob_P": np.log(probs_P).astype(np.float32),
        "top_logprob_P": np.log(np.where(is_top_P, probs_P, 1 - probs_P)).astype(np.float32),
        "top_id_P": top_id_P.astype(np.int32),
        "is_finite_P": np.ones(len(probs_P), np.bool_),
        "num_parameters": 100,
    }
    return PositionScores(**(fields | changes))


@cache
def make_evaluation(
    *,
    teachers: tuple[str, ...] = ("large",),
    seeds: tuple[int, ...] = (1, 2, 3),
    arms: tuple[str, ...] = ("student", "plain", "top-k"),
    num_chunks: int = 150,
) -> LanguageRunEvaluation:
    """Returns a made-up run: teachers at a perplexity of about 12, students at 25 to 32."""
    rng = np.random.default_rng(0)
    text = make_text(rng.integers(20, 200, num_chunks))
    difficulty_P = rng.normal(0, 0.8, text.num_positions)

    def scores(nats: float, size: int, spread: float = 0.1) -> PositionScores:
        logits_P = difficulty_P * 4 + rng.normal(0, spread, len(difficulty_P)) - nats
        probs_P = 1 / (1 + np.exp(-logits_P))
        # The most probable token is the target, or another one that has some more.
        is_top_P = probs_P > 0.3
        others_P = probs_P + (1 - probs_P) * rng.beta(1, 5, len(probs_P))
        return make_scores(
            text,
            probs_P,
            top_logprob_P=np.log(np.where(is_top_P, probs_P, others_P)).astype(np.float32),
            top_id_P=np.where(is_top_P, text.targets_P, (text.targets_P + 1) % SPEC.vocab).astype(np.int32),
            num_parameters=size,
        )

    outputs = [LanguageOutput(name, "teacher", scores(2.0, 134_515_008)) for name in teachers]
    skills = {"student": 2.9, "plain": 3.2, "top-k": 3.0}
    for arm in arms:
        taught = () if arm == "plain" else teachers
        for seed in seeds:
            nats = skills.get(arm, 3.0) + rng.normal(0, 0.02)
            outputs.append(
                LanguageOutput(arm, "student", scores(nats, 59_402_304), seed=seed, teachers=taught)
            )
    corpus = measure_models(text, outputs, main_arm="student")
    corpus = corpus.model_copy(update={"notes": (*corpus.notes, "a note <b>of</b> the test")})
    return LanguageRunEvaluation(run="example", main_arm="student", corpora=(corpus,))
