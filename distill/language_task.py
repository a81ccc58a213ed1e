"""The stage of a language model: sparse losses over packed sequences.

Shapes: N positions, L loss terms.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine import Engine, StepPlan
from distill.fused_head import FusedLosses
from distill.language_corpus import LanguageCorpus
from distill.language_held_out import LanguageSums
from distill.language_loader import LanguageLoader, PackedBatch, PackOptions
from distill.language_student import LanguageStudent, as_losses
from distill.loader import LoaderOptions
from distill.order import hold_out, select_rows
from distill.stage_task import StageFrame, StepLosses
from distill.token_losses import LossSpec, LossTerm
from schemas.job import LanguageJob


class LanguageTask:
    """A ``StageTask``.

    Attributes:
        frame: Student, data and plan.
        spec: The losses.
    """

    def __init__(self, job: LanguageJob, student: LanguageStudent, corpus: LanguageCorpus) -> None:
        """Opens the data of this rank.

        Raises:
            DataError: No row is left.
            RecipeError: The stores cannot give what the losses need.
        """
        training = job.training
        chosen = select_rows(corpus.usable_rows(), training.rows)
        rows, held_out = hold_out(chosen, training.selection_fraction, job.selection_seed, corpus.corpus_key)
        options = LoaderOptions(
            seed=job.seed,
            global_batch=training.global_batch,
            max_micro_batch=training.max_micro_batch,
            window=training.window_shards,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
        packs = PackOptions(job.max_length, student.pad_id, pack=job.pack)
        loader = LanguageLoader(corpus, rows, options, packs)
        total_steps = training.max_steps or loader.count_steps(training.epochs)
        plan = StepPlan(total_steps, loader.micro_batch, loader.num_micro_steps)
        self.frame = StageFrame(student, loader, plan, evaluates=len(held_out) > 0, counts="tokens")
        self._student = student
        self._loader = loader
        self._held_out: npt.NDArray[np.int64] = held_out
        self._max_micro_batch = training.max_micro_batch
        self.spec = spec_of(job)
        self._eval_spec, self._cross_entropy = _with_cross_entropy(self.spec)
        # Before the first step what else would fail in it.
        self.spec.check(corpus.gather(rows[:1]).targets, [teacher.name for teacher in job.teachers])

    @classmethod
    def open(cls, job: LanguageJob) -> LanguageTask:
        """Opens chunks and stores and builds the student; every rank must call it.

        Raises:
            TmkdError: See ``LanguageCorpus.open`` and ``LanguageStudent.from_job``.
        """
        corpus = LanguageCorpus.open(job)
        return cls(job, LanguageStudent.from_job(job), corpus)

    def sum_losses(self, engine: Engine, batch: PackedBatch) -> StepLosses:
        """Puts a micro-batch through the model."""
        losses, weights_N = _forward(engine, batch, self.spec)
        sums_L = (losses.terms_LN.double() * weights_N.double()).sum(dim=1)
        return StepLosses(losses.total, dict(zip(term_names(self.spec), sums_L, strict=True)))

    def measure(self, engine: Engine) -> dict[str, float]:
        """Returns measures on the held-out rows; every rank must call it, without gradients."""
        sums = LanguageSums.empty(len(self._eval_spec.terms), engine.device)
        for batch in self._loader.evaluate(self._held_out, self._max_micro_batch):
            sums.add(*_forward(engine, batch, self._eval_spec))
        sums.share()
        return sums.measures(term_names(self.spec), self._cross_entropy)

    def save(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Writes the student."""
        self._student.save_pretrained(directory, state_dict=weights)


def spec_of(job: LanguageJob) -> LossSpec:
    """Returns a job's losses."""
    terms = tuple(LossTerm(term.name, term.weight, term.temperature, term.beta) for term in job.losses)
    weights = tuple(teacher.weight for teacher in job.teachers)
    return LossSpec(terms, weights or None)


def term_names(spec: LossSpec) -> list[str]:
    """Returns a name for each term: the loss's, with the temperature where it is not 1."""
    names: list[str] = []
    for term in spec.terms:
        name = term.name if term.temperature == 1 else f"{term.name}_t{term.temperature:g}"
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def _with_cross_entropy(spec: LossSpec) -> tuple[LossSpec, int]:
    for place, term in enumerate(spec.terms):
        if term.name == "cross_entropy":
            return spec, place
    terms = (*spec.terms, LossTerm("cross_entropy", weight=0.0))
    return LossSpec(terms, spec.teacher_weights), len(spec.terms)


def _forward(engine: Engine, batch: PackedBatch, spec: LossSpec) -> tuple[FusedLosses, torch.Tensor]:
    device = engine.device
    targets = tuple(each.to(device) for each in batch.targets)
    fields = engine(
        batch.input_ids_BL.to(device),
        batch.positions_BL.to(device),
        batch.segments_BL.to(device),
        batch.places_N.to(device),
        targets,
        spec,
    )
    return as_losses(fields), targets[0].position_weights_N
