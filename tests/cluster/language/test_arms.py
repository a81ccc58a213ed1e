import dataclasses

import pytest

from cluster.language.arms import LanguageRun, finish, stage_jobs, stages_of, student_runs, used_teachers
from schemas.errors import DataError
from schemas.job import StudentInit
from schemas.records import StoresLock
from tests.cluster.language.recipes import ENTROPY, GHOST, STUDENTS, inputs, recipe


def test_the_recipes_own_student_comes_first_then_every_arm_with_every_seed() -> None:
    found = [run.name for run in student_runs(recipe(compare={"arms": [], "seeds": [3, 4]}))]
    assert found == ["student/seed-3", "student/seed-4"]
    assert [run.name for run in student_runs(recipe())] == ["student/seed-1", "golden/seed-1", "drawn/seed-1"]


def test_an_arm_has_its_own_teachers_and_losses_in_every_stage() -> None:
    stages = stages_of(recipe(), "drawn")
    assert [stage.corpus for stage in stages] == ["first", "second"]
    assert [stage.teachers for stage in stages] == [("b",), ("b",)]
    assert {term.name for stage in stages for term in stage.losses} == {"unbiased_kl"}


def test_only_teachers_that_some_student_uses_need_stores() -> None:
    assert used_teachers(recipe()) == {"a": ("first", "second"), "b": ("first", "second")}
    assert used_teachers(recipe(compare={"arms": []})) == {"a": ("first", "second")}


def test_each_stage_starts_from_the_one_before_and_reads_the_locked_stores() -> None:
    first, second = stage_jobs(recipe(), LanguageRun("student", 7), inputs(), STUDENTS)
    assert isinstance(second.init, StudentInit)
    assert second.init.fingerprint == first.fingerprint()
    assert second.init.path == f"{first.output}/model"
    assert (first.init_hash, second.init_hash) == ("e" * 64, None)
    assert (first.dropped_rows, second.dropped_rows) == (None, "/dropped/f00.npy")
    (teacher,) = second.teachers
    assert (teacher.name, teacher.weight, teacher.stores) == ("a", 0.5, ("/stores/second-a",))
    assert (second.seed, second.selection_seed, second.vocab, second.tokenizer) == (7, 1, 90, "a" * 64)
    student = finish(LanguageRun("student", 7), second)
    assert (str(student.directory), student.fingerprint) == (
        second.init.path.replace("-1", "-2"),
        second.fingerprint(),
    )


def test_an_arm_without_teachers_reads_no_store() -> None:
    jobs = stage_jobs(recipe(), LanguageRun("golden", 1), inputs(), STUDENTS)
    assert [job.teachers for job in jobs] == [(), ()]


def test_two_arms_alike_have_one_fingerprint() -> None:
    arms = [{"name": name, "teachers": ["a"], "losses": [GHOST]} for name in ("one", "two")]
    both = recipe(compare={"arms": arms})
    one, two = (stage_jobs(both, LanguageRun(name, 1), inputs(), STUDENTS)[-1] for name in ("one", "two"))
    assert one.fingerprint() == two.fingerprint()
    arms[1] = {"name": "two", "losses": [ENTROPY]}
    other = stage_jobs(recipe(compare={"arms": arms}), LanguageRun("two", 1), inputs(), STUDENTS)[-1]
    assert other.fingerprint() != one.fingerprint()


def test_where_the_initial_model_lies_changes_nothing_and_what_it_holds_does() -> None:
    run = LanguageRun("student", 1)
    moved = inputs(init=recipe().student.init.model_copy(update={"model": "/elsewhere"}))
    here, there = (stage_jobs(recipe(), run, each, STUDENTS)[0].fingerprint() for each in (inputs(), moved))
    assert here == there
    other = dataclasses.replace(moved, init_hash="f" * 64)
    assert stage_jobs(recipe(), run, other, STUDENTS)[0].fingerprint() != here


def test_dropped_rows_count_by_their_content() -> None:
    run = LanguageRun("student", 1)
    kept = stage_jobs(recipe(), run, inputs(dropped_rows={}), STUDENTS)[1].fingerprint()
    dropped, moved = (
        stage_jobs(recipe(), run, inputs(dropped_rows={"second": path}), STUDENTS)[1].fingerprint()
        for path in ("/a/f00.npy", "/b/f00.npy")
    )
    assert dropped == moved != kept


def test_a_missing_store_or_corpus_says_what_to_run() -> None:
    lacking = StoresLock(
        corpora={
            name: tuple(part.model_copy(update={"stores": {}}) for part in parts)
            for name, parts in inputs().lock.corpora.items()
        }
    )
    with pytest.raises(DataError, match=r"no store of teacher a over first/p; run `tmkd precompute`"):
        stage_jobs(recipe(), LanguageRun("student", 1), inputs(lock=lacking), STUDENTS)
    with pytest.raises(DataError, match=r"corpus first is not in the run's lock; run `tmkd precompute`"):
        stage_jobs(recipe(), LanguageRun("golden", 1), inputs(lock=StoresLock(corpora={})), STUDENTS)
