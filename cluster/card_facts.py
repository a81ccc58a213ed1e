"""What a student's run records of how it came to be, for its model card."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cluster.arms import StudentRun, stages_of, teachers_of
from cluster.run_directory import RunDirectory, read_lock
from cluster.student_origin import StudentOrigin
from cluster.student_task import StudentTask
from distill.export import FoldingCost, FoldReport
from distill.onnx_export import OnnxReport
from schemas.evaluation import CorpusEvaluation, DroppedRows, ModelRow, RunEvaluation
from schemas.model_ref import PACKAGE_SCHEME
from schemas.recipe import (
    Corpus,
    FilePart,
    FinetuneStage,
    HubPart,
    LayersInit,
    Part,
    PretrainStage,
    PydocqaPart,
    Recipe,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class CorpusFact:
    """A corpus as a card names it.

    Attributes:
        parts: Of each what it is and its rows, as text.
        num_rows: None where they were not counted.
        dropped: Rows left out of training; None: not recorded.
        hub_id, hub_config, hub_split: Of its one part, where that is on the hub.
    """

    name: str
    parts: tuple[str, ...] = ()
    num_rows: int | None = None
    dropped: DroppedRows | None = None
    hub_id: str | None = None
    hub_config: str | None = None
    hub_split: str | None = None


@dataclass(frozen=True, slots=True)
class CardSource:
    """All that a card is made of.

    Attributes:
        name: Of the model: its directory's, or that of its repository.
        report: What was folded.
        max_length: Longest input in tokens.
        task: What the student's directory says of it.
        origin: The run or sweep that it belongs to; None where it belongs to none.
        cost: What folding costs; None where it was not measured.
        measured_on: The corpus of ``cost``.
        onnx: How ``model.onnx`` compares; None where there is none.
    """

    name: str
    report: FoldReport
    max_length: int
    task: StudentTask | None
    origin: StudentOrigin | None
    cost: FoldingCost | None
    measured_on: CorpusFact
    onnx: OnnxReport | None


@dataclass(frozen=True, slots=True)
class TeacherFact:
    """A teacher: what it is called, which model it is, and whether its run trained it."""

    name: str
    model: str
    training: str


@dataclass(frozen=True, slots=True)
class StageFact:
    """A stage that the student went through, with the teachers that it had there."""

    kind: str
    corpus: str
    teachers: tuple[str, ...]
    loss: str
    duration: str
    learning_rate: float


@dataclass(frozen=True, slots=True)
class ScoreFact:
    """A corpus's scores: the student's row, whether that is a mean over several, and its teachers'."""

    corpus: CorpusEvaluation
    student: ModelRow
    is_mean: bool
    teachers: tuple[ModelRow, ...]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run says of its student.

    Attributes:
        base_model: The model whose layers it began with, as text.
        base_hub_id: Its id, if it is one of the hub's.
        hub_datasets: Hub ids of what it was trained on.
        scores: None: the run has no evaluation.
    """

    run: str
    arm: str
    seed: int
    base_model: str
    base_hub_id: str | None
    teachers: tuple[TeacherFact, ...]
    stages: tuple[StageFact, ...]
    corpora: tuple[CorpusFact, ...]
    hub_datasets: tuple[str, ...]
    scores: tuple[ScoreFact, ...] | None


def run_facts(source: CardSource) -> RunFacts | None:
    """Collects them; None where the student belongs to no run.

    Raises:
        DataError: The run's lock is damaged.
    """
    if source.origin is None:
        return None
    recipe, directory = source.origin.recipe, source.origin.directory
    evaluation, student = source.origin.evaluation, source.origin.student
    stages = stages_of(recipe, student)
    taught = dict.fromkeys(name for stage in stages for name in teachers_of(stage, student))
    trained_on = dict.fromkeys(stage.corpus for stage in stages)
    init = recipe.student.init
    base = init.model if isinstance(init, LayersInit) else None
    datasets = dict.fromkeys(part.repo for name in trained_on for part in _hub_parts(recipe.corpora[name]))
    return RunFacts(
        run=source.origin.name,
        arm=student.arm,
        seed=student.seed,
        base_model=_describe_base(recipe),
        base_hub_id=base if base is not None and is_hub_id(base) else None,
        teachers=tuple(_teacher(recipe, name) for name in taught),
        stages=tuple(_stage(stage, teachers_of(stage, student)) for stage in stages),
        corpora=tuple(corpus_fact(recipe, name, directory, evaluation) for name in trained_on),
        hub_datasets=tuple(datasets),
        scores=None if evaluation is None else _scores(evaluation, student),
    )


def corpus_fact(
    recipe: Recipe, name: str, directory: RunDirectory, evaluation: RunEvaluation | None = None
) -> CorpusFact:
    """Describes a corpus of a recipe, with the rows that its run counted."""
    corpus = recipe.corpora[name]
    locked = read_lock(directory).corpora.get(name, ()) if directory.lock.exists() else ()
    rows = {part.part: part.num_rows for part in locked}
    parts = []
    for key, part in zip(corpus.part_names(), corpus.parts, strict=True):
        counted = f", {rows[key]:,} rows" if key in rows else ""
        parts.append(f"{key}: {_describe_part(part)}{counted}")
    dropped = () if evaluation is None else evaluation.dropped
    only = corpus.parts[0] if len(corpus.parts) == 1 else None
    hub = only if isinstance(only, HubPart) else None
    return CorpusFact(
        name=name,
        parts=tuple(parts),
        num_rows=sum(rows.values()) if rows else None,
        dropped=next((one for one in dropped if one.corpus == name), None),
        hub_id=hub.repo if hub else None,
        hub_config=hub.config if hub else None,
        hub_split=hub.split if hub else None,
    )


def is_hub_id(reference: str) -> bool:
    """Tells whether a model's reference is a hub id, and neither a package nor a directory."""
    return _HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()


def _describe_model(reference: str) -> str:
    if reference.startswith(PACKAGE_SCHEME):
        return f"`{reference}`, in an installed package"
    return f"`{reference}`" if is_hub_id(reference) else f"`{Path(reference).name}`, a local directory"


def _describe_base(recipe: Recipe) -> str:
    init = recipe.student.init
    if isinstance(init, LayersInit):
        layers = "all layers" if init.layers is None else f"the first {init.layers} layers"
        return f"{layers} of {_describe_model(init.model)}"
    kind = init.config.get("model_type", "unknown")
    return f"a randomly initialised {kind} with the tokenizer of {_describe_model(init.tokenizer)}"


def _teacher(recipe: Recipe, name: str) -> TeacherFact:
    teacher = recipe.teacher(name)
    if teacher.model is None:
        return TeacherFact(name, "not known: its logits came as finished stores", "not known")
    if teacher.train is None:
        return TeacherFact(name, _describe_model(teacher.model), "used as it is")
    return TeacherFact(
        name, _describe_model(teacher.model), f"fine-tuned by the run on {teacher.train.corpus}"
    )


def _stage(stage: PretrainStage | FinetuneStage, teachers: tuple[str, ...]) -> StageFact:
    soft = {"mse": "mean squared error of logits", "kl": "KL divergence"}[stage.soft_loss]
    if not teachers:
        loss = "golden labels alone"
    elif isinstance(stage, FinetuneStage):
        loss = f"{1 - stage.alpha:g} of golden labels + {stage.alpha:g} of soft labels ({soft}"
        loss += f", temperature {stage.temperature:g})"
    else:
        loss = f"soft labels alone ({soft}, temperature {stage.temperature:g})"
    duration = f"{stage.epochs} epochs" if stage.max_steps is None else f"{stage.max_steps} steps"
    return StageFact(stage.kind, stage.corpus, teachers, loss, duration, stage.learning_rate)


def _scores(evaluation: RunEvaluation, student: StudentRun) -> tuple[ScoreFact, ...]:
    found = []
    for corpus in evaluation.corpora:
        rows = [
            row
            for row in corpus.models
            if row.kind == "student" and row.arm == student.arm and row.teacher in (None, student.teacher)
        ]
        # A single model before a mean, a mean over its own teacher's seeds before one over all.
        own = [row for row in rows if row.seeds == (student.seed,) and row.teacher == student.teacher]
        rows = own or sorted(rows, key=lambda row: row.teacher is None)
        teachers = tuple(row for row in corpus.models if row.kind != "student")
        if rows:
            mean = bool(rows[0].over) or rows[0].seeds != (student.seed,)
            found.append(ScoreFact(corpus, rows[0], mean, teachers))
    return tuple(found)


def _hub_parts(corpus: Corpus) -> list[HubPart]:
    sources = [getattr(part, "source", part) for part in corpus.parts]
    return [part for part in sources if isinstance(part, HubPart)]


def _describe_part(part: Part) -> str:
    """Names a part without any directory of this machine."""
    if isinstance(part, HubPart):
        config = f" ({part.config})" if part.config else ""
        return f"`{part.repo}`{config}, split {part.split}"
    if isinstance(part, FilePart):
        return f"a local file `{Path(part.path).name}`"
    if isinstance(part, PydocqaPart):
        return f"tmkd's built-in question-passage pairs (pydocqa), split {part.split}"
    return f"new pairs by BM25 retrieval from {_describe_part(part.source)}"
