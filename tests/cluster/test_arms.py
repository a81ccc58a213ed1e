from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.arms import Inputs, StudentRun, stage_jobs, student_runs, used_teachers
from cluster.run_directory import RunDirectory
from cluster.teachers import teacher_job
from schemas.errors import DataError
from schemas.job import StudentInit
from schemas.recipe import Recipe
from schemas.records import LockedPart, StoresLock


def recipe(**changes: Any) -> Recipe:
    corpus = {"labels": ["a", "b"], "text": ["x"], "parts": [{"kind": "file", "path": "t.jsonl"}]}
    fields: dict[str, Any] = {
        "name": "run",
        "corpora": {"train": corpus, "raw": {**corpus, "label": None}, "test": corpus, "other": corpus},
        "teachers": [{"name": name, "model": "m", "label_map": {"L": "a"}} for name in ("t1", "t2")],
        "student": {"init": {"kind": "layers", "model": "m", "layers": 2}},
        "stages": [
            {"kind": "pretrain", "corpus": "raw", "teachers": ["t1", "t2"]},
            {"kind": "finetune", "corpus": "train", "teachers": ["t1", "t2"], "alpha": 0.7},
        ],
        "compare": {"arms": ["golden", "1-o-1", "1avg-o-1", "m-o-1", "m-o-m", "tkd"], "seeds": [1, 2]},
        "evaluation": {"corpora": ["test"]},
    }
    return Recipe.model_validate({**fields, **changes})


def inputs() -> Inputs:
    def part(name: str) -> LockedPart:
        stores = {teacher: f"/stores/{name}-{teacher}" for teacher in ("t1", "t2")}
        return LockedPart(
            part="p", fingerprint="f" * 64, plan_hash="a" * 64, num_rows=9, rows=f"/{name}", stores=stores
        )

    lock = StoresLock(corpora={name: (part(name),) for name in ("train", "raw", "test")})
    return Inputs(lock, {"raw": "/dropped/x.npy"}, "hash", threads=2)


def jobs(arm: Any, teacher: str | None = None) -> Any:
    return stage_jobs(recipe(), StudentRun(arm, 1, teacher), inputs(), Path("/students"))


def test_each_arm_has_its_students() -> None:
    names = [
        run.name
        for run in student_runs(recipe(compare={"arms": ["golden", "1-o-1", "m-o-m"], "seeds": [1, 2]}))
    ]
    assert names == [
        "tmkd/seed-1",
        "tmkd/seed-2",
        "golden/seed-1",
        "golden/seed-2",
        "1-o-1/t1/seed-1",
        "1-o-1/t2/seed-1",
        "1-o-1/t1/seed-2",
        "1-o-1/t2/seed-2",
    ]


def test_tmkd_has_two_stages_with_a_head_per_teacher() -> None:
    first, second = jobs("tmkd")
    assert first.prediction_heads() == ("t1", "t2")
    assert second.prediction_heads() == ("golden", "t1", "t2")
    assert (first.alpha, second.alpha) == (1.0, 0.7)
    assert first.dropped_rows == "/dropped/x.npy"
    assert second.dropped_rows is None
    assert second.soft_targets[1].stores == (("/stores/train-t2",),)
    assert isinstance(second.init, StudentInit)
    assert second.init.path == first.output + "/model"
    assert second.init.fingerprint == first.fingerprint()


def test_golden_has_one_stage_and_no_store() -> None:
    (job,) = jobs("golden")
    assert job.soft_targets == ()
    assert job.alpha == 0.0
    assert job.init_hash == "hash"


def test_golden_long_takes_as_many_steps_as_all_stages_of_tmkd() -> None:
    steps = {"pretrain": 70, "finetune": 30}
    counted = replace(inputs(), count_steps=lambda job: steps[job.output.rsplit("-", 1)[-1]])
    both = recipe(compare={"arms": ["golden", "golden-long"], "seeds": [1]})
    (job,) = stage_jobs(both, StudentRun("golden-long", 1), counted, Path("/students"))
    assert job.training.max_steps == 100
    assert job.soft_targets == ()
    assert (job.name, job.output) == (
        "golden-long/seed-1/stage-1",
        "/students/golden-long/seed-1/stage-1-finetune",
    )
    (golden,) = stage_jobs(both, StudentRun("golden", 1), counted, Path("/students"))
    assert golden.training.max_steps is None
    assert job.fingerprint() != golden.fingerprint()


def test_an_arm_may_have_fewer_seeds_or_fewer_teachers() -> None:
    compare = {
        "arms": ["golden", "1-o-1", "tkd"],
        "seeds": [1, 2],
        "arm_seeds": {"1-o-1": [2]},
        "teachers": {"tkd": ["t2"]},
    }
    names = [run.name for run in student_runs(recipe(compare=compare))]
    assert names[4:] == ["1-o-1/t1/seed-2", "1-o-1/t2/seed-2", "tkd/t2/seed-1", "tkd/t2/seed-2"]


def test_the_name_of_a_corpus_does_not_decide_a_weight() -> None:
    before = jobs("golden")[0]
    training = before.training.model_copy(update={"corpus": "renamed"})
    assert before.model_copy(update={"training": training}).fingerprint() == before.fingerprint()


def test_one_to_one_has_one_teacher_and_tkd_has_it_in_both_stages() -> None:
    (job,) = jobs("1-o-1", "t2")
    assert job.prediction_heads() == ("golden", "t2")
    first, second = jobs("tkd", "t2")
    assert first.prediction_heads() == ("t2",)
    assert second.prediction_heads() == ("golden", "t2")


def test_one_average_is_one_head_over_all_teachers_and_is_not_many_to_one() -> None:
    (job,) = jobs("1avg-o-1")
    assert job.prediction_heads() == ("golden", "average")
    assert job.soft_targets[0].teachers == ("t1", "t2")
    assert job.soft_targets[0].stores == (("/stores/train-t1",), ("/stores/train-t2",))
    (many,) = jobs("m-o-1")
    assert many.prediction_heads() == ("golden", "t1", "t2")


def test_label_maps_travel_with_the_job() -> None:
    assert jobs("m-o-1")[0].label_maps == {"t1": {"L": "a"}, "t2": {"L": "a"}}


def test_only_used_corpora_are_paid_for() -> None:
    assert used_teachers(recipe())["t1"] == ("raw", "train", "test")
    single = recipe(student={**recipe().student.model_dump(), "arm": "m-o-1"}, compare={"arms": ["golden"]})
    assert used_teachers(single) == {"t1": ("train", "test"), "t2": ("train", "test")}
    golden = recipe(student={**recipe().student.model_dump(), "arm": "golden"}, compare={"arms": []})
    assert used_teachers(golden) == {}


@pytest.mark.parametrize("seed", [1, 2])
def test_arms_share_seed_and_selection(seed: int) -> None:
    for arm in ("golden", "m-o-1", "tmkd"):
        job = stage_jobs(recipe(), StudentRun(arm, seed), inputs(), Path("/students"))[-1]
        assert (job.seed, job.selection_seed, job.threads) == (seed, 17, 2)


def test_a_student_may_be_trained_by_another_deepspeed_configuration_than_the_teachers() -> None:
    both = {"zero_optimization": {"stage": 2}}
    for student, own in ((None, both), ({}, {}), ({"bf16": {"enabled": True}}, {"bf16": {"enabled": True}})):
        teacher = {"name": "t1", "model": "m", "train": {"corpus": "train"}}
        fields = {**recipe().student.model_dump(), "arm": "m-o-1", "deepspeed": student}
        made = recipe(deepspeed=both, student=fields, teachers=[teacher, {"name": "t2", "model": "m"}])
        (job,) = stage_jobs(made, StudentRun("m-o-1", 1), inputs(), Path("/students"))
        assert job.deepspeed == own
        directory = RunDirectory.of(made)
        trained = teacher_job(made, made.teachers[0], job.parts, init_hash="hash", directory=directory)
        assert trained.deepspeed == both


def test_a_stage_1_without_the_students_teacher_is_left_out() -> None:
    stages = [
        {"kind": "pretrain", "corpus": "raw", "teachers": ["t1"]},
        {"kind": "finetune", "corpus": "train", "teachers": ["t1", "t2"]},
    ]
    both = recipe(stages=stages)
    kinds = {
        teacher: [job.name for job in stage_jobs(both, StudentRun("tkd", 1, teacher), inputs(), Path("/s"))]
        for teacher in ("t1", "t2")
    }
    assert [len(kinds["t1"]), len(kinds["t2"])] == [2, 1]


def test_a_golden_last_stage_has_the_golden_head_alone() -> None:
    stages = [
        {"kind": "pretrain", "corpus": "raw", "teachers": ["t1", "t2"]},
        {"kind": "finetune", "corpus": "train", "teachers": []},
    ]
    first, last = stage_jobs(
        recipe(stages=stages, compare={"arms": []}), StudentRun("tmkd", 1), inputs(), Path("/s")
    )
    assert first.prediction_heads() == ("t1", "t2")
    assert (last.prediction_heads(), last.alpha) == (("golden",), 0.0)


def test_a_student_without_teachers_does_not_select_by_the_soft_loss() -> None:
    stages = [
        {"kind": "finetune", "corpus": "train", "teachers": ["t1"], "metric": "soft_loss"},
    ]
    chosen = recipe(stages=stages, student=M_O_1, compare={"arms": ["golden"]})
    metrics = [
        stage_jobs(chosen, StudentRun(arm, 1), inputs(), Path("/s"))[0].training.metric
        for arm in ("m-o-1", "golden")
    ]
    assert metrics == ["soft_loss", None]


M_O_1 = {"init": {"kind": "layers", "model": "m", "layers": 2}, "arm": "m-o-1"}


@pytest.mark.parametrize("missing", ["store", "corpus"])
def test_what_precompute_has_not_made_yet_is_named(missing: str) -> None:
    known = inputs()
    corpora = dict(known.lock.corpora)
    if missing == "store":
        part = corpora["train"][0]
        corpora["train"] = (part.model_copy(update={"stores": {"t1": part.stores["t1"]}}),)
    else:
        del corpora["train"]
    lacking = replace(known, lock=StoresLock(corpora=corpora))
    with pytest.raises(
        DataError, match="t2 over train/p" if missing == "store" else "corpus train"
    ) as caught:
        stage_jobs(recipe(), StudentRun("tmkd", 1), lacking, Path("/s"))
    assert "tmkd precompute" in str(caught.value)
