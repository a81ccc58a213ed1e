"""Assembles ``evaluation.json``'s rows from every model's probabilities on one corpus.

Legend of shapes: N rows, C labels, B bootstrap resamples, S seeds.

Invariants:
    1. Every model is scored on the same rows: those with a golden label (tests/cluster/test_evaluation.py).
    2. Assembly is a pure function: no clock, no file, fixed bootstrap seeds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Literal

import numpy as np

from cluster.model_outputs import EvaluatedRows, ModelOutput, add_averages, check_outputs
from cluster.resampling import interval_of
from cluster.scored_models import ScoredModel, average_row, score_models
from distill.metrics import agreement, compare_correctness
from schemas.errors import DataError
from schemas.evaluation import (
    AgreementMatrix,
    Comparison,
    CorpusEvaluation,
    ModelRow,
    Over,
    SeedComparison,
)
from schemas.recipe import Arm, Corpus, HubPart

SMALL_SET_ROWS = 1000
# Labelled rows of public validation splits, to say so where a file holds only some of them.
_PUBLIC_ROWS = {
    ("nyu-mll/glue", "rte", "validation"): 277,
    ("nyu-mll/glue", "qnli", "validation"): 5463,
    ("nyu-mll/glue", "mnli", "validation_matched"): 9815,
    ("nyu-mll/glue", "mnli", "validation_mismatched"): 9832,
    ("stanfordnlp/snli", None, "validation"): 9842,
}


def evaluate_models(
    rows: EvaluatedRows,
    outputs: Sequence[ModelOutput],
    *,
    main_arm: Arm | None = None,
    notes: Sequence[str] = (),
) -> CorpusEvaluation:
    """Scores all models on one corpus; adds the teachers' ensemble and m-o-m.

    Args:
        rows: Golden labels and, for ranking, questions.
        outputs: Teachers in the recipe's order, then students; at least one.
        main_arm: The arm whose comparison with ``golden`` is marked as the main one.
        notes: Further notes, such as ``note_partial_split`` gives.

    Raises:
        DataError: No row is labelled, no model is given, or a model's probabilities do not fit.
    """
    check_outputs(rows, outputs)
    labelled_N = rows.golden_N >= 0
    if not labelled_N.any() or not outputs:
        raise DataError(f"evaluation corpus {rows.corpus}: there is no labelled row or no model")
    kept, models = keep_labelled(rows, outputs)
    scored = score_models(kept, add_averages(models))
    table = _build_table(scored)
    num_rows = len(kept.golden_N)
    return CorpusEvaluation(
        corpus=rows.corpus,
        labels=rows.labels,
        num_rows=num_rows,
        num_excluded=rows.num_excluded,
        num_unlabelled=len(rows.golden_N) - num_rows,
        majority_share=int(np.bincount(kept.golden_N).max()) / num_rows,
        models=tuple(table),
        agreement=_compare_predictions(scored),
        comparisons=tuple(_compare_students(scored, main_arm)),
        notes=(*_note_small_set(num_rows, table), *notes),
    )


def compare_outputs(
    rows: EvaluatedRows, pairs: Sequence[tuple[ModelOutput, ModelOutput]], *, student: str, baseline: str
) -> Comparison:
    """Compares models pair by pair, a pair for each seed, on the same rows.

    Args:
        rows: All labelled.
        pairs: At least one: the model, and what it is compared with.
        student: Name of the former for the comparison.
        baseline: Name of the latter.
    """
    numbered = [replace(one, name=str(place)) for place, pair in enumerate(pairs) for one in pair]
    scored = score_models(rows, numbered)
    return _compare_pairs(student, baseline, list(zip(scored[::2], scored[1::2], strict=True)), is_main=False)


def keep_labelled(
    rows: EvaluatedRows, outputs: Sequence[ModelOutput]
) -> tuple[EvaluatedRows, list[ModelOutput]]:
    """Leaves out the rows without a golden label, for all models alike."""
    labelled_N = rows.golden_N >= 0
    kept = replace(
        rows,
        golden_N=rows.golden_N[labelled_N],
        question_N=None if rows.question_N is None else rows.question_N[labelled_N],
        row_N=None if rows.row_N is None else rows.row_N[labelled_N],
    )
    return kept, [
        replace(model, probabilities_NC=model.probabilities_NC[labelled_N].astype(np.float64))
        for model in outputs
    ]


def note_partial_split(corpus: Corpus, num_rows: int) -> str | None:
    """Says so where a corpus names a public validation split and holds only some of its rows.

    Args:
        corpus: The recipe's corpus.
        num_rows: Labelled rows that were evaluated.
    """
    parts = [part for part in corpus.parts if isinstance(part, HubPart)]
    counts = [_PUBLIC_ROWS.get((part.repo, part.config, part.split)) for part in parts]
    known = [count for count in counts if count is not None]
    if len(known) != len(corpus.parts) or sum(known) <= num_rows:
        return None
    names = " + ".join(" ".join(filter(None, (part.repo, part.config, part.split))) for part in parts)
    return (
        f"{num_rows:,} of the {sum(known):,} labelled rows of {names}: "
        "not comparable with published figures on the whole split"
    )


def _note_small_set(num_rows: int, table: Sequence[ModelRow]) -> list[str]:
    if num_rows >= SMALL_SET_ROWS:
        return []
    stderr = max(row.accuracy_stderr for row in table)
    return [
        f"only {num_rows:,} rows: the standard error of one accuracy is up to {100 * stderr:.1f} points; "
        "judge differences by their interval"
    ]


def _build_table(scored: Sequence[ScoredModel]) -> list[ModelRow]:
    """Orders the table: teachers, ensemble, then each arm with its teachers and its seeds below it."""
    groups: dict[tuple[str, ...], list[ScoredModel]] = defaultdict(list)
    for one in scored:
        key = (one.output.arm,) if one.output.arm else (one.output.kind, one.output.name)
        groups[key].append(one)
    kinds = {"teacher": 0, "ensemble": 1, "student": 2}
    ordered = sorted(groups.values(), key=lambda members: kinds[members[0].output.kind])
    return [row for members in ordered for row in _build_arm(members)]


def _build_arm(members: Sequence[ScoredModel]) -> list[ModelRow]:
    by_name: dict[str, list[ScoredModel]] = defaultdict(list)
    for one in members:
        by_name[one.output.name].append(one)
    if len(by_name) == 1:
        return _build_seeds(members, level=0)
    num_seeds = len({one.output.seed for one in members})
    over: tuple[Over, ...] = ("teachers", "seeds") if num_seeds > 1 else ("teachers",)
    name = members[0].output.arm or members[0].output.kind
    rows = [average_row(members, name=name, over=over, level=0)]
    for same_name in by_name.values():
        rows += _build_seeds(same_name, level=1)
    return rows


def _build_seeds(members: Sequence[ScoredModel], level: Literal[0, 1]) -> list[ModelRow]:
    if len(members) == 1:
        return [members[0].row.model_copy(update={"level": level})]
    name = members[0].output.name
    singles = [
        one.row.model_copy(update={"level": 2, "name": f"{name}/seed-{one.output.seed}"}) for one in members
    ]
    return [average_row(members, name=name, over=("seeds",), level=level), *singles]


def _compare_predictions(scored: Sequence[ScoredModel]) -> AgreementMatrix:
    first_seeds: dict[str, ScoredModel] = {}
    for one in scored:
        first_seeds.setdefault(one.output.name, one)
    shown = sorted(first_seeds.values(), key=lambda one: one.output.kind == "student")
    return AgreementMatrix(
        names=tuple(one.output.name for one in shown),
        values=tuple(tuple(agreement(a.predicted_N, b.predicted_N) for b in shown) for a in shown),
    )


def _compare_students(scored: Sequence[ScoredModel], main_arm: Arm | None) -> list[Comparison]:
    """Compares each student with the untaught ones of the same seed; the main arm and golden come first."""
    comparisons = []
    names = {(one.output.arm, one.output.name) for one in scored if one.output.teacher is not None}
    over_teachers = [arm for arm, count in Counter(arm for arm, _ in names).items() if arm and count > 1]
    baselines: tuple[Arm, ...] = ("golden", "golden-long")
    for baseline in baselines:
        untaught = {one.output.seed: one for one in scored if one.output.arm == baseline}
        pairs: dict[str, list[tuple[ScoredModel, ScoredModel]]] = defaultdict(list)
        for one in scored:
            is_other = one.output.kind == "student" and one.output.arm not in (baseline, "golden")
            # Against the longer baseline it is the run's own student that counts.
            is_asked = baseline == "golden" or one.output.arm == main_arm
            if is_other and is_asked and one.output.seed in untaught:
                # The line of an arm with several teachers is the mean over its students.
                arm = one.output.arm if one.output.arm in over_teachers else None
                for name in filter(None, (arm, one.output.name)):
                    pairs[name].append((one, untaught[one.output.seed]))
        found = [
            _compare_pairs(
                name,
                baseline,
                same_name,
                is_main=baseline == "golden" and same_name[0][0].output.arm == main_arm,
            )
            for name, same_name in pairs.items()
        ]
        comparisons += sorted(found, key=lambda comparison: not comparison.is_main)
    return comparisons


def _compare_pairs(
    name: str, baseline_name: str, pairs: Sequence[tuple[ScoredModel, ScoredModel]], *, is_main: bool
) -> Comparison:
    per_seed = []
    for student, baseline in pairs:
        test = compare_correctness(student.correct_N, baseline.correct_N)
        per_seed.append(
            SeedComparison(
                seed=student.output.seed or 0,
                teacher=student.output.teacher if name == student.output.arm else None,
                only_student=test.only_first,
                only_baseline=test.only_second,
                p_value=test.p_value,
                difference=student.row.accuracy - baseline.row.accuracy,
            )
        )
    differences_BS = np.stack([student.means_B - baseline.means_B for student, baseline in pairs], axis=1)
    return Comparison(
        student=name,
        baseline=baseline_name,
        is_main=is_main,
        seeds=tuple(per_seed),
        mean_difference=fmean(one.difference for one in per_seed),
        interval=interval_of(differences_BS),
    )
