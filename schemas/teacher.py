"""The recipe's teachers, and how their stores are made."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.fields import Count, Dtype, Frozen, Gpus, Name
from schemas.policy import DensePolicy, KeepPolicy
from schemas.training import TeacherTraining


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
    gpus_per_actor: Gpus = 0
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
        root: A directory or the URL of an object store (``s3://bucket/prefix``); by default
            ``<out>/stores``.
        single_committer: For an object store that cannot create a file only if it is absent: the driver
            alone commits shards, and you see to it that one run at a time writes a store.
        shard_rows: Rows of one shard task; part of the plan.
        batch_rows: Rows of one record batch, the unit of integrity checks.
        max_attempts: Tries at one shard before it is quarantined.
        stall_timeout_s: Seconds without an answer after which an actor is replaced.
        start_timeout_s: Seconds to wait for a first actor, its model loaded.
    """

    root: str | None = None
    single_committer: bool = False
    shard_rows: Count = 4096
    batch_rows: Count = 1024
    max_attempts: Count = 3
    stall_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0
