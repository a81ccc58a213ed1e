"""``tmkd plan`` of a language recipe: what its policy and others would cost and lose, before it is paid for.

Each teacher runs over a small sample of its corpora: chunks at even distances, the same ones every time.

Invariants (tests/cluster/language/test_keep_plan.py):
    1. What precompute would refuse of the teachers is refused here, and a student with too few positions.
    2. The sample depends on the corpora and its size alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.console import say
from cluster.language.arms import used_teachers
from cluster.language.gradient_angle import (
    SampleStudent,
    Turn,
    WholeGradients,
    measure_turn,
)
from cluster.language.models import find_init, find_teachers
from cluster.language.planning import PlannedText, plan_chunks
from cluster.language.stores import make_request
from cluster.run_context import available_cpus, available_device
from cluster.run_directory import RunDirectory
from cluster.teacher_model import TeacherModel
from distill.language_model import build_language_model, load_language_tokenizer
from distill.language_student import LanguageStudent
from distill.skeleton import check_length as check_student_length
from precompute.candidates import Candidate, list_candidates
from precompute.chunking import ChunkedPart
from precompute.keep_trial import Pilot, run_trial
from precompute.language_forward import ChunkRows
from precompute.language_teacher import LoadedLanguageModel
from precompute.pretrained import check_length as check_teacher_length
from precompute.stores import StoreSettings, StoreTarget, describe_targets
from precompute.tasks import LanguageWorkerSpec
from precompute.trial_bytes import CorpusSize
from precompute.trial_sample import CandidateOutcome, TrialOutcome, TrialSample
from schemas.chunks import open_chunks, view_chunks
from schemas.codec import CODECS
from schemas.digest import write_document
from schemas.errors import RecipeError
from schemas.keep_trial import CandidateTrial, KeepPlan, KeepTrial, LossTrial, Quantisation, TrialSize
from schemas.language import CodecName, LanguageRecipe, LossName
from schemas.token_generation import read_generation

PLAN_FILE = "plan.json"
CHART_FILE = "plan.png"
SAMPLE_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Of a sample, about, where it is not said."""


@dataclass(frozen=True)
class KeepPlanFiles:
    """A plan, and where it lies."""

    plan: KeepPlan
    document: Path
    chart: Path


def plan_keeping(
    recipe: LanguageRecipe, *, sample_tokens: int | None = None, codecs: Sequence[str] = ()
) -> KeepPlanFiles:
    """Tries keep policies with each teacher that has a model, and writes what came out into the run.

    Args:
        recipe: The recipe.
        sample_tokens: Tokens of a sample, about.
        codecs: Names of codecs to try besides each teacher's own.

    Raises:
        RecipeError: There is no such codec.
        TmkdError: What ``precompute`` would refuse; or a teacher or the student cannot be loaded or run.
    """
    from cluster.language.keep_chart import draw_plan

    further = check_codecs(codecs)
    directory = RunDirectory.of(recipe)
    directory.run.mkdir(parents=True, exist_ok=True)
    planned = plan_chunks(recipe, directory)
    models = find_teachers(recipe, directory, used_teachers(recipe))
    targets = {
        name: _describe_targets(recipe, directory, planned, name, model) for name, model in models.items()
    }
    trials = tuple(
        _try_teacher(recipe, directory, found, sample_tokens, further) for found in targets.values()
    )
    plan = KeepPlan(run=recipe.name, gpu_hour_price=recipe.gpu_hour_price, trials=trials)
    document, chart = directory.run / PLAN_FILE, directory.run / CHART_FILE
    write_document(document, plan.model_dump(mode="json"))
    draw_plan(plan, chart)
    return KeepPlanFiles(plan, document, chart)


def check_codecs(names: Sequence[str]) -> tuple[CodecName, ...]:
    """Returns the codecs of these names.

    Raises:
        RecipeError: There is no such codec.
    """
    for name in names:
        if name not in CODECS:
            raise RecipeError(f"--codec: there is no codec {name}; there are {', '.join(CODECS)}")
    return tuple(CODECS[name].name for name in names)


def choose_chunks(num_chunks: int, num_tokens: int, wanted_tokens: int) -> npt.NDArray[np.int64]:
    """Returns which chunks a sample has: about as many tokens as wanted, at even distances, ascending.

    Args:
        num_chunks: Of the corpora.
        num_tokens: Of these chunks.
        wanted_tokens: Of the sample.
    """
    num = int(np.clip(round(wanted_tokens * num_chunks / num_tokens), 1, num_chunks))
    return ((np.arange(num) + 0.5) * num_chunks / num).astype(np.int64)


def take_sample(
    targets: Sequence[StoreTarget], wanted_tokens: int, batch_rows: int
) -> tuple[TrialSample, CorpusSize]:
    """Reads a sample of the parts that a teacher has to run over.

    Returns:
        The sample, and what there is of all parts.
    """
    size = measure_parts(targets, batch_rows)
    chosen = choose_chunks(size.num_chunks, size.num_tokens, wanted_tokens)
    pieces, start = [], 0
    for target in targets:
        spec, table = open_chunks(target.request.part.rows_path)
        inner = chosen[(chosen >= start) & (chosen < start + table.num_rows)] - start
        pieces.append(table.take(pa.array(inner)).replace_schema_metadata(None))
        start += table.num_rows
    table = pa.concat_tables(pieces)
    rows = ChunkRows(
        chunks=view_chunks(table),
        example_ids=tuple(table.column("example_id").to_pylist()),
        objective_shift=1 if spec.objective == "causal" else 0,
        mask_token=spec.mask.token if spec.mask else None,
    )
    generation = read_generation(targets[0].identity, store=targets[0].root)
    return TrialSample(table, rows, generation, batch_rows), size


def measure_parts(targets: Sequence[StoreTarget], batch_rows: int) -> CorpusSize:
    """Adds up the parts that a teacher has to run over, as their stores cut them."""
    parts = [target.request.part for target in targets]
    shards = [task.num_rows for target in targets for task in target.plan.tasks()]
    return CorpusSize(
        num_chunks=sum(part.num_rows for part in parts),
        num_tokens=sum(part.num_tokens for part in parts if isinstance(part, ChunkedPart)),
        num_positions=sum(part.num_positions for part in parts if isinstance(part, ChunkedPart)),
        num_shards=len(shards),
        num_batches=sum(-(-rows // batch_rows) for rows in shards),
    )


def _describe_targets(
    recipe: LanguageRecipe,
    directory: RunDirectory,
    planned: Mapping[str, PlannedText],
    name: str,
    model: TeacherModel,
) -> list[StoreTarget]:
    requests = [
        make_request(recipe, name, model, part)
        for corpus in used_teachers(recipe)[name]
        for part in planned[corpus].parts
    ]
    settings = StoreSettings(directory.stores, directory.hash_cache, recipe.store)
    return describe_targets(requests, settings)


def _try_teacher(
    recipe: LanguageRecipe,
    directory: RunDirectory,
    targets: Sequence[StoreTarget],
    sample_tokens: int | None,
    codecs: Sequence[CodecName],
) -> KeepTrial:
    spec = _choose_device(targets[0].spec)
    teacher = spec.teacher
    wanted = sample_tokens or SAMPLE_TOKENS[spec.device]
    sample, size = take_sample(targets, wanted, recipe.store.batch_rows)
    num_tokens = len(sample.rows.chunks.input_ids)
    say(f"teacher {teacher.name}: {num_tokens:,} of {size.num_tokens:,} tokens")
    model = LoadedLanguageModel.load(spec)
    check_teacher_length(model.model.config, sample.generation.chunks.max_length, teacher.name)
    tried = list(dict.fromkeys((teacher.codec, *codecs)))
    pilot = Pilot(model, sample, teacher.codec)
    candidates = list_candidates(
        teacher.keep, tried, sample.generation.vocab, pilot.measure, seed=getattr(teacher.keep, "seed", 0)
    )
    student = SampleStudent(_build_student(recipe, directory, spec), sample.rows, sample.generation.vocab)
    whole = WholeGradients(student)
    outcome = run_trial(model, sample, candidates, whole)
    # A student's gradients need the memory.
    del model, pilot
    say(f"  {len(candidates)} candidates, gradients of the student")
    turns = _measure_turns(student, whole, outcome.candidates)
    return _describe_trial(_Trial(recipe, spec, sample, size, outcome, turns), targets)


def _choose_device(spec: object) -> LanguageWorkerSpec:
    """Returns the actors' device and threads, or all CPUs where there is no GPU but they would have one."""
    if not isinstance(spec, LanguageWorkerSpec):
        raise TypeError("the targets are those of a classifier")
    if spec.device == "cuda" and available_device() == "cpu":
        teacher = spec.teacher.model_copy(update={"device_map": None})
        return replace(spec, teacher=teacher, device="cpu", num_threads=available_cpus())
    return spec


def _build_student(
    recipe: LanguageRecipe, directory: RunDirectory, spec: LanguageWorkerSpec
) -> LanguageStudent:
    init, _ = find_init(recipe, directory)
    tokenizer = load_language_tokenizer(init)
    model = build_language_model(init, recipe.objective, tokenizer, recipe.seed)
    check_student_length(model, recipe.student.max_length)
    if recipe.stages[0].freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)
    return LanguageStudent(model, tokenizer, recipe.objective).to(spec.device)


def _measure_turns(
    student: SampleStudent, whole: WholeGradients, outcomes: Iterable[CandidateOutcome]
) -> dict[tuple[Candidate, LossName], Turn]:
    reference = student.through_model(whole.exact)
    turns: dict[tuple[Candidate, LossName], Turn] = {}
    for outcome in outcomes:
        candidate, kept = outcome.candidate, outcome.decoded
        for loss in outcome.losses:
            if kept is None:
                gradient = whole.decoded[candidate.codec]
            else:
                gradient = student.add_kept(kept, candidate.policy, loss)
            turns[candidate, loss] = measure_turn(student.through_model(gradient), reference)
    return turns


@dataclass(frozen=True)
class _Trial:
    """What is known of a trial when it is over."""

    recipe: LanguageRecipe
    spec: LanguageWorkerSpec
    sample: TrialSample
    size: CorpusSize
    outcome: TrialOutcome
    turns: Mapping[tuple[Candidate, LossName], Turn]

    @property
    def num_tokens(self) -> int:
        """Of the sample."""
        return len(self.sample.rows.chunks.input_ids)


def _describe_trial(trial: _Trial, targets: Sequence[StoreTarget]) -> KeepTrial:
    spec, size, sample = trial.spec, trial.size, trial.sample
    init = trial.recipe.student.init
    source = getattr(init, "model", None) or init.config.get("model_type", "model")  # type: ignore[union-attr]
    return KeepTrial(
        teacher=spec.teacher.name,
        vocab=sample.generation.vocab,
        sample=TrialSize(
            num_chunks=len(sample.rows.example_ids),
            num_tokens=trial.num_tokens,
            num_positions=trial.outcome.candidates[0].sizes.num_positions,
        ),
        corpora=TrialSize(
            num_chunks=size.num_chunks, num_tokens=size.num_tokens, num_positions=size.num_positions
        ),
        corpus_names=tuple(dict.fromkeys(target.request.part.corpus for target in targets)),
        num_shards=size.num_shards,
        device=spec.device,
        num_threads=spec.num_threads,
        tokens_per_s=trial.num_tokens / trial.outcome.forward_s,
        num_actors=spec.teacher.num_actors,
        gpus_per_actor=spec.teacher.gpus_per_actor,
        perplexity=trial.outcome.perplexity,
        calibration_error=trial.outcome.calibration_error,
        student=f"{init.kind} of {Path(source).name}",
        candidates=tuple(_describe_candidate(trial, one) for one in trial.outcome.candidates),
    )


def _describe_candidate(trial: _Trial, one: CandidateOutcome) -> CandidateTrial:
    teacher, size = trial.spec.teacher, trial.size
    store_bytes = one.sizes.project(size)
    teacher_s = (trial.outcome.forward_s + one.seconds) / trial.num_tokens * size.num_tokens
    has_gpu = trial.spec.device == "cuda" and teacher.gpus_per_actor > 0
    gpu_hours = teacher_s * teacher.gpus_per_actor / 3600 if has_gpu else None
    price = trial.recipe.gpu_hour_price
    return CandidateTrial(
        policy=one.candidate.policy,
        codec=one.candidate.codec,
        is_recipe=one.candidate.is_recipe,
        mean_kept=one.mean_kept,
        missed_mass=one.missed_mass,
        entry_bytes=one.sizes.entries / one.sizes.num_positions,
        row_bytes=store_bytes / size.num_positions,
        store_bytes=store_bytes,
        quantisation=Quantisation(
            total_variation=one.quantisation[0], divergence=_finite(one.quantisation[1])
        ),
        teacher_s=teacher_s,
        wall_s=teacher_s / teacher.num_actors,
        gpu_hours=gpu_hours,
        cost=None if gpu_hours is None or price is None else gpu_hours * price,
        losses=tuple(
            LossTrial(
                loss=loss,
                total_variation=found.total_variation,
                kl_to_full=_finite(found.kl_to_full),
                kl_from_full=_finite(found.kl_from_full),
                calibration_error=min(found.calibration_error, 1.0),
                gradient_angle=trial.turns[one.candidate, loss].angle,
                gradient_ratio=trial.turns[one.candidate, loss].ratio,
            )
            for loss, found in one.losses.items()
        ),
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
