"""What stored token-level teachers cost a student's step, and what a teacher in the loop would.

    python -m benchmarks.language_step --model DIR

Prints one JSON object. A step is what a stage takes: rows read from chunks and stores and packed, forward,
backward, clipping, AdamW, record; 2 x 512 tokens, nothing read ahead. All ways train one student in turns.

    stored_over_cross_entropy: time of the step with a stored teacher over that with cross-entropy over the
        same fused and chunked head, and the peak of resident memory likewise, each in a process of its
        own. Goals, for ghost KL on top_k 64: 1.05 and 1.1.
    stored_over_in_loop: over the step in which the teacher runs on the same sequences and gives a dense KL,
        chunked over positions in both heads. Goal: 0.35. How far that can go depends on the sizes of
        both models: ``multiply_adds`` says what the ratio of matrix products alone is.

Students: ``first-6``: the model's first 6 layers; ``narrow``: a random one of 192 x 4 layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.language_inputs import (
    Inputs,
    OpenStore,
    PeakMemory,
    add_inputs,
    compare,
    interleave,
    open_worker,
    run_apart,
)
from distill.engine import start_process_group, stop_process_group
from distill.language_corpus import LanguageCorpus
from distill.language_loader import PackedBatch
from distill.language_student import LanguageStudent
from distill.language_task import LanguageTask
from distill.skeleton import quiet_transformers
from distill.stage_directory import StageDirectory
from distill.stage_task import StepLosses
from distill.stage_trainer import StageTrainer
from distill.stop_request import StopRequest
from schemas.job import LanguageJob, PartSource, TokenTeacher
from schemas.language import (
    LanguageConfigInit,
    LanguageLayersInit,
    LanguageStage,
    LossTerm,
    TokenStoreOptions,
)
from schemas.plan import Plan
from schemas.records import MANIFEST_FILE

MODULE = "benchmarks.language_step"
LENGTH = 512
PACKS = 2
STEPS_AN_EPOCH = 4
CHARACTERS = 8 * LENGTH * 6
CROSS_ENTROPY, IN_LOOP, GHOST = "cross_entropy", "in_loop", "top_k, ghost_kl"
# Of each way: the policy of the store, and the loss.
WAYS: Mapping[str, tuple[str | None, LossTerm]] = {
    CROSS_ENTROPY: (None, LossTerm(name="cross_entropy")),
    GHOST: ("top_k", LossTerm(name="ghost_kl")),
    "top_k, ghost_kl, T = 2": ("top_k", LossTerm(name="ghost_kl", temperature=2.0)),
    "top_p, ghost_kl": ("top_p", LossTerm(name="ghost_kl")),
    "sampled, unbiased_kl": ("sampled", LossTerm(name="unbiased_kl")),
    "hybrid, unbiased_kl": ("hybrid", LossTerm(name="unbiased_kl")),
    IN_LOOP: (None, LossTerm(name="cross_entropy")),
}
GOALS = {"time_over_cross_entropy": 1.05, "peak_over_cross_entropy": 1.1, "time_over_in_loop": 0.35}
NARROW = {
    "model_type": "llama",
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# Logits of a chunk of the dense loss: as many as the student's own head makes.
DENSE_ELEMENTS = 2**23


class Bench:
    """One student, and the data of each way."""

    def __init__(self, options: argparse.Namespace, root: Path, ways: list[str]) -> None:
        self.options = options
        self.inputs = Inputs.make(options, root, LENGTH, None if options.quick else CHARACTERS)
        self._root = root
        self._fill_stores({policy for policy, _ in map(WAYS.__getitem__, ways) if policy is not None})
        jobs = {way: self._job(*WAYS[way]) for way in ways}
        first = next(iter(jobs.values()))
        self.student = LanguageStudent.from_job(first)
        self.teacher = self._load_teacher() if IN_LOOP in ways else None
        tasks = {way: self._task(way, job) for way, job in jobs.items()}
        directory = StageDirectory(Path(first.output))
        directory.create()
        self.trainer = StageTrainer(first, directory, StopRequest(directory), next(iter(tasks.values())))
        self.ways = {way: self._stepper(task) for way, task in tasks.items()}

    def _fill_stores(self, policies: set[str]) -> None:
        """Runs the teacher over the text once for each policy."""
        options = TokenStoreOptions(shard_rows=PACKS * STEPS_AN_EPOCH)
        threads = {"cpus_per_actor": self.options.threads, "temperatures": (2.0,)}
        targets = {name: self.inputs.target(name, options, **threads) for name in sorted(policies)}
        self._stores = {name: str(target.root) for name, target in targets.items()}
        self._source = self._describe_part(options)
        if all((Path(root) / MANIFEST_FILE).exists() for root in self._stores.values()):
            return
        worker = open_worker(next(iter(targets.values())))
        for target in targets.values():
            OpenStore(target, options).fill(worker)
        worker.close()

    def _describe_part(self, options: TokenStoreOptions) -> PartSource:
        target = self.inputs.target("top_k", options)
        plan: Plan = target.plan
        return PartSource(
            rows=str(self.inputs.part.rows_path),
            fingerprint=self.inputs.part.fingerprint,
            plan_hash=plan.plan_hash,
            num_rows=plan.num_rows,
            shard_rows=options.shard_rows,
        )

    def _job(self, policy: str | None, loss: LossTerm) -> LanguageJob:
        model = str(self.inputs.model)
        init: LanguageLayersInit | LanguageConfigInit
        if self.options.student == "narrow":
            init = LanguageConfigInit(kind="config", config=NARROW, tokenizer=model)
        else:
            layers = 2 if self.options.quick else 6
            init = LanguageLayersInit(kind="layers", model=model, layers=layers)
        spec = self.inputs.part.spec
        teachers = () if policy is None else (TokenTeacher(name=policy, stores=(self._stores[policy],)),)
        training = {
            "corpus": "text",
            "teachers": tuple(teacher.name for teacher in teachers),
            "losses": (loss,),
            "rows": {"first": PACKS * STEPS_AN_EPOCH},
            "max_steps": 10_000,
            "global_batch": PACKS,
            "max_micro_batch": PACKS,
            "learning_rate": 1e-6,
            "selection_fraction": 0.0,
        }
        return LanguageJob(
            name="benchmark",
            output=str(self._root / "student"),
            init=init,
            tokenizer=spec.tokenizer,
            vocab=spec.vocab,
            max_length=self.inputs.corpus.max_length,
            parts=(self._source,),
            teachers=teachers,
            training=LanguageStage.model_validate(training),
            selection_seed=0,
            seed=0,
            threads=self.options.threads,
        )

    def _load_teacher(self) -> Any:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(self.inputs.model, dtype=torch.float32)
        return model.eval()

    def _task(self, way: str, job: LanguageJob) -> LanguageTask:
        make = LanguageTask if way != IN_LOOP else _InLoopTask
        task = make(job, self.student, LanguageCorpus.open(job))
        if isinstance(task, _InLoopTask):
            task.take_teacher(self.student, self.teacher)
        loader = task.frame.source
        # Else one way's rows would be read in another's time.
        loader._options = dataclasses.replace(loader._options, prefetch=0)  # type: ignore[attr-defined]
        return task

    def _stepper(self, task: LanguageTask) -> Callable[[int], None]:
        source = task.frame.source
        steps = iter(source.steps(source.start(), 10_000))

        def take(_round: int) -> None:
            trainer = self.trainer
            trainer._task = task
            trainer._take_step(next(steps), epoch=0)
            trainer.step += 1

        return take


class _InLoopTask(LanguageTask):
    """A student that learns from a teacher beside it."""

    def take_teacher(self, student: LanguageStudent, teacher: Any) -> None:
        """Says who teaches whom."""
        self._pair = (student, teacher)

    def sum_losses(self, engine: Any, batch: PackedBatch) -> StepLosses:  # noqa: ARG002
        """Runs both models and compares whole distributions."""
        student, teacher = self._pair
        with torch.inference_mode():
            known_BLD = teacher.model(
                input_ids=batch.input_ids_BL, position_ids=batch.positions_BL, use_cache=False
            ).last_hidden_state
        known_ND = known_BLD.flatten(0, 1)[batch.places_N].clone()
        hidden_BLD = student.encode(batch.input_ids_BL, batch.positions_BL, batch.segments_BL)
        hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, batch.places_N)
        total = _DenseDivergence.apply(hidden_ND, student.head.weight, known_ND, teacher.lm_head.weight)
        return StepLosses(total, {"cross_entropy": total.detach().double()})


class _DenseDivergence(torch.autograd.Function):
    """KL of whole distributions, chunked over positions; the gradient is made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, known_NE: Tensor, weight_VE: Tensor
    ) -> Tensor:
        of_hidden_ND, of_weight_VD = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD)
        total = hidden_ND.new_zeros(())
        chunk = -(-DENSE_ELEMENTS // weight_VD.shape[0])
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            log_p_MV = torch.log_softmax(known_NE[rows] @ weight_VE.T, dim=1)
            log_q_MV = torch.log_softmax(hidden_ND[rows] @ weight_VD.T, dim=1)
            p_MV = log_p_MV.exp()
            total += torch.linalg.vecdot(p_MV, log_p_MV.sub_(log_q_MV)).sum()
            gradient_MV = log_q_MV.exp_().sub_(p_MV)
            of_hidden_ND[rows] = gradient_MV @ weight_VD
            of_weight_VD.addmm_(gradient_MV.T, hidden_ND[rows])
        ctx.gradients = (of_hidden_ND, of_weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_hidden_ND, of_weight_VD = ctx.gradients
        return of_hidden_ND.mul_(scale), of_weight_VD.mul_(scale), None, None


def count_multiply_adds(bench: Bench) -> dict[str, float]:
    """Returns a token's multiply-adds in matrix products, in millions, and the ratio that they allow."""

    def size(model: Any) -> int:
        embeddings = model.get_input_embeddings().weight
        inner = sum(p.numel() for p in model.base_model.parameters() if p is not embeddings and p.dim() > 1)
        return inner + embeddings.numel()

    student, teacher = 3 * size(bench.student.model), size(bench.teacher)
    return {
        "student_step": round(student / 1e6, 1),
        "teacher_forward": round(teacher / 1e6, 1),
        "student_over_both": round(student / (student + teacher), 3),
    }


def measure_peak(options: argparse.Namespace) -> dict[str, int]:
    """Returns this process's peak over a step, after one that does not count, in bytes."""
    way = options.peak_of
    bench = Bench(options, options.root, [way])
    bench.ways[way](0)
    memory = PeakMemory()
    bench.ways[way](1)
    return {"before": memory.before, "peak": memory.peak()}


def measure_memory(arguments: list[str], ways: list[str]) -> dict[str, Any]:
    """Returns the peak of each way, over that of cross-entropy too."""
    peaks = {way: run_apart(MODULE, [*arguments, "--peak-of", way])["peak"] for way in ways}
    return {
        way: {"peak_mb": round(peak / 1e6, 1), "over_cross_entropy": round(peak / peaks[CROSS_ENTROPY], 3)}
        for way, peak in peaks.items()
    }


def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Returns time and memory of all ways."""
    bench = Bench(options, root, list(WAYS))
    seconds = interleave(bench.ways, options.rounds, warm_up=2)
    result: dict[str, Any] = {
        "multiply_adds": count_multiply_adds(bench),
        "time": {
            "over_cross_entropy": compare(seconds, CROSS_ENTROPY),
            "over_in_loop": compare(seconds, IN_LOOP),
        },
    }
    del bench
    if not options.no_memory:
        result["memory"] = measure_memory(_pass_on(options, root), list(WAYS))
    return result


def main(arguments: list[str] | None = None) -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--student", choices=("first-6", "narrow"), default="first-6")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak-of", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = min(options.rounds, 2)
    start_process_group(threads=options.threads)
    if options.peak_of:
        print(json.dumps(measure_peak(options)))
        stop_process_group()
        return
    with tempfile.TemporaryDirectory() as directory:
        result = measure(options, Path(directory))
    stop_process_group()
    head = {"student": options.student, "threads": options.threads, "rounds": options.rounds, "goals": GOALS}
    print(json.dumps({**head, **result}, indent=1))


def _pass_on(options: argparse.Namespace, root: Path) -> list[str]:
    """Returns the arguments that a process of its own needs; it finds the stores there."""
    found = ["--text", str(options.text), "--threads", str(options.threads), "--root", str(root)]
    found += ["--student", options.student]
    found += ["--model", str(options.model)] if options.model else []
    return found + (["--quick"] if options.quick else [])


if __name__ == "__main__":
    main()
