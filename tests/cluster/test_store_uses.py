"""Who uses a store: found from locks and jobs, whatever else lies about."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.store_uses import StoreUse, StoreUses
from schemas.job import JOB_FILE, LanguageJob, TokenTeacher
from schemas.records import LOCK_FILE
from tests.cluster.store_users import PART, write_lock, write_stage

FIRST, SECOND, OTHER = (f"{digit * 16}-{'f' * 16}" for digit in "123")


def find(out: Path, root: str) -> StoreUse:
    return StoreUses.find([out]).of(root)


def test_a_store_has_the_names_that_runs_give_it(tmp_path: Path) -> None:
    write_lock(tmp_path / "one", t1=f"/elsewhere/{FIRST}", t2=f"/elsewhere/{SECOND}")
    write_lock(tmp_path / "two", renamed=f"/elsewhere/{FIRST}")
    write_lock(tmp_path / "grid" / "cells" / "alpha-0.1", t1=f"/elsewhere/{FIRST}")
    assert find(tmp_path, FIRST) == StoreUse(
        ("renamed/pairs/train", "t1/pairs/train"), ("grid/cells/alpha-0.1", "one", "two")
    )
    assert find(tmp_path, SECOND).runs == ("one",)


def test_students_are_those_of_every_stage(tmp_path: Path) -> None:
    students = tmp_path / "run" / "students"
    one = write_stage(students / "tmkd/seed-1/stage-1-pretrain", "tmkd/seed-1/stage-1", FIRST)
    write_stage(students / "tmkd/seed-1/stage-2-finetune", "tmkd/seed-1/stage-2", SECOND, before=one)
    write_stage(students / "1-o-1/model/seed-1/stage-1-finetune", "1-o-1/model/seed-1/stage-1", SECOND)
    write_stage(students / "golden/seed-1/stage-1-finetune", "golden/seed-1/stage-1")
    assert find(tmp_path, FIRST).students == ("run/tmkd/seed-1",)
    assert find(tmp_path, SECOND).students == ("run/1-o-1/model/seed-1", "run/tmkd/seed-1")
    assert find(tmp_path, OTHER) == StoreUse()


def test_a_stage_that_students_share_is_used_by_each_of_them_and_is_no_student_itself(tmp_path: Path) -> None:
    stages = tmp_path / "grid" / "stages"
    shared = write_stage(stages / ("a" * 16), "shared/stage-1", FIRST)
    write_stage(stages / ("b" * 16), "alpha-0.1/seed-1/stage-2", SECOND, before=shared)
    write_stage(stages / ("c" * 16), "alpha-0.9/seed-1/stage-2", before=shared)
    assert find(tmp_path, FIRST).students == ("grid/alpha-0.1/seed-1", "grid/alpha-0.9/seed-1")
    assert find(tmp_path, SECOND).students == ("grid/alpha-0.1/seed-1",)


def test_the_stages_that_all_sweeps_share_say_whose_students_they_are(tmp_path: Path) -> None:
    shared = tmp_path / "students"
    first = write_stage(shared / ("a" * 16), "grid/layers=3/tmkd/seed-1/stage-1", FIRST)
    write_stage(shared / ("b" * 16), "grid/layers=3/tmkd/seed-1/stage-2", SECOND, before=first)
    write_stage(shared / ("c" * 16), "other/base/tmkd/seed-1/stage-2", before=first)
    assert find(tmp_path, FIRST).students == ("grid/layers=3/tmkd/seed-1", "other/base/tmkd/seed-1")
    assert find(tmp_path, SECOND).students == ("grid/layers=3/tmkd/seed-1",)


def test_stages_that_name_each_other_end_the_search(tmp_path: Path) -> None:
    stages = tmp_path / "grid" / "stages"
    write_stage(stages / "a", "a/stage-1", FIRST, before=stages / "b")
    write_stage(stages / "b", "b/stage-2", SECOND, before=stages / "a")
    write_stage(stages / "c", "c/stage-3", before=stages / "b")
    assert find(tmp_path, FIRST).students == ("grid/c",)


def test_language_models_use_the_stores_of_their_teachers(tmp_path: Path) -> None:
    stage = write_stage(tmp_path / "run" / "students" / "s" / "stage-1-train", "x")
    job = LanguageJob.model_validate(
        {
            "name": "top-k/seed-1/stage-1",
            "output": str(stage),
            "init": {"kind": "config", "config": {}, "tokenizer": "t"},
            "tokenizer": "0" * 64,
            "vocab": 8,
            "max_length": 8,
            "parts": [PART.model_dump()],
            "teachers": [TokenTeacher(name="t", stores=(f"s3://bucket/{FIRST}/",)).model_dump()],
            "training": {"corpus": "text", "losses": [{"name": "cross_entropy"}]},
            "selection_seed": 0,
            "seed": 0,
        }
    )
    (stage / JOB_FILE).write_text(job.model_dump_json())
    assert find(tmp_path, FIRST).students == ("run/top-k/seed-1",)


def test_a_store_is_the_same_wherever_it_lies_and_one_without_hashes_is_known_by_its_path(
    tmp_path: Path,
) -> None:
    write_lock(tmp_path / "run", t1=f"/was/here/{FIRST}", t2=str(tmp_path / "run" / ".." / "mine"))
    assert find(tmp_path, f"s3://bucket/stores/{FIRST}").runs == ("run",)
    assert find(tmp_path, str(tmp_path / "mine")).runs == ("run",)
    assert find(tmp_path, str(tmp_path / "other" / "mine")).runs == ()


@pytest.mark.parametrize("content", ["", "{", '{"name": 3}', '{"task": "unheard-of"}', "\udcff"])
def test_what_is_damaged_uses_nothing_and_hides_nothing(tmp_path: Path, content: str) -> None:
    data = content.encode(errors="surrogateescape")
    write_stage(tmp_path / "run" / "students" / "s" / "stage-1-x", "s/stage-1", FIRST)
    bad = write_stage(tmp_path / "run" / "students" / "bad" / "stage-1-x", "bad/stage-1", FIRST)
    (bad / JOB_FILE).write_bytes(data)
    write_lock(tmp_path / "whole", t1=FIRST)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / LOCK_FILE).write_bytes(data)
    (tmp_path / "also-bad" / LOCK_FILE).mkdir(parents=True)
    (tmp_path / "file").touch()
    assert find(tmp_path, FIRST).students == ("run/s",)
    assert find(tmp_path, f"/x/{FIRST}").runs == ("whole",)


def test_an_output_root_that_is_not_there_holds_no_run(tmp_path: Path) -> None:
    assert find(tmp_path / "absent", FIRST) == StoreUse()
