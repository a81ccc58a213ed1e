from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cluster.cli import run_command
from cluster.language import keep_plan
from cluster.language.keep_plan import check_codecs, choose_chunks, plan_keeping
from precompute.language_teacher import LoadedLanguageModel
from precompute.language_worker import LanguageWorker
from precompute.store_writer import StoreWriter
from precompute.stores import StoreTarget, make_job
from schemas.digest import read_document
from schemas.errors import RecipeError, TeacherError
from schemas.keep_trial import KeepPlan, KeepTrial
from schemas.language import LanguageRecipe, Objective
from tests.end_to_end.language_project import LanguageProject
from tests.precompute.tiny_language import VOCAB, make_tokenizer, save_tiny_llama


@pytest.fixture(autouse=True)
def _threads_are_given_back() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_recipe(project: LanguageProject, **changes: Any) -> LanguageRecipe:
    return LanguageRecipe.model_validate(yaml.safe_load(Path(project.recipe(**changes)).read_text()))


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_every_teacher_is_tried_and_a_whole_sample_foretells_the_store(
    tmp_path: Path, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets: dict[str, list[StoreTarget]] = {}
    plain = keep_plan.take_sample

    def take_sample(found: list[StoreTarget], *rest: Any) -> Any:
        targets[found[0].request.teacher.name] = list(found)
        return plain(found, *rest)

    monkeypatch.setattr(keep_plan, "take_sample", take_sample)
    project = LanguageProject(tmp_path, objective)
    recipe = read_recipe(project)
    made = plan_keeping(recipe, sample_tokens=10**6)
    assert KeepPlan.model_validate(read_document(made.document)) == made.plan
    assert made.chart.read_bytes().startswith(b"\x89PNG")
    assert [trial.teacher for trial in made.plan.trials] == ["head", "drawn"]
    for trial in made.plan.trials:
        check_trial(trial, objective)
        own = trial.candidates[0]
        assert own.is_recipe
        assert own.policy == recipe.teacher(trial.teacher).keep
        (target,) = targets[trial.teacher]
        store = StoreWriter.open(target.root, target.identity, target.plan)
        worker = LanguageWorker(target.spec)  # type: ignore[arg-type]
        for task in store.plan.tasks():
            worker.process(make_job(target, store, task, recipe.store))
        worker.close()
        size = sum(path.stat().st_size for path in Path(target.root, "data").iterdir())
        assert own.store_bytes == pytest.approx(size, rel=0.02)


def check_trial(trial: KeepTrial, objective: Objective) -> None:
    """Checks what holds of any trial of all chunks."""
    assert trial.vocab == VOCAB
    assert trial.sample == trial.corpora
    assert trial.corpus_names == ("train",)
    assert (trial.device, trial.num_shards) == ("cpu", -(-trial.corpora.num_chunks // 16))
    if objective == "causal":
        assert trial.corpora.num_positions == trial.corpora.num_tokens - trial.corpora.num_chunks
    kinds = {one.policy.kind for one in trial.candidates}
    assert kinds == {"top_k", "top_p", "sampled", "hybrid", "dense"}
    by_bytes = {one.policy.kind: one.entry_bytes for one in trial.candidates if not one.is_recipe}
    for kind in ("sampled", "hybrid"):
        if kind in by_bytes:
            assert by_bytes[kind] == pytest.approx(trial.candidates[0].entry_bytes, rel=0.25)
    for one in trial.candidates:
        assert one.cost is None
        assert one.wall_s == one.teacher_s > 0
        first = one.losses[0]
        assert first.gradient_angle is not None
        if one.policy.kind == "dense":
            assert first.total_variation == 0
            assert first.gradient_angle < 1
            assert first.calibration_error == pytest.approx(trial.calibration_error)
        if one.policy.kind in ("top_k", "top_p"):
            assert [each.loss for each in one.losses] == ["ghost_kl", "support_kl"]
            assert one.losses[1].total_variation == pytest.approx(one.missed_mass)
            if one.missed_mass > 0.01:
                assert (one.losses[1].gradient_angle or 0) > first.gradient_angle


def test_a_price_times_gpu_hours_is_the_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads that wait for each other take seconds where other tests run beside.
    monkeypatch.setattr(keep_plan, "available_cpus", lambda: 1)
    project = LanguageProject(tmp_path)
    teacher = {"name": "head", "model": str(project.model), "temperatures": [2.0]}
    teacher |= {"gpus_per_actor": 1, "num_actors": 3}
    recipe = read_recipe(project, teachers=[teacher], compare={}, gpu_hour_price=2.5)
    (trial,) = plan_keeping(recipe, sample_tokens=60).plan.trials
    # Actors would have a GPU; here there is none.
    assert all(one.cost is None and one.gpu_hours is None for one in trial.candidates)
    plain = keep_plan._describe_candidate

    def on_gpu(found: Any, one: Any) -> Any:
        object.__setattr__(found.spec, "device", "cuda")
        return plain(found, one)

    monkeypatch.setattr(keep_plan, "_describe_candidate", on_gpu)
    (trial,) = plan_keeping(recipe, sample_tokens=60).plan.trials
    for one in trial.candidates:
        assert one.gpu_hours == pytest.approx(one.teacher_s / 3600)
        assert one.cost == pytest.approx(2.5 * one.teacher_s / 3600)
        assert one.wall_s == pytest.approx(one.teacher_s / 3)


def test_the_same_sample_is_taken_every_time(tmp_path: Path) -> None:
    recipe = read_recipe(LanguageProject(tmp_path), compare={})
    first, second = (plan_keeping(recipe, sample_tokens=80).plan.trials[0] for _ in range(2))
    assert first.sample == second.sample
    assert 40 <= first.sample.num_tokens <= 120 < first.corpora.num_tokens
    assert first.perplexity == second.perplexity
    assert [one.entry_bytes for one in first.candidates] == [one.entry_bytes for one in second.candidates]


@pytest.mark.parametrize(
    ("num", "tokens", "wanted", "expected"),
    [
        (10, 1000, 300, [1, 5, 8]),
        (10, 1000, 1, [5]),
        (10, 1000, 10**9, list(range(10))),
        (1, 7, 4096, [0]),
        (4, 400, 200, [1, 3]),
    ],
)
def test_chunks_are_chosen_at_even_distances(num: int, tokens: int, wanted: int, expected: list[int]) -> None:
    found = choose_chunks(num, tokens, wanted)
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    project = LanguageProject(tmp_path)
    other = save_tiny_llama(tmp_path / "other", tokenizer=make_tokenizer(words=("a", "b")))
    teacher = {"name": "head", "model": str(other), "temperatures": [2.0]}
    recipe = read_recipe(project, teachers=[teacher], compare={})
    with pytest.raises(RecipeError, match="tokenizer"):
        plan_keeping(recipe)


def test_what_is_longer_than_a_models_positions_is_refused(tmp_path: Path) -> None:
    project = LanguageProject(tmp_path)
    short = save_tiny_llama(tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    teacher = {"name": "head", "model": str(short), "temperatures": [2.0]}
    with pytest.raises(TeacherError, match="max_length is 16, the model has 12 positions"):
        plan_keeping(read_recipe(project, teachers=[teacher], compare={}))
    student = {"init": {"kind": "layers", "model": str(project.model)}, "max_length": 65}
    with pytest.raises(RecipeError, match="max_length is 65, but the encoder has positions for 64"):
        plan_keeping(read_recipe(project, student=student, compare={}))


def test_a_codec_that_there_is_not_is_refused() -> None:
    assert check_codecs(["fixed", "compact"]) == ("fixed", "compact")
    with pytest.raises(RecipeError, match=r"no codec zip; there are fixed, packed, compact"):
        check_codecs(["zip"])


def test_the_command_prints_a_table_and_says_where_the_picture_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = LanguageProject(tmp_path)
    path = project.recipe(compare={})
    assert run_command(["plan", path, "--sample-tokens", "60", "--codec", "fixed"]) == 0
    said = capsys.readouterr()
    assert "top 5 " in said.out
    assert "renormalised" in said.out
    assert "codec fixed" in said.out
    assert str(project.run / "plan.png") in said.err
    assert run_command(["plan", path, "--sample-tokens", "60", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    plan = KeepPlan.model_validate(document["keep"])
    assert plan == KeepPlan.model_validate(read_document(project.run / "plan.json"))
    assert document["students"] == ["student/seed-17"]


def test_without_teacher_no_model_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(LoadedLanguageModel, "load", refuse)
    project = LanguageProject(tmp_path)
    assert run_command(["plan", project.recipe(), "--no-teacher", "--json"]) == 0
    assert "keep" not in json.loads(capsys.readouterr().out)
    assert not (project.run / "plan.json").exists()
