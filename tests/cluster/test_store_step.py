"""Which stores a run asks for."""

from __future__ import annotations

from pathlib import Path

from cluster.planning import PlannedCorpus
from cluster.run_context import Run, RunOptions
from cluster.run_directory import RunDirectory
from cluster.steps import StepLog
from cluster.store_step import store_requests
from cluster.teacher_model import TeacherModel
from precompute.interrupt import StopFlag
from precompute.materialised import MaterialisedPart
from schemas.recipe import Recipe

NAMES = ["asked", "left-out", "given"]


def make_run(directory: Path, *teachers: str) -> Run:
    """A run with two teachers that have a model and one that has stores."""
    corpus = {"labels": ["a", "b"], "text": ["x"], "parts": [{"kind": "file", "path": "x.jsonl"}]}
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "out": str(directory),
            "corpora": {"train": corpus, "test": corpus, "unused": corpus},
            "teachers": [
                {"name": "asked", "model": "m"},
                {"name": "left-out", "model": "m"},
                {"name": "given", "stores": ["/store"]},
            ],
            "student": {"init": {"kind": "layers", "model": "m"}, "arm": "m-o-1"},
            "stages": [{"kind": "finetune", "corpus": "train", "teachers": NAMES}],
            "evaluation": {"corpora": ["test"]},
        }
    )
    steps = StepLog(directory / "timings.json")
    return Run(recipe, RunOptions(teachers=teachers), RunDirectory.of(recipe), steps, StopFlag())


def request_names(run: Run) -> set[tuple[str, str, str]]:
    planned = {
        corpus: PlannedCorpus(
            tuple(
                MaterialisedPart(corpus, part, Path("/r"), "f" * 64, "b" * 64, 9, (), 9)
                for part in ("p", "p+1")
            )
        )
        for corpus in run.recipe.corpora
    }
    models = {"asked": TeacherModel("/m"), "left-out": TeacherModel("/m")}
    return {request.key for request in store_requests(run, planned, models)}


def test_every_teacher_runs_over_every_part_of_what_students_and_evaluation_use(tmp_path: Path) -> None:
    assert request_names(make_run(tmp_path)) == {
        (teacher, corpus, part) for teacher in NAMES for corpus in ("train", "test") for part in ("p", "p+1")
    }


def test_a_choice_of_teachers_never_leaves_out_given_stores_whose_cut_counts_for_all(tmp_path: Path) -> None:
    assert {teacher for teacher, _, _ in request_names(make_run(tmp_path, "asked"))} == {"asked", "given"}
