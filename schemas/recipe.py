"""The recipe: one frozen description of a run (DESIGN section 3).

Invariants:
    1. An unknown key, a dangling name or an impossible combination is an error that names the
       field (tests/schemas/test_recipe.py).
    2. Every shipped recipe is valid (tests/cluster/test_recipe_file.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.policy import DensePolicy, KeepPolicy

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["float32", "bfloat16", "float16"]
Arm = Literal["golden", "1-o-1", "1avg-o-1", "m-o-m", "m-o-1", "tkd", "tmkd"]


class Frozen(BaseModel):
    """Base of all recipe models: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class PartBase(Frozen):
    """One ordered piece of a corpus.

    Attributes:
        name: Prefix of the example ids; by default ``part<position>``, or the split's name.
        limit: Use the first ``limit`` rows only. It changes the plan: to use fewer rows of an
            existing store give ``rows`` in a stage instead.
        text: The part's own names of the text columns, where they differ from the corpus's.
        unlabelled: Ignore the part's label column: its labels belong to another task.
    """

    name: Name | None = None
    limit: Count | None = None
    text: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    unlabelled: bool = False


class HubPart(PartBase):
    """A split of a data set on the Hugging Face hub.

    Attributes:
        repo: Such as ``nyu-mll/glue``.
        config: Such as ``rte``.
        mirror: A file below the recipe's ``data_root`` that holds the same split; it is read
            instead of the hub when ``data_root`` is set.
    """

    kind: Literal["hub"]
    repo: str
    config: str | None = None
    split: str
    revision: str | None = None
    mirror: str | None = None


class FilePart(PartBase):
    """A local file: ``.jsonl``/``.json`` (also ``.gz``), ``.parquet``, ``.arrow``, ``.csv``, ``.tsv``.

    Attributes:
        path: Relative to ``data_root`` if that is set, else to the working directory.
    """

    kind: Literal["file"]
    path: str


class PydocqaPart(PartBase):
    """A split of the built-in corpus of question-passage pairs from Python's docstrings."""

    kind: Literal["pydocqa"]
    split: Literal["train", "unlabelled", "validation", "test"]
    passages_per_question: Count = 20


Part = Annotated[HubPart | FilePart | PydocqaPart, Field(discriminator="kind")]


class Corpus(Frozen):
    """Ordered rows of one task.

    Attributes:
        labels: Names in the order of the data's integer label ids.
        text: One or two text columns, in the order in which models read them.
        label: Column of the golden label (integer id, name, or -1 for unlabelled); None if all
            rows are unlabelled.
        id: Column of unique example ids; by default the row's number.
        question: The text column that groups rows for ranking (MRR); the positive class is then
            the first label.
        on_bad_row: What to do with a row whose text is null or whose logits are not finite.
    """

    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    text: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
    label: str | None = "label"
    id: str | None = None
    question: str | None = None
    on_bad_row: Literal["fail", "exclude"] = "fail"
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        if self.question is not None and self.question not in self.text:
            raise ValueError("question must be one of the text columns")
        if any(part.text is not None and len(part.text) != len(self.text) for part in self.parts):
            raise ValueError("a part's text must name as many columns as the corpus's")
        names = self.part_names()
        if len(set(names)) != len(names):
            raise ValueError(f"part names must be distinct, got {', '.join(names)}")
        return self

    def part_names(self) -> tuple[str, ...]:
        """Returns the name of each part: the given one, else its split, else ``part<position>``."""
        return tuple(
            part.name or getattr(part, "split", None) or f"part{position}"
            for position, part in enumerate(self.parts)
        )


class FirstRows(Frozen):
    """The first ``first`` usable rows of a corpus."""

    first: Count


class SampledRows(Frozen):
    """A seeded sample of ``sample`` usable rows of a corpus, in corpus order."""

    sample: Count
    seed: int = 0


class Training(Frozen):
    """How one model is optimised on one corpus.

    Attributes:
        corpus: Name of the corpus.
        rows: Which of its rows; all by default.
        epochs: Passes over the rows; ignored when ``max_steps`` is given.
        max_steps: Number of optimizer steps.
        global_batch: Rows in one optimizer step, over all ranks.
        max_micro_batch: The most rows one rank puts through the model at once.
        learning_rate: Peak of AdamW's learning rate.
        warmup: Fraction of the steps with a linearly rising rate.
        schedule: What follows the warm-up.
        max_grad_norm: Clip of the gradient's global L2 norm; 0 turns it off.
        window_shards: Shards that are shuffled together.
        selection_fraction: Seeded share of the rows that is held out of training and used to
            select (early stopping, best step). 0 turns selection off.
        eval_every_steps: Steps between two evaluations on the held-out rows; by default each epoch.
        metric: What selection compares. ``soft_loss`` is the only one for unlabelled rows.
        patience: Evaluations without a better value after which training stops; None: never.
        checkpoint_every_steps: Steps between two checkpoints; by default only at each evaluation.
        freeze_embeddings: Keep the token embeddings as they are. In a small encoder they are most of
            the parameters, and short trainings move few of them.
    """

    corpus: str
    rows: FirstRows | SampledRows | None = None
    epochs: Count = 1
    max_steps: Count | None = None
    global_batch: Count = 32
    max_micro_batch: Count = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Fraction = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    window_shards: Count = 8
    selection_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    eval_every_steps: Count | None = None
    metric: Literal["accuracy", "macro_f1", "loss", "soft_loss"] | None = None
    patience: Count | None = None
    checkpoint_every_steps: Count | None = None
    freeze_embeddings: bool = False


class TeacherTraining(Training):
    """Fine-tuning of a teacher on golden labels, by the same trainer as the student's.

    Attributes:
        layers: Keep the first n layers of the model only; all by default.
        overrides: Fields of the model's configuration to change, such as ``hidden_dropout_prob``.
        seed: Seed of the new head and of the order; by default the recipe's.
    """

    layers: Count | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None


class Teacher(Frozen):
    """One teacher: a model to run (after training it, where ``train`` is given), or finished stores.

    Attributes:
        model: A local directory, ``package://<import name>/<path>`` for weights inside an installed
            package, or a hub id.
        revision: Commit, branch or tag on the hub.
        stores: Roots of finished stores instead of a model, one per corpus part.
        label_map: From the teacher's label names to the corpus's, where they differ.
        truncation: Which text loses tokens when a pair is too long.
        max_length: Longest input in tokens.
        tokens_per_batch: Budget of one forward pass, padding included.
        num_actors: The most actors that run this teacher at once.
    """

    name: Name
    model: str | None = None
    revision: str | None = None
    stores: tuple[str, ...] | None = None
    train: TeacherTraining | None = None
    label_map: dict[str, str] = Field(default_factory=dict)
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    max_length: Annotated[int, Field(ge=8)] = 128
    truncation: Literal["longest_first", "only_first", "only_second"] = "longest_first"
    tokens_per_batch: Annotated[int, Field(ge=8)] = 4096
    keep: KeepPolicy = Field(default_factory=DensePolicy)
    num_actors: Count = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) == (self.stores is None):
            raise ValueError("give either model or stores")
        if self.stores is not None and self.train is not None:
            raise ValueError("train needs a model, not stores")
        if self.tokens_per_batch < self.max_length:
            raise ValueError("tokens_per_batch must be at least max_length")
        return self


class StoreOptions(Frozen):
    """Where logit stores lie and how they are made.

    Attributes:
        root: By default ``<out>/stores``.
        shard_rows: Rows of one shard task; part of the plan.
        batch_rows: Rows of one record batch, the unit of integrity checks.
        max_attempts: Tries at one shard before it is quarantined.
        stall_timeout_s: Seconds without an answer after which an actor is replaced.
        start_timeout_s: Seconds to wait for a first actor, its model loaded.
    """

    root: str | None = None
    shard_rows: Count = 4096
    batch_rows: Count = 1024
    max_attempts: Count = 3
    stall_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0


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
    """The student's architecture.

    Attributes:
        arm: Which arm is the run's student; ``compare`` names further ones.
    """

    init: Annotated[LayersInit | ConfigInit, Field(discriminator="kind")]
    max_length: Annotated[int, Field(ge=8)] = 128
    arm: Arm = "tmkd"


class PretrainStage(Training):
    """Stage 1: soft labels only, on text that may be unlabelled."""

    kind: Literal["pretrain"]
    teachers: Annotated[tuple[str, ...], Field(min_length=1)]
    soft_loss: Literal["mse", "kl"] = "mse"
    temperature: Annotated[float, Field(gt=0)] = 1.0


class FinetuneStage(Training):
    """Stage 2: (1 - alpha) golden loss + alpha soft loss; golden labels only where no teacher is named."""

    kind: Literal["finetune"]
    teachers: tuple[str, ...] = ()
    alpha: Fraction = 0.9
    soft_loss: Literal["mse", "kl"] = "mse"
    temperature: Annotated[float, Field(gt=0)] = 1.0


Stage = Annotated[PretrainStage | FinetuneStage, Field(discriminator="kind")]


class Compare(Frozen):
    """Further students, trained from the same stores for the table.

    Attributes:
        arms: Arms beside the student's own; ``golden`` is the student without distillation.
        seeds: Seeds of every arm; by default the recipe's seed alone.
    """

    arms: tuple[Arm, ...] = ("golden",)
    seeds: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.arms)) != len(self.arms) or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("arms and seeds must be distinct")
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
    """A whole run.

    Attributes:
        name: Name of the run: ``<out>/<name>``.
        out: Root of runs, stores and trained teachers.
        data_root: Directory of local data; it also turns a hub part's ``mirror`` on.
        deepspeed: A DeepSpeed configuration. Batch fields follow from the recipe and are refused.
        num_procs: Ranks of the student's training on this host.
        threads_per_proc: CPU threads of one rank; by default the CPUs divided by the ranks.
    """

    name: Name
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
        for where, corpus in self._corpus_references():
            if corpus not in self.corpora:
                raise ValueError(
                    f"{where}: no corpus is named {corpus!r}; there are {', '.join(self.corpora)}"
                )
        for position, stage in enumerate(self.stages):
            self._check_stage(position, stage, names)
        for arm in (self.student.arm, *self.compare.arms):
            self._check_arm(arm)
        reserved = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
        if set(self.deepspeed) & (reserved | {"optimizer", "scheduler"}):
            raise ValueError(
                "deepspeed: batch, optimizer and scheduler fields follow from the stages "
                "(global_batch, max_micro_batch, learning_rate, schedule); remove them"
            )
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
        if arm in ("tkd", "tmkd") and "pretrain" not in kinds:
            raise ValueError(
                f"arm {arm} has two stages, but no stage is of kind pretrain; use m-o-1 or 1-o-1"
            )
        if arm not in ("tkd", "tmkd") and "finetune" not in kinds:
            raise ValueError(f"arm {arm} needs a stage of kind finetune")
        if arm != "golden" and not taught:
            raise ValueError(f"arm {arm} needs a stage that names teachers")
        if arm == "m-o-m" and "1-o-1" not in (self.student.arm, *self.compare.arms):
            raise ValueError("m-o-m is computed from the students of 1-o-1; add 1-o-1 to compare.arms")
        if arm == "m-o-m" and self.student.arm == "m-o-m":
            raise ValueError("m-o-m is an evaluation over several students; student.arm must be a single one")

    def teacher(self, name: str) -> Teacher:
        """Returns the teacher of that name."""
        return next(teacher for teacher in self.teachers if teacher.name == name)
