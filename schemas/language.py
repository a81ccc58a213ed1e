"""The recipe of a language model: a run whose teachers give token-level stores.

It says ``task: language`` at its top level; recipes of classification have no ``task``.

Invariants (tests/schemas/test_language.py):
    1. An unknown key, a dangling name or an impossible combination is an error that names the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from schemas.fields import Count, Dtype, Frozen, Gpus, Name, RunName
from schemas.policy import AnyPolicy, KeepPolicy, TopKPolicy
from schemas.teacher import StoreOptions
from schemas.text_corpus import TextCorpus
from schemas.training import Optimisation, check_deepspeed

Objective = Literal["causal", "masked"]
CodecName = Literal["fixed", "packed", "compact"]
MAIN_ARM = "student"
"""The arm of a recipe's own student."""

LossName = Literal["cross_entropy", "support_kl", "ghost_kl", "unbiased_kl", "reverse_kl", "jsd", "logit_mse"]
_Temperature = Annotated[float, Field(gt=0)]


class LanguageTeacher(Frozen):
    """One teacher: a model to run, or finished stores.

    Attributes:
        model: A local directory, ``package://<import name>/<path>``, or a hub id.
        revision: Commit, branch or tag on the hub.
        gguf_file: Name of a GGUF file in the directory, which is read in place of safetensors.
        stores: Roots of finished stores instead of a model, one per corpus part.
        keep: What is stored of each position's distribution.
        codec: How that is encoded.
        temperatures: The grid: the student may use these temperatures, and 1, exactly.
        tokens_per_batch: Budget of one forward pass, padding included.
        chunk_positions: Positions that go through the output head at once: their logits take 4 bytes times
            the vocabulary each. With few, a CPU reads the head's weights more often than need be.
        num_actors: The most actors that run this teacher at once.
        gpus_per_actor: Several, with ``device_map``, where one GPU does not hold the model.
        device_map: How transformers spreads the model's layers over an actor's GPUs.
        weight: Factor of this teacher in each loss.
    """

    name: Name
    model: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    stores: tuple[str, ...] | None = None
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    keep: KeepPolicy = Field(default_factory=lambda: TopKPolicy(kind="top_k", k=64))
    codec: CodecName = "packed"
    temperatures: tuple[_Temperature, ...] = ()
    tokens_per_batch: Annotated[int, Field(ge=8)] = 4096
    chunk_positions: Count = 256
    num_actors: Count = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    gpus_per_actor: Gpus = 0
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    trust_remote_code: bool = False
    weight: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) == (self.stores is None):
            raise ValueError("give either model or stores")
        if self.device_map and not self.gpus_per_actor:
            raise ValueError("device_map spreads a model over GPUs: set gpus_per_actor")
        if self.gpus_per_actor > 1 and not self.device_map:
            raise ValueError("more than one GPU per actor needs device_map, such as auto")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError("temperatures must be distinct")
        return self


class TokenStoreOptions(StoreOptions):
    """Where token-level stores lie and how they are made; a row is a chunk of up to ``max_length`` tokens."""

    shard_rows: Count = 512
    batch_rows: Count = 64


class LanguageLayersInit(Frozen):
    """Layers of a pretrained model, with its embeddings, final norm and output head.

    Attributes:
        layers: How many; all by default.
        take: ``first``: the first ones; ``spread``: at even distances, the first and the last among them.
        overrides: Fields of the model's configuration to change.
    """

    kind: Literal["layers"]
    model: str
    revision: str | None = None
    gguf_file: str | None = None
    layers: Count | None = None
    take: Literal["first", "spread"] = "first"
    overrides: dict[str, Any] = Field(default_factory=dict)


class LanguageConfigInit(Frozen):
    """A randomly initialised model.

    Attributes:
        config: A transformers configuration, ``model_type`` included; ``vocab_size`` follows the
            tokenizer unless it is given.
        tokenizer: Model whose tokenizer is used, named like a teacher's ``model``.
    """

    kind: Literal["config"]
    config: dict[str, Any]
    tokenizer: str
    revision: str | None = None
    gguf_file: str | None = None


class LanguageStudent(Frozen):
    """The student.

    Attributes:
        max_length: Tokens of a training sequence, into which short chunks are packed.
        pack: False: one chunk to a sequence.
    """

    init: Annotated[LanguageLayersInit | LanguageConfigInit, Field(discriminator="kind")]
    max_length: Annotated[int, Field(ge=8)] = 512
    pack: bool = True


class LossTerm(Frozen):
    """One summand of the loss.

    Attributes:
        name: Which loss.
        weight: Its factor.
        temperature: Softens teacher and student; the loss is multiplied by its square.
        beta: Share of the teacher in the mixture of ``jsd``.
    """

    name: LossName
    weight: float = 1.0
    temperature: _Temperature = 1.0
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temperature != 1 and self.name in ("cross_entropy", "logit_mse"):
            raise ValueError(f"{self.name} has no temperature other than 1")
        return self


class LanguageStage(Optimisation):
    """One training. ``rows`` are chunks; ``global_batch`` and ``max_micro_batch`` count packed sequences.

    Attributes:
        teachers: Names; none where the target's cross-entropy is the only loss.
        losses: Summands; for several teachers the sum over teachers of weight times loss.
        metric: What selection compares on the held-out rows.
    """

    teachers: tuple[str, ...] = ()
    losses: Annotated[tuple[LossTerm, ...], Field(min_length=1)]
    metric: Literal["loss", "perplexity"] | None = None


class LanguageArm(Frozen):
    """A further student, trained like the recipe's own but with other teachers and losses.

    Attributes:
        name: In tables and paths.
        teachers, losses: In place of those of every stage.
    """

    name: Name
    teachers: tuple[str, ...] = ()
    losses: Annotated[tuple[LossTerm, ...], Field(min_length=1)]


class LanguageCompare(Frozen):
    """Further students for the table.

    Attributes:
        seeds: Seeds of every arm; by default the recipe's seed alone.
    """

    arms: tuple[LanguageArm, ...] = ()
    seeds: tuple[int, ...] = ()


class LanguageEvaluation(Frozen):
    """Corpora that are read once per final student: perplexity, and calibration of the next token.

    Attributes:
        corpora: Names of corpora; the first is the main one.
        with_teachers: Measure the teachers too.
    """

    corpora: tuple[str, ...] = ()
    with_teachers: bool = True


class LanguageRecipe(Frozen):
    """A whole run.

    Attributes:
        objective: ``causal``: predict the next token; ``masked``: the hidden ones. Of teachers and student.
        gpu_hour_price: Price of one GPU hour, for the estimate of ``tmkd plan``; its unit is yours.
        out, data_root, deepspeed, num_procs, threads_per_proc: See ``schemas.recipe.Recipe``.
    """

    task: Literal["language"]
    name: RunName
    out: str = "runs"
    data_root: str | None = None
    seed: int = 17
    objective: Objective = "causal"
    corpora: dict[Name, TextCorpus]
    teachers: tuple[LanguageTeacher, ...] = ()
    store: TokenStoreOptions = Field(default_factory=TokenStoreOptions)
    student: LanguageStudent
    stages: Annotated[tuple[LanguageStage, ...], Field(min_length=1)]
    compare: LanguageCompare = Field(default_factory=LanguageCompare)
    evaluation: LanguageEvaluation = Field(default_factory=LanguageEvaluation)
    gpu_hour_price: Annotated[float, Field(ge=0)] | None = None
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    num_procs: Count = 1
    threads_per_proc: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError("teacher names must be distinct")
        self._check_corpora()
        for where, teachers, losses in self._trainings():
            unknown = [name for name in teachers if name not in names]
            if unknown:
                known = ", ".join(names) or "none"
                raise ValueError(f"{where}.teachers: no teacher is named {unknown[0]!r}; there are {known}")
            if len(set(teachers)) != len(teachers):
                raise ValueError(f"{where}.teachers: a teacher is named twice")
            self._check_losses(where, teachers, losses)
        check_deepspeed(self.deepspeed)
        arms = [arm.name for arm in self.compare.arms]
        if MAIN_ARM in arms:
            raise ValueError(f"compare.arms: {MAIN_ARM} is the name of the recipe's own; choose another")
        if len(set(arms)) != len(arms) or len(set(self.compare.seeds)) != len(self.compare.seeds):
            raise ValueError("compare: arms and seeds must be distinct")
        return self

    def _check_corpora(self) -> None:
        used = [(f"stages.{i}.corpus", stage.corpus) for i, stage in enumerate(self.stages)]
        used += [(f"evaluation.corpora.{i}", name) for i, name in enumerate(self.evaluation.corpora)]
        for where, corpus in used:
            if corpus not in self.corpora:
                known = ", ".join(self.corpora)
                raise ValueError(f"{where}: no corpus is named {corpus!r}; there are {known}")
        for name, text in self.corpora.items():
            if self.objective == "masked" and text.messages is not None:
                raise ValueError(f"corpora.{name}.messages: conversations need objective: causal")

    def _trainings(self) -> list[tuple[str, tuple[str, ...], tuple[LossTerm, ...]]]:
        found = [(f"stages.{i}", stage.teachers, stage.losses) for i, stage in enumerate(self.stages)]
        return found + [(f"compare.arms.{arm.name}", arm.teachers, arm.losses) for arm in self.compare.arms]

    def _check_losses(self, where: str, teachers: tuple[str, ...], losses: tuple[LossTerm, ...]) -> None:
        taught = [term for term in losses if term.name != "cross_entropy"]
        if taught and not teachers:
            raise ValueError(f"{where}.losses: {taught[0].name} needs teachers")
        if teachers and not taught:
            raise ValueError(f"{where}.teachers: cross_entropy alone uses no teacher; name none")
        for name in teachers:
            teacher = self.teacher(name)
            # Finished stores say themselves what they hold.
            if teacher.model is not None:
                misfit = find_misfit(name, teacher.keep, teacher.temperatures, taught)
                if misfit is not None:
                    raise ValueError(f"{where}.losses: {misfit}")

    def losses_of(self, name: str) -> tuple[LossTerm, ...]:
        """Returns the losses that a teacher has part in, of all stages and arms."""
        found = [losses for _, teachers, losses in self._trainings() if name in teachers]
        return tuple(dict.fromkeys(term for losses in found for term in losses))

    def teacher(self, name: str) -> LanguageTeacher:
        """Returns the teacher of that name."""
        return next(teacher for teacher in self.teachers if teacher.name == name)


def find_misfit(
    teacher: str, policy: AnyPolicy, grid: Sequence[float], losses: Iterable[LossTerm]
) -> str | None:
    """Says in one line what losses need that a store cannot give.

    Args:
        teacher: Its teacher's name.
        policy: What the store keeps.
        grid: Its temperatures besides 1.
        losses: Those of the students that read it.

    Returns:
        None if it can give everything.
    """
    kind = policy.kind
    for term in losses:
        if term.name == "unbiased_kl" and kind in ("top_k", "top_p"):
            return (
                f"unbiased_kl is biased on the {kind} store of teacher {teacher}; "
                "use ghost_kl, or keep dense, sampled or hybrid"
            )
        if term.temperature == 1 or term.name == "cross_entropy":
            continue
        if kind in ("sampled", "hybrid"):
            return (
                f"the {kind} store of teacher {teacher} is unbiased at temperature 1 "
                f"only, not at {term.temperature:g}; keep dense, top_k or top_p"
            )
        if term.temperature not in grid:
            held = ", ".join(f"{entry:g}" for entry in (1.0, *grid))
            return (
                f"temperature {term.temperature:g} of {term.name} is not in the grid of teacher {teacher} "
                f"({held}); use one of these, or add it to its temperatures"
            )
    return None
