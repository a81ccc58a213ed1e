"""What a run found, in a few sentences that claim no more than the numbers do."""

from __future__ import annotations

from cluster.figures import format_count, format_difference, format_percent, format_points, format_ratio
from schemas.evaluation import Comparison, CorpusEvaluation, ModelRow, RunEvaluation

# Below one point between teachers and golden-only student, a share of the gap says nothing.
_MIN_GAP = 0.01


def summarise(evaluation: RunEvaluation) -> list[str]:
    """Returns sentences about the main corpus: the student, its baseline, its teachers, its cost."""
    if not evaluation.corpora:
        return []
    corpus = evaluation.corpora[0]
    student = find_student(corpus, evaluation.main_arm)
    if student is None:
        return [f"On {corpus.corpus} ({corpus.num_rows:,} rows) no student was evaluated."]
    comparison = next((one for one in corpus.comparisons if one.student == student.name), None)
    return [
        _describe_student(corpus, student),
        *([_describe_gain(corpus, comparison)] if comparison else []),
        *_describe_teachers(corpus, student),
        *_describe_cost(corpus, student),
    ]


def find_student(corpus: CorpusEvaluation, main_arm: str | None) -> ModelRow | None:
    """Returns the row of the run's own student, or else of the first one."""
    students = [row for row in corpus.models if row.kind == "student" and row.level == 0]
    return next((row for row in students if row.arm == main_arm), students[0] if students else None)


def _describe_student(corpus: CorpusEvaluation, student: ModelRow) -> str:
    seeds = f", the mean of {len(student.seeds)} seeds" if len(student.seeds) > 1 else ""
    return (
        f"On {corpus.corpus} ({corpus.num_rows:,} rows, {format_percent(corpus.majority_share)} % in the "
        f"largest class) the student {student.name} labels {format_percent(student.accuracy)} % of the rows "
        f"right (standard error {format_points(student.accuracy_stderr)} points{seeds})."
    )


def _describe_gain(corpus: CorpusEvaluation, comparison: Comparison) -> str:
    golden = next((row for row in corpus.models if row.name == comparison.baseline), None)
    reach = f" reaches {format_percent(golden.accuracy)} %" if golden else " was trained too"
    interval = comparison.interval
    if interval.low > 0:
        verdict = "so distillation helped here"
    elif interval.high < 0:
        verdict = "so distillation did harm here"
    else:
        verdict = "which includes zero, so this run shows no effect of distillation"
    return (
        f"The same student on golden labels alone{reach}: a difference of "
        f"{format_difference(comparison.mean_difference)} points, with a 95 % interval from "
        f"{format_difference(interval.low)} to {format_difference(interval.high)}, {verdict}."
    )


def _describe_teachers(corpus: CorpusEvaluation, student: ModelRow) -> list[str]:
    teachers = [row.accuracy for row in corpus.models if row.kind == "teacher"]
    if not teachers:
        return []
    low, high = format_percent(min(teachers)), format_percent(max(teachers))
    reach = f"{low} %" if low == high else f"{low} to {high} %"
    ensemble = next((row for row in corpus.models if row.kind == "ensemble"), None)
    together = f", their ensemble {format_percent(ensemble.accuracy)} %" if ensemble else ""
    golden = next((row for row in corpus.models if row.arm == "golden" and row.level == 0), None)
    mean = sum(teachers) / len(teachers)
    closed = ""
    if golden and golden is not student and mean - golden.accuracy > _MIN_GAP:
        share = (student.accuracy - golden.accuracy) / (mean - golden.accuracy)
        closed = (
            f"; the student closes {100 * share:.0f} % of the gap to the mean teacher" if share > 0 else ""
        )
    verb = "teacher reaches" if len(teachers) == 1 else "teachers reach"
    return [f"The {verb} {reach}{together}{closed}."]


def _describe_cost(corpus: CorpusEvaluation, student: ModelRow) -> list[str]:
    if student.num_parameters is None or student.speed_ratio is None:
        return []
    sizes = [row.num_parameters for row in corpus.models if row.kind == "teacher" and row.num_parameters]
    teachers = f" against the mean teacher's {format_count(round(sum(sizes) / len(sizes)))}" if sizes else ""
    return [
        f"It has {format_count(student.num_parameters)} parameters{teachers}, and labels "
        f"{format_ratio(student.speed_ratio)} as many rows a second."
    ]
