from __future__ import annotations

from typing import Any

import pytest

from schemas.job import JOB_ADAPTER, LanguageJob, PartSource, SoftTarget, StageJob, StudentInit, TokenTeacher
from schemas.language import LanguageLayersInit, LanguageStage, LossTerm
from schemas.recipe import LayersInit, Training

PART = PartSource(rows="/c/rows.arrow", fingerprint="f" * 64, plan_hash="p" * 64, num_rows=5)


def job(**changes: Any) -> StageJob:
    fields: dict[str, Any] = {
        "name": "tmkd/seed-1/stage-1",
        "output": "/runs/a",
        "init": LayersInit(kind="layers", model="m", layers=2),
        "max_length": 64,
        "labels": ("a", "b"),
        "parts": (PART,),
        "soft_targets": (SoftTarget(head="t1", teachers=("t1",), stores=(("/stores/p-g",),)),),
        "alpha": 0.5,
        "training": Training(corpus="train"),
        "selection_seed": 1,
        "seed": 1,
    }
    return StageJob(**{**fields, **changes})


def test_paths_and_names_do_not_change_the_fingerprint() -> None:
    moved = job(
        name="other",
        output="/elsewhere",
        threads=2,
        parts=(PART.model_copy(update={"rows": "/x/rows.arrow"}),),
        soft_targets=(SoftTarget(head="t1", teachers=("t1",), stores=(("/other/p-g/",),)),),
    )
    assert moved.fingerprint() == job().fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"alpha": 0.9},
        {"init_hash": "x"},
        {"dropped_rows": "/d/abc.npy"},
        {"training": Training(corpus="train", learning_rate=1e-3)},
        {"soft_targets": (SoftTarget(head="t1", teachers=("t1",), stores=(("/stores/p-h",),)),)},
        {"parts": (PART.model_copy(update={"fingerprint": "e" * 64}),)},
        {"parts": (PART.model_copy(update={"labels_hash": "b" * 64}),)},
    ],
)
def test_what_changes_the_weights_changes_the_fingerprint(change: dict[str, Any]) -> None:
    assert job(**change).fingerprint() != job().fingerprint()


def test_the_golden_head_predicts_only_where_it_was_trained() -> None:
    assert job().prediction_heads() == ("golden", "t1")
    assert job(alpha=1.0).prediction_heads() == ("t1",)
    assert job(alpha=0.0, soft_targets=()).prediction_heads() == ("golden",)


def test_a_job_has_no_field_for_a_teachers_model() -> None:
    names = set(StageJob.model_fields) | set(SoftTarget.model_fields)
    assert not [name for name in names if "model" in name]


def language_job(**changes: Any) -> LanguageJob:
    fields: dict[str, Any] = {
        "name": "lm/seed-1/stage-1",
        "output": "/runs/a",
        "init": LanguageLayersInit(kind="layers", model="m", layers=2),
        "tokenizer": "a" * 64,
        "vocab": 50,
        "max_length": 64,
        "parts": (PART,),
        "teachers": (TokenTeacher(name="t1", stores=("/stores/p-g",)),),
        "training": LanguageStage(corpus="train", teachers=("t1",), losses=(LossTerm(name="ghost_kl"),)),
        "selection_seed": 1,
        "seed": 1,
    }
    return LanguageJob(**{**fields, **changes})


def test_a_job_reads_back_as_the_kind_that_it_is_and_one_without_a_task_is_a_classifiers() -> None:
    for made in (job(), language_job()):
        assert JOB_ADAPTER.validate_json(made.model_dump_json()) == made
    old = job().model_dump(mode="json")
    del old["task"]
    assert JOB_ADAPTER.validate_python(old) == job()
    with pytest.raises(ValueError, match="task"):
        JOB_ADAPTER.validate_python({**old, "task": "speech"})


def test_paths_do_not_change_a_language_jobs_fingerprint_and_what_is_learnt_does() -> None:
    first = language_job().fingerprint()
    moved = language_job(
        name="other",
        output="/elsewhere",
        threads=2,
        parts=(PART.model_copy(update={"rows": "/x/chunks.arrow"}),),
        teachers=(TokenTeacher(name="t1", stores=("/other/p-g/",)),),
    )
    assert moved.fingerprint() == first
    student = StudentInit(kind="student", path="/a", fingerprint="f")
    elsewhere = student.model_copy(update={"path": "/b"})
    assert language_job(init=student).fingerprint() == language_job(init=elsewhere).fingerprint()
    training = language_job().training
    changed = [
        {"seed": 2},
        {"vocab": 51},
        {"max_length": 65},
        {"pack": False},
        {"objective": "masked"},
        {"init": student},
        {"teachers": (TokenTeacher(name="t1", weight=0.5, stores=("/stores/p-g",)),)},
        {"teachers": (TokenTeacher(name="t1", stores=("/stores/p-h",)),)},
        {"training": training.model_copy(update={"losses": (LossTerm(name="jsd"),)})},
    ]
    found = {language_job(**change).fingerprint() for change in changed}
    assert len(found | {first}) == len(changed) + 1
