"""The evaluation step: which models are run, what is written, and what a stop and a restart cost."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from cluster.language import evaluation as evaluation_module
from cluster.language.arms import FinishedLanguageStudent, LanguageRun
from cluster.language.evaluation import evaluate_students
from cluster.language.planning import PlannedText
from cluster.run_context import RunOf, RunOptions
from cluster.run_directory import RunDirectory
from cluster.steps import StepLog
from cluster.teacher_model import TeacherModel
from precompute.interrupt import StopFlag
from precompute.language_teacher import LoadedLanguageModel
from schemas.errors import InterruptedRunError
from schemas.language import LanguageRecipe
from schemas.language_evaluation import read_any_evaluation
from tests.precompute.tiny_language import (
    chunk_corpus,
    make_corpus,
    make_documents,
    save_tiny_llama,
    write_corpus,
)

KL = {"name": "ghost_kl"}
CE = {"name": "cross_entropy"}


def make_recipe(root: Path, **fields: Any) -> LanguageRecipe:
    """A recipe with a teacher, a taught student and one of cross-entropy alone."""
    corpus = make_corpus(root / "dev.jsonl")
    return LanguageRecipe.model_validate(
        {
            "task": "language",
            "name": "run",
            "out": str(root / "runs"),
            "corpora": {"dev": corpus},
            "teachers": [
                {"name": "t", "model": str(root / "t"), "gguf_file": "converted.gguf"},
                {"name": "stored", "stores": ["somewhere"]},
            ],
            "student": {"init": {"kind": "layers", "model": str(root / "t")}},
            "stages": [{"corpus": "dev", "teachers": ["t"], "losses": [KL]}],
            "compare": {"arms": [{"name": "plain", "losses": [CE]}], "seeds": [1, 2]},
            "evaluation": {"corpora": ["dev"]},
        }
        | fields
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    write_corpus(root / "dev.jsonl", [{"text": text} for text in make_documents(12)])
    for seed, name in enumerate(("t", "student-1", "student-2", "plain-1", "plain-2")):
        save_tiny_llama(root / name, seed=seed)
    return root


@pytest.fixture(scope="module")
def planned(root: Path) -> dict[str, PlannedText]:
    parts = chunk_corpus(make_corpus(root / "dev.jsonl"), root / "t", root / "runs")
    return {"dev": PlannedText(parts, parts[0].spec)}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    original = LoadedLanguageModel.load

    def load(spec: Any) -> LoadedLanguageModel:
        names.append(Path(spec.model_path).name)
        return original(spec)

    monkeypatch.setattr(LoadedLanguageModel, "load", load)
    return names


def make_run(recipe: LanguageRecipe, tmp_path: Path) -> RunOf[LanguageRecipe]:
    directory = RunDirectory.of(recipe.model_copy(update={"out": str(tmp_path)}))
    directory.run.mkdir(parents=True, exist_ok=True)
    return RunOf(recipe, RunOptions(), directory, StepLog.open(directory.timings), StopFlag())


def students_of(root: Path) -> list[FinishedLanguageStudent]:
    return [
        FinishedLanguageStudent(LanguageRun(arm, seed), root / f"{arm}-{seed}", f"{arm}-{seed}")
        for arm in ("student", "plain")
        for seed in (1, 2)
    ]


def teachers_of(root: Path) -> dict[str, TeacherModel]:
    return {"t": TeacherModel(str(root / "t"))}


def test_teachers_and_students_are_measured_and_written_down(
    root: Path, planned: dict[str, PlannedText], tmp_path: Path, loads: list[str]
) -> None:
    run = make_run(make_recipe(root), tmp_path)
    evaluation = evaluate_students(run, planned, students_of(root), teachers_of(root))
    assert read_any_evaluation(run.directory.evaluation) == evaluation
    assert loads == ["t", "student-1", "student-2", "plain-1", "plain-2"]
    (corpus,) = evaluation.corpora
    assert [row.name for row in corpus.models if row.level == 0] == ["t", "student", "plain"]
    rows = {row.name: row for row in corpus.models}
    assert (rows["student"].teachers, rows["plain"].teachers) == (("t",), ())
    (comparison,) = corpus.comparisons
    assert (comparison.student, comparison.baseline, comparison.is_main) == ("student", "plain", True)
    # A start later nothing is run again, and the document is the same, byte for byte.
    before = run.directory.evaluation.read_bytes()
    evaluate_students(run, planned, students_of(root), teachers_of(root))
    assert len(loads) == 5
    assert run.directory.evaluation.read_bytes() == before


def test_teachers_that_differ_by_what_is_kept_alone_are_one_model(
    root: Path, planned: dict[str, PlannedText], tmp_path: Path, loads: list[str]
) -> None:
    model = str(root / "t")
    teachers = [
        {"name": "t", "model": model},
        {"name": "drawn", "model": model, "keep": {"kind": "sampled", "num_samples": 9}},
        {"name": "half", "model": model, "dtype": "bfloat16"},
    ]
    run = make_run(make_recipe(root, teachers=teachers), tmp_path)
    at = TeacherModel(model)
    evaluation = evaluate_students(run, planned, students_of(root)[:1], {"t": at, "drawn": at, "half": at})
    (corpus,) = evaluation.corpora
    assert [row.name for row in corpus.models] == ["t", "half", "student"]
    assert set(corpus.models[2].agreement) == {"t", "half"}
    assert loads == ["t", "t", "student-1"]
    assert corpus.notes[-1] == "t stands for drawn too: what is kept differs, the model does not"


def test_a_recipe_may_leave_the_teachers_out(
    root: Path, planned: dict[str, PlannedText], tmp_path: Path, loads: list[str]
) -> None:
    recipe = make_recipe(root, evaluation={"corpora": ["dev"], "with_teachers": False})
    run = make_run(recipe, tmp_path)
    evaluation = evaluate_students(run, planned, students_of(root)[:1], teachers_of(root))
    assert [row.name for row in evaluation.corpora[0].models] == ["student"]
    assert loads == ["student-1"]


def test_a_request_to_stop_is_heard_between_two_batches_and_what_was_measured_stays(
    root: Path,
    planned: dict[str, PlannedText],
    tmp_path: Path,
    loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(make_recipe(root), tmp_path)
    original = LoadedLanguageModel.encode
    batches: list[str] = []

    def encode(self: LoadedLanguageModel, *inputs: Any) -> Any:
        batches.append(self.spec.model_path)
        if batches.count(self.spec.model_path) == 1 and self.spec.model_path.endswith("student-1"):
            run.stop.set(signal.SIGTERM)
        return original(self, *inputs)

    monkeypatch.setattr(LoadedLanguageModel, "encode", encode)
    with pytest.raises(InterruptedRunError) as caught:
        evaluate_students(run, planned, students_of(root), teachers_of(root))
    assert caught.value.exit_code == 143
    assert not run.directory.evaluation.exists()
    assert loads == ["t", "student-1"]
    again = make_run(make_recipe(root), tmp_path)
    evaluate_students(again, planned, students_of(root), teachers_of(root))
    # The teacher was measured already.
    assert loads[2:] == ["student-1", "student-2", "plain-1", "plain-2"]


def test_a_person_is_told_each_models_figure(
    root: Path, planned: dict[str, PlannedText], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(evaluation_module, "say", said.append)
    run = make_run(make_recipe(root), tmp_path)
    evaluation = evaluate_students(run, planned, students_of(root)[:1], teachers_of(root))
    teacher = evaluation.corpora[0].models[0]
    assert said[0].startswith(f"  teachers/t: {teacher.nll:.3f} nats a position on dev (")
    evaluate_students(run, planned, students_of(root)[:1], teachers_of(root))
    assert said[2].endswith("(measured already)")
