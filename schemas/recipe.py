"""The recipe: one frozen description of a run (DESIGN section 3).

Its parts lie in modules of their own; all of them are imported from here.

Invariants:
    1. An unknown key, a dangling name or an impossible combination is an error that names the
       field (tests/schemas/test_recipe.py).
    2. Every shipped recipe is valid (tests/cluster/test_recipe_file.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from schemas.corpus import Corpus, FilePart, HubPart, Part, PydocqaPart
from schemas.fields import Arm, Count, Dtype, Fraction, Frozen, Name, RunName
from schemas.teacher import StoreOptions, Teacher
from schemas.training import (
    FinetuneStage,
    FirstRows,
    PretrainStage,
    SampledRows,
    Stage,
    TeacherTraining,
    Training,
    check_deepspeed,
)

__all__ = [
    "Arm",
    "Compare",
    "ConfigInit",
    "Corpus",
    "Count",
    "Dtype",
    "Evaluation",
    "FilePart",
    "FinetuneStage",
    "FirstRows",
    "Fraction",
    "Frozen",
    "HubPart",
    "LayersInit",
    "Name",
    "Part",
    "PretrainStage",
    "PydocqaPart",
    "Recipe",
    "SampledRows",
    "Stage",
    "StoreOptions",
    "Student",
    "Teacher",
    "TeacherTraining",
    "Training",
]


class LayersInit(Frozen):
    """The first ``layers`` layers (by default all) of a pretrained encoder, with embeddings and pooler.

    Attributes:
        overrides: Fields of the model's configuration to change, such as ``hidden_dropout_prob``.
    """

    kind: Literal["layers"]
    model: str
    revision: str | None = None
    layers: Count | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)


class ConfigInit(Frozen):
    """A randomly initialised encoder.

    Attributes:
        config: A transformers configuration, ``model_type`` included; ``vocab_size`` follows the
            tokenizer unless it is given.
        tokenizer: Model whose tokenizer is used, named like a teacher's ``model``.
    """

    kind: Literal["config"]
    config: dict[str, Any]
    tokenizer: str
    revision: str | None = None


class Student(Frozen):
    """The student: its architecture, and how it is trained beside what the stages say.

    Attributes:
        arm: Which arm is the run's student; ``compare`` names further ones.
        deepspeed: DeepSpeed configuration of the student's stages instead of the recipe's, which then is
            that of the trained teachers alone: a large teacher may need ZeRO where its student does not.
    """

    init: Annotated[LayersInit | ConfigInit, Field(discriminator="kind")]
    max_length: Annotated[int, Field(ge=8)] = 128
    arm: Arm = "tmkd"
    deepspeed: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_deepspeed(self.deepspeed or {})
        return self


class Compare(Frozen):
    """Further students, trained from the same stores for the table.

    Attributes:
        arms: Arms beside the student's own; ``golden`` is the student without distillation,
            ``golden-long`` the same with as many steps as all stages of ``tmkd`` together.
        seeds: Seeds of every arm; by default the recipe's seed alone.
        arm_seeds: Seeds of arms that have other ones, such as fewer for those of less interest.
        teachers: Of an arm with one student per teacher, those that have one; by default all.
    """

    arms: tuple[Arm, ...] = ("golden",)
    seeds: tuple[int, ...] = ()
    arm_seeds: dict[Arm, Annotated[tuple[int, ...], Field(min_length=1)]] = Field(default_factory=dict)
    teachers: dict[Arm, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for values in (self.arms, self.seeds, *self.arm_seeds.values()):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"arms and seeds must be distinct; {twice} is given twice")
        wrong = next((arm for arm in self.teachers if arm not in ("1-o-1", "tkd")), None)
        if wrong is not None:
            raise ValueError(f"teachers: {wrong} has no student per teacher; 1-o-1 and tkd have")
        return self


class Evaluation(Frozen):
    """Corpora that are read once per final student.

    Attributes:
        corpora: Names of labelled corpora; the first is the main one.
        speed_rows: Rows of the first corpus that the speed measurement uses; 0 turns it off.
    """

    corpora: tuple[str, ...] = ()
    speed_rows: Annotated[int, Field(ge=0)] = 256


class Recipe(Frozen):
    """A whole run of classifiers; one of language models is a ``schemas.language.LanguageRecipe``.

    Attributes:
        name: Name of the run: ``<out>/<name>``.
        out: Root of runs, stores and trained teachers.
        data_root: Directory of local data; it also turns a hub part's ``mirror`` on.
        deepspeed: A DeepSpeed configuration, of the teachers that are trained and of the student. Batch
            fields follow from the recipe and are refused.
        num_procs: Ranks of the student's training on this host.
        threads_per_proc: CPU threads of one rank; by default the CPUs divided by the ranks.
    """

    task: Literal["classification"] = "classification"
    name: RunName
    out: str = "runs"
    data_root: str | None = None
    seed: int = 17
    corpora: dict[Name, Corpus]
    teachers: tuple[Teacher, ...] = ()
    store: StoreOptions = Field(default_factory=StoreOptions)
    student: Student
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    compare: Compare = Field(default_factory=Compare)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    num_procs: Count = 1
    threads_per_proc: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError("teacher names must be distinct")
        for teacher in self.teachers:
            if teacher.keep.kind != "dense":
                raise ValueError(
                    f"teacher {teacher.name}: keep is {teacher.keep.kind}; classification stores are dense"
                )
        for where, corpus in self._corpus_references():
            if corpus not in self.corpora:
                raise ValueError(
                    f"{where}: no corpus is named {corpus!r}; there are {', '.join(self.corpora)}"
                )
        for position, stage in enumerate(self.stages):
            self._check_stage(position, stage, names)
        for arm in (self.student.arm, *self.compare.arms):
            self._check_arm(arm)
        for arm, chosen in self.compare.teachers.items():
            unknown = next((name for name in chosen if name not in names), None)
            if unknown is not None:
                raise ValueError(f"compare.teachers.{arm}: no teacher is named {unknown!r}")
        check_deepspeed(self.deepspeed)
        return self

    def _corpus_references(self) -> list[tuple[str, str]]:
        found = [(f"stages.{i}.corpus", stage.corpus) for i, stage in enumerate(self.stages)]
        found += [(f"evaluation.corpora.{i}", name) for i, name in enumerate(self.evaluation.corpora)]
        found += [
            (f"teachers.{i}.train.corpus", teacher.train.corpus)
            for i, teacher in enumerate(self.teachers)
            if teacher.train is not None
        ]
        return found

    def _check_stage(self, position: int, stage: PretrainStage | FinetuneStage, names: list[str]) -> None:
        where = f"stages.{position}"
        unknown = [name for name in stage.teachers if name not in names]
        if unknown:
            raise ValueError(
                f"{where}.teachers: no teacher is named {unknown[0]!r}; there are {', '.join(names)}"
            )
        if len(set(stage.teachers)) != len(stage.teachers):
            raise ValueError(f"{where}.teachers: a teacher is named twice")
        if isinstance(stage, FinetuneStage) and self.corpora[stage.corpus].label is None and stage.alpha < 1:
            raise ValueError(f"{where}.corpus: {stage.corpus!r} has no label column; use kind: pretrain")

    def _check_arm(self, arm: Arm) -> None:
        kinds = {stage.kind for stage in self.stages}
        taught = [stage for stage in self.stages if stage.teachers]
        if arm in ("tkd", "tmkd", "golden-long") and "pretrain" not in kinds:
            raise ValueError(
                f"arm {arm} needs two stages, but none is of kind pretrain; use m-o-1, 1-o-1 or golden"
            )
        if arm not in ("tkd", "tmkd") and "finetune" not in kinds:
            raise ValueError(f"arm {arm} needs a stage of kind finetune")
        if arm not in ("tkd", "tmkd"):
            # Stage 1 is not theirs: without a teacher in stage 2 they would be the golden student again.
            taught = [stage for stage in taught if stage.kind == "finetune"]
        if arm not in ("golden", "golden-long") and not taught:
            raise ValueError(f"arm {arm} needs a stage of kind finetune that names teachers")
        if arm == "golden-long" and "tmkd" not in (self.student.arm, *self.compare.arms):
            raise ValueError("golden-long takes as many steps as tmkd; add tmkd to compare.arms")
        if arm == "m-o-m" and "1-o-1" not in (self.student.arm, *self.compare.arms):
            raise ValueError("m-o-m is computed from the students of 1-o-1; add 1-o-1 to compare.arms")
        if arm == "m-o-m" and self.student.arm == "m-o-m":
            raise ValueError("m-o-m is an evaluation over several students; student.arm must be a single one")

    def teacher(self, name: str) -> Teacher:
        """Returns the teacher of that name."""
        return next(teacher for teacher in self.teachers if teacher.name == name)
