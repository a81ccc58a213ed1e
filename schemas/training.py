"""The recipe's trainings: how a teacher is fine-tuned, and the stages of the students."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.fields import Count, Fraction, Frozen


class FirstRows(Frozen):
    """The first ``first`` usable rows of a corpus."""

    first: Count


class SampledRows(Frozen):
    """A seeded sample of ``sample`` usable rows of a corpus, in corpus order."""

    sample: Count
    seed: int = 0


class Optimisation(Frozen):
    """How one model is optimised on one corpus, whatever its task.

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
    patience: Count | None = None
    checkpoint_every_steps: Count | None = None
    freeze_embeddings: bool = False


class Training(Optimisation):
    """How a classifier is optimised on one corpus.

    Attributes:
        metric: What selection compares. ``soft_loss`` is the only one for unlabelled rows.
    """

    metric: Literal["accuracy", "macro_f1", "loss", "soft_loss"] | None = None


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

_FOLLOWS_FROM_STAGES = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
}


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Checks a recipe's DeepSpeed configuration.

    Raises:
        ValueError: It has fields that follow from the stages.
    """
    if config.keys() & _FOLLOWS_FROM_STAGES:
        raise ValueError(
            "deepspeed: batch, optimizer and scheduler fields follow from the stages "
            "(global_batch, max_micro_batch, learning_rate, schedule); remove them"
        )
