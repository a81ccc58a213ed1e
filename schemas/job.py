"""The stage job: all that one launch of the trainer needs, and the status that it leaves.

One launch trains one stage. Stage 2 starts from stage 1's output, so that several stage 2 arms can
share one stage 1, and a restart has one stage to resume.

Invariants:
    1. A job names stores and corpora, never a teacher's model (tests/schemas/test_job.py).
    2. A job's ``fingerprint`` covers everything that changes the weights, and no path of output.
    3. A job without ``task``, as written before there were language models, is a classifier's
       (tests/schemas/test_job.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, TypeAdapter

from schemas.digest import hash_value
from schemas.language import LanguageConfigInit, LanguageLayersInit, LanguageStage, LossTerm, Objective
from schemas.recipe import ConfigInit, Count, Frozen, LayersInit, Training

GOLDEN_HEAD = "golden"
JOB_FILE = "job.json"
STATUS_FILE = "status.json"


class StudentInit(Frozen):
    """Weights of an earlier stage or of a finished student.

    Attributes:
        path: A directory in the layout of ``MultiHeadStudent.save_pretrained``.
        fingerprint: Of the job that made it.
    """

    kind: Literal["student"]
    path: str
    fingerprint: str


class PartSource(Frozen):
    """One corpus part: where ``rows.arrow`` lies, its fingerprint and the plan that its stores share.

    Attributes:
        labels_hash: Of the golden labels, which the fingerprint leaves out.
        shard_rows: The plan's cut. The order of reading follows it also where no store is joined, so
            it is checked against ``plan_hash``.
    """

    rows: str
    fingerprint: str
    plan_hash: str
    num_rows: int
    labels_hash: str | None = None
    shard_rows: Count = 4096


class SoftTarget(Frozen):
    """What one soft head learns.

    Attributes:
        head: Name of the head: the teacher's name, or ``average``.
        teachers: Teacher names; more than one are averaged (mean logits under MSE, mean
            probabilities under KL).
        stores: For each teacher, the store's root for each part, in the job's part order.
    """

    head: str
    teachers: Annotated[tuple[str, ...], Field(min_length=1)]
    stores: tuple[tuple[str, ...], ...]


class StageJob(Frozen):
    """One stage of one student (or the fine-tuning of a teacher: golden labels only, no store).

    Attributes:
        name: For people: such as ``tmkd/seed-17/stage-1``.
        output: Directory of the result (``model/``), metrics, checkpoints and status.
        init: Where the encoder's weights come from.
        init_hash: Hash of the weights that a ``layers`` init names, since a path may change its content.
        labels: Label names, in the order of the logits.
        parts: The corpus, part after part.
        dropped_rows: Path of a ``.npy`` int64 file of sorted corpus rows that are not to be used
            (they share a text with an evaluation split), named by the hash of its content, or None.
        soft_targets: One per soft head; none: golden labels only.
        label_maps: By teacher: from its native label names to the job's, where they differ.
        alpha: Weight of the soft loss; 1: the golden head is neither trained nor used.
        training: Optimisation, row selection and early stopping.
        selection_seed: Seed of the held-out rows.
        seed: Seed of new heads, dropout and order.
        deepspeed: User's DeepSpeed configuration, without batch fields.
        threads: CPU threads of a rank.
    """

    task: Literal["classification"] = "classification"
    name: str
    output: str
    init: Annotated[LayersInit | ConfigInit | StudentInit, Field(discriminator="kind")]
    init_hash: str | None = None
    max_length: int
    labels: tuple[str, ...]
    parts: tuple[PartSource, ...]
    dropped_rows: str | None = None
    soft_targets: tuple[SoftTarget, ...] = ()
    label_maps: dict[str, dict[str, str]] = Field(default_factory=dict)
    alpha: float
    soft_loss: Literal["mse", "kl"] = "mse"
    temperature: float = 1.0
    training: Training
    selection_seed: int
    seed: int
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    threads: int = 1

    @property
    def uses_golden(self) -> bool:
        """Whether the golden head is trained, and so used for prediction."""
        return not self.soft_targets or self.alpha < 1

    def prediction_heads(self) -> tuple[str, ...]:
        """Returns the heads trained in this stage, whose probabilities are averaged to predict."""
        golden = (GOLDEN_HEAD,) if self.uses_golden else ()
        return golden + tuple(target.head for target in self.soft_targets)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of what decides the weights; paths are replaced by what they hold."""
        body = self.model_dump(mode="json", exclude={"task", "name", "output", "threads"})
        # The parts say which corpus it is, whatever the recipe calls it.
        body["training"].pop("corpus")
        body["parts"] = [
            [part.fingerprint, part.plan_hash, *([part.labels_hash] if part.labels_hash else [])]
            for part in self.parts
        ]
        for target in body["soft_targets"]:
            # A store's directory is named by its plan and generation hashes.
            target["stores"] = [
                [root.rstrip("/").rsplit("/", 1)[-1] for root in row] for row in target["stores"]
            ]
        if self.dropped_rows is not None:
            # The file is named by the hash of its content.
            body["dropped_rows"] = self.dropped_rows.rsplit("/", 1)[-1]
        if isinstance(self.init, StudentInit):
            body["init"].pop("path")
        return hash_value(body)


class TokenTeacher(Frozen):
    """One teacher of a language model.

    Attributes:
        name: The teacher's name.
        weight: Its factor in each loss that has a teacher.
        stores: The store's root for each part, in the job's part order.
    """

    name: str
    weight: Annotated[float, Field(ge=0)] = 1.0
    stores: tuple[str, ...]


class LanguageJob(Frozen):
    """One stage of one language model.

    Attributes:
        name, output, init_hash, selection_seed, seed, deepspeed, threads: As for ``StageJob``.
        init: Where the weights come from.
        objective: ``causal`` or ``masked``.
        tokenizer: Hash of the tokenizer of chunks, teachers and student (``schemas.tokenizer_hash``).
        vocab: V, the true vocabulary.
        max_length: Tokens of a training sequence, into which short chunks are packed.
        pack: False: one chunk to a sequence.
        parts: The corpus: ``rows`` are the parts' ``chunks.arrow``.
        dropped_rows: As for ``StageJob``.
        teachers: Theirs; none where cross-entropy is the only loss.
        training: Optimisation, losses and row selection. ``global_batch`` and ``max_micro_batch`` count
            sequences, ``rows`` chunks.
    """

    task: Literal["language"] = "language"
    name: str
    output: str
    init: Annotated[LanguageLayersInit | LanguageConfigInit | StudentInit, Field(discriminator="kind")]
    init_hash: str | None = None
    objective: Objective = "causal"
    tokenizer: str
    vocab: Count
    max_length: Annotated[int, Field(ge=2)]
    pack: bool = True
    parts: Annotated[tuple[PartSource, ...], Field(min_length=1)]
    dropped_rows: str | None = None
    teachers: tuple[TokenTeacher, ...] = ()
    training: LanguageStage
    selection_seed: int
    seed: int
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    threads: int = 1

    @property
    def losses(self) -> tuple[LossTerm, ...]:
        """The summands of the loss."""
        return self.training.losses

    def fingerprint(self) -> str:
        """Returns the SHA-256 of what decides the weights; paths are replaced by what they hold."""
        body = self.model_dump(mode="json", exclude={"name", "output", "threads"})
        body["parts"] = [[part.fingerprint, part.plan_hash] for part in self.parts]
        for teacher in body["teachers"]:
            # A store's directory is named by its plan and generation hashes.
            teacher["stores"] = [root.rstrip("/").rsplit("/", 1)[-1] for root in teacher["stores"]]
        if self.dropped_rows is not None:
            body["dropped_rows"] = self.dropped_rows.rsplit("/", 1)[-1]
        if isinstance(self.init, StudentInit):
            body["init"].pop("path")
        elif isinstance(self.init, LanguageConfigInit):
            # The tokenizer's hash is there.
            body["init"].pop("tokenizer")
        elif self.init_hash is not None:
            body["init"].pop("model")
        return hash_value(body)


def _task_of(job: Any) -> str:
    task = job.get("task", "classification") if isinstance(job, dict) else getattr(job, "task", None)
    return task if isinstance(task, str) else "unknown"


AnyJob: TypeAlias = StageJob | LanguageJob
JOB_ADAPTER: TypeAdapter[AnyJob] = TypeAdapter(
    Annotated[
        Annotated[StageJob, Tag("classification")] | Annotated[LanguageJob, Tag("language")],
        Discriminator(_task_of),
    ]
)


class StageStatus(Frozen):
    """``status.json``, written by rank 0: the launcher's exit code is not to be trusted.

    Attributes:
        state: ``running`` from the start; ``complete``, ``preempted`` (asked to stop, resumable) or
            ``failed`` at the end.
        fingerprint: Of the job.
        step: Optimizer steps done.
        error: One line, where it failed; ``exit_code`` is that of the error's class.
    """

    state: Literal["running", "complete", "preempted", "failed"]
    fingerprint: str
    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    error: str | None = None
    exit_code: int = 0
    peak_rss_bytes: int | None = None
