"""``evaluation.json`` of a language run: what its models say of the tokens of the evaluation corpora.

All shares (accuracy, ECE, agreement) lie in 0..1; negative log-likelihoods are in nats per position. A
position is a token that a model has to predict: the next one (causal) or a hidden one (masked).

Invariants (tests/schemas/test_language_evaluation.py):
    1. The document carries its own digest and survives a round trip.
    2. Its field ``task`` tells it from a classifier's, and each is read as what it is.
    3. NaN and infinities are not representable: a measure that is undefined is None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from schemas.evaluation import (
    Interval,
    NumRows,
    ReliabilityBin,
    RunEvaluation,
    Share,
    load_evaluation,
    parse_evaluation,
)
from schemas.fields import Count, Frozen
from schemas.language import Objective

_Spread = Annotated[float, Field(ge=0)] | None


class LanguageModelRow(Frozen):
    """One row of the table: a model, or the mean over an arm's seeds.

    Attributes:
        name: Unique within the corpus: a teacher's name, an arm's, or ``<arm>/seed-17``. An arm with the
            name of a teacher has ``student `` before it.
        arm: None for teachers.
        teachers: Of a student: those that it learnt from; none: it saw the text alone.
        seeds: Empty for teachers; one for a single model; all of them for a mean row.
        level: 0 for a teacher and an arm as a whole, 1 for one of the seeds of an arm with several.
        nll: Mean negative log-likelihood of the tokens; None where a token has no probability at all.
        perplexity: ``exp(nll)``, for a mean row the mean of the seeds' perplexities; None where a float
            does not hold it.
        perplexity_interval: Bootstrap over chunks; over chunks and seeds where there are several seeds.
        nll_std, perplexity_std, accuracy_std, ece_std: Sample standard deviation over seeds; None for
            fewer than two.
        accuracy: Share of positions whose most probable token is the right one.
        ece: Expected calibration error, 15 equal-width bins of the top probability.
        agreement: From teacher to the share of positions with the same most probable token.
        num_parameters: Tied weights are counted once.
        reliability: 15 bins of positions; pooled over the models of a mean row.
    """

    name: str
    kind: Literal["teacher", "student"]
    arm: str | None = None
    teachers: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    level: Literal[0, 1] = 0
    nll: Annotated[float, Field(ge=0)] | None
    nll_std: _Spread = None
    perplexity: Annotated[float, Field(ge=1)] | None
    perplexity_interval: Interval | None
    perplexity_std: _Spread = None
    accuracy: Share
    accuracy_std: _Spread = None
    ece: Share
    ece_std: _Spread = None
    agreement: dict[str, Share] = Field(default_factory=dict)
    num_parameters: NumRows
    reliability: tuple[ReliabilityBin, ...]


class SeedDifference(Frozen):
    """Two students of one seed.

    Attributes:
        difference: Mean negative log-likelihood of the student minus that of the baseline.
    """

    seed: int
    difference: float


class NllComparison(Frozen):
    """An arm against another one, over the seeds that both have; below 0 the student is the better one.

    Attributes:
        student, baseline: Names of rows.
        is_main: Whether one of them is the run's own student.
        mean_difference: Of the mean negative log-likelihood in nats, over seeds; ``exp`` of it is the
            ratio of perplexities.
        interval: Bootstrap over chunks and seeds, both models on the same resampled chunks.
    """

    student: str
    baseline: str
    is_main: bool
    seeds: Annotated[tuple[SeedDifference, ...], Field(min_length=1)]
    mean_difference: float
    interval: Interval


class LanguageCorpusEvaluation(Frozen):
    """All models on the chunks of one corpus.

    Attributes:
        num_chunks, num_positions: What counts.
        num_excluded: Chunks for which some model gave logits that are not numbers: left out for all.
        max_length: Most tokens of a chunk: a model sees no further back.
        comparisons: The run's own student first.
        notes: What a reader of the numbers must know.
    """

    corpus: str
    num_chunks: Count
    num_positions: Count
    num_excluded: NumRows = 0
    max_length: Count
    models: Annotated[tuple[LanguageModelRow, ...], Field(min_length=1)]
    comparisons: tuple[NllComparison, ...] = ()
    notes: tuple[str, ...] = ()


class LanguageRunEvaluation(Frozen):
    """The whole document.

    Attributes:
        run: Name of the run.
        main_arm: The arm of the run's own student.
        corpora: The first is the main one.
    """

    task: Literal["language"] = "language"
    format: Literal["1.0"] = "1.0"
    run: str
    objective: Objective = "causal"
    main_arm: str | None = None
    corpora: tuple[LanguageCorpusEvaluation, ...]


AnyEvaluation: TypeAlias = RunEvaluation | LanguageRunEvaluation


def read_any_evaluation(path: Path) -> AnyEvaluation:
    """Reads ``evaluation.json`` of a run of either task; without ``task`` it is a classifier's.

    Raises:
        DataError: The file is missing, malformed, or does not match its digest.
    """
    document = load_evaluation(path)
    if document.get("task") == "language":
        return parse_evaluation(document, LanguageRunEvaluation, path)
    return parse_evaluation(document, RunEvaluation, path)
