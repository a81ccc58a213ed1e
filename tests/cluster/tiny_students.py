"""A finished student on disk, without a training, and a corpus and a store for it."""

from __future__ import annotations

from pathlib import Path

from cluster.arms import StudentRun
from cluster.scoring import EvaluationCorpus, FinishedStudent
from cluster.student_task import StudentTask, write_task
from distill.student import MultiHeadStudent
from schemas.recipe import Arm, Corpus, Recipe
from schemas.records import LockedPart
from tests.distill.tiny_models import config_init, save_tokenizer
from tests.store_factory import make_part, make_store

LABELS = ("yes", "no")
TEXTS = [("what is a", "a b"), ("what is a", "c d"), ("what is b", "e"), ("what is b", "f g h"), ("do", "c")]
GOLDEN = [0, 1, 1, 0, -1]


def save_student(directory: Path, *, seed: int = 1, task: bool = True) -> Path:
    """Writes a student with a golden head and one teacher's."""
    tokenizer = save_tokenizer(directory.parent / "tokenizer")
    student = MultiHeadStudent.from_init(config_init(tokenizer), ("golden", "t"), LABELS, seed, max_length=24)
    student.save_pretrained(directory)
    if task:
        write_task(
            StudentTask(
                text=("question", "passage"), labels=LABELS, question="question", arm="m-o-1", seed=5
            ),
            directory,
        )
    return directory


def finished(
    directory: Path, arm: Arm = "m-o-1", *, seed: int = 5, fingerprint: str = "f"
) -> FinishedStudent:
    """Returns a student of an arm."""
    return FinishedStudent(StudentRun(arm, seed), directory, fingerprint)


def make_corpus(root: Path, *, logits: object = None, excluded: tuple[int, ...] = ()) -> EvaluationCorpus:
    """Writes the corpus and, where logits are given, teacher ``t``'s store with labels in turned order."""
    part = make_part(root / "rows.arrow", TEXTS, GOLDEN, shard_rows=4)
    stores = {}
    if logits is not None:
        stores["t"] = str(
            make_store(root / "store", part.plan, logits, labels=LABELS[::-1], teacher="t", excluded=excluded)  # type: ignore[arg-type]
        )
    locked = LockedPart(
        part="train",
        fingerprint=part.source.fingerprint,
        plan_hash=part.source.plan_hash,
        num_rows=len(TEXTS),
        shard_rows=4,
        rows=part.source.rows,
        stores=stores,
    )
    return EvaluationCorpus("dev", corpus(), (locked,))


def corpus() -> Corpus:
    """Describes it."""
    return Corpus.model_validate(
        {
            "labels": LABELS,
            "text": ["question", "passage"],
            "question": "question",
            "parts": [{"kind": "file", "path": "dev.jsonl"}],
        }
    )


def make_recipe(out: Path) -> Recipe:
    """A recipe that trains m-o-1 and evaluates on the corpus."""
    stage = {"kind": "finetune", "corpus": "dev", "teachers": ["t"]}
    return Recipe.model_validate(
        {
            "name": "run",
            "out": str(out),
            "corpora": {"dev": corpus()},
            "teachers": [{"name": "t", "model": "m"}],
            "student": {"init": {"kind": "layers", "model": "m"}, "arm": "m-o-1"},
            "stages": [stage],
            "compare": {"arms": []},
            "evaluation": {"corpora": ["dev"], "speed_rows": 3},
        }
    )
