from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from cluster.students import is_complete, run_job
from schemas.errors import DataError, InterruptedRunError, RefusedError
from schemas.job import JOB_ADAPTER, LanguageJob, PartSource, StageJob, StageStatus, TokenTeacher
from schemas.language import LanguageLayersInit, LanguageStage, LossTerm
from schemas.recipe import FirstRows, LayersInit, Training


def job(output: Path, **changes: Any) -> StageJob:
    fields: dict[str, Any] = {
        "name": "golden/seed-1/stage-1",
        "output": str(output),
        "init": LayersInit(kind="layers", model="m", layers=2),
        "max_length": 64,
        "labels": ("a", "b"),
        "parts": (PartSource(rows="/c/rows.arrow", fingerprint="f" * 64, plan_hash="p" * 64, num_rows=5),),
        "alpha": 0.0,
        "training": Training(corpus="train"),
        "selection_seed": 1,
        "seed": 1,
    }
    return StageJob(**{**fields, **changes})


class Trainer:
    """Stands in for the launcher: writes the status that the trainer would."""

    def __init__(self, state: Literal["complete", "preempted"] = "complete") -> None:
        self.calls = 0
        self.state = state

    def __call__(self, path: Path) -> StageStatus:
        self.calls += 1
        job = JOB_ADAPTER.validate_json(path.read_bytes())
        status = StageStatus(state=self.state, fingerprint=job.fingerprint(), step=3)
        (path.parent / "status.json").write_text(status.model_dump_json())
        (path.parent / "model").mkdir(exist_ok=True)
        return status


def test_a_finished_job_is_not_run_again(tmp_path: Path) -> None:
    trainer = Trainer()
    assert run_job(job(tmp_path / "s"), trainer)
    assert not run_job(job(tmp_path / "s"), trainer)
    assert trainer.calls == 1


def test_a_job_whose_model_is_gone_is_run_again(tmp_path: Path) -> None:
    trainer = Trainer()
    run_job(job(tmp_path / "s"), trainer)
    (tmp_path / "s" / "model").rmdir()
    assert run_job(job(tmp_path / "s"), trainer)


def test_another_job_in_the_same_place_is_refused_and_the_fields_named(tmp_path: Path) -> None:
    run_job(job(tmp_path / "s"), Trainer())
    changed = job(tmp_path / "s", training=Training(corpus="train", learning_rate=1e-3))
    with pytest.raises(RefusedError, match=r"training\.learning_rate: 5e-05 -> 0\.001") as caught:
        run_job(changed, Trainer())
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"label_maps": {"t": {"x": "a"}}}, {}, ['label_maps.t.x: "a" -> null']),
        ({}, {"label_maps": {"t": {"x": "a"}}}, ['label_maps.t.x: null -> "a"']),
        (
            {"training": Training(corpus="train", rows=FirstRows(first=5))},
            {"training": Training(corpus="train", rows=FirstRows(first=6))},
            ["training.rows.first: 5 -> 6"],
        ),
        (
            {"soft_targets": [{"head": "t", "teachers": ["t"], "stores": [["/old/place/p-g"]]}]},
            {"soft_targets": [{"head": "t", "teachers": ["t"], "stores": [["/new/place/p-h"]]}]},
            ['soft_targets.0.stores.0.0: "p-g" -> "p-h"'],
        ),
        (
            {"parts": [{"rows": "/a", "fingerprint": "f", "plan_hash": "p", "num_rows": 5}]},
            {"parts": [{"rows": "/b", "fingerprint": "g", "plan_hash": "p", "num_rows": 5}]},
            ['parts.0.fingerprint: "f" -> "g"'],
        ),
    ],
    ids=["label map taken away", "label map added", "selected rows", "teacher's store", "corpus"],
)
def test_every_field_that_differs_is_named_and_no_path_is(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], named: list[str]
) -> None:
    run_job(job(tmp_path / "s", **before), Trainer())
    with pytest.raises(RefusedError) as caught:
        run_job(job(tmp_path / "s", **now), Trainer())
    assert list(caught.value.differing) == named


def test_a_stopped_job_is_an_interruption_and_goes_on_the_next_time(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError, match="step 3"):
        run_job(job(tmp_path / "s"), Trainer("preempted"))
    assert not is_complete(job(tmp_path / "s"))
    assert run_job(job(tmp_path / "s"), Trainer())


def test_a_damaged_job_file_is_a_data_error(tmp_path: Path) -> None:
    run_job(job(tmp_path / "s"), Trainer())
    (tmp_path / "s" / "job.json").write_text(json.dumps({"name": 3}))
    with pytest.raises(DataError, match="cannot be read"):
        is_complete(job(tmp_path / "s"))


def language_job(output: Path, **changes: Any) -> LanguageJob:
    fields: dict[str, Any] = {
        "name": "lm/seed-1/stage-1",
        "output": str(output),
        "init": LanguageLayersInit(kind="layers", model="m", layers=2),
        "tokenizer": "a" * 64,
        "vocab": 50,
        "max_length": 64,
        "parts": (PartSource(rows="/c/chunks.arrow", fingerprint="f" * 64, plan_hash="p" * 64, num_rows=5),),
        "teachers": (TokenTeacher(name="t", stores=("/stores/p-g",)),),
        "training": LanguageStage(corpus="train", teachers=("t",), losses=(LossTerm(name="ghost_kl"),)),
        "selection_seed": 1,
        "seed": 1,
    }
    return LanguageJob(**{**fields, **changes})


def test_a_language_models_job_is_run_once_and_told_apart_from_another(tmp_path: Path) -> None:
    trainer = Trainer()
    assert run_job(language_job(tmp_path / "s"), trainer)
    moved = (TokenTeacher(name="t", stores=("/elsewhere/p-g",)),)
    assert not run_job(language_job(tmp_path / "s", teachers=moved), trainer)
    assert trainer.calls == 1
    other = (TokenTeacher(name="t", stores=("/stores/p-h",)),)
    with pytest.raises(RefusedError, match=r"teachers\.0\.stores\.0: \"p-g\" -> \"p-h\""):
        run_job(language_job(tmp_path / "s", teachers=other), trainer)
    with pytest.raises(RefusedError, match="holds another job"):
        run_job(job(tmp_path / "s"), trainer)
