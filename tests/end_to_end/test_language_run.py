"""A language run, whole: chunks, stores, arms, evaluation, and what a user does next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from cluster.cli import run_command
from distill.token_store import TokenStore
from schemas.chunks import open_chunks, view_chunks
from schemas.language_evaluation import read_any_evaluation
from tests.end_to_end.language_project import LanguageProject
from tests.tiny_stage import read_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> LanguageProject:
    project = LanguageProject(tmp_path_factory.mktemp("project"))
    assert run_command(["run", project.recipe()]) == 0
    return project


def store_of(project: LanguageProject, teacher: str) -> TokenStore:
    lock = json.loads((project.run / "stores.lock.json").read_text())
    return TokenStore.open(lock["corpora"]["train"][0]["stores"][teacher])


def test_a_run_leaves_what_the_design_says(project: LanguageProject) -> None:
    found = {path.name for path in project.run.iterdir()}
    assert found >= {
        "recipe.yaml",
        "stores.lock.json",
        "student",
        "students",
        "evaluation.json",
        "report.html",
    }
    task = json.loads((project.run / "student" / "task.json").read_text())
    assert (task["task"], task["arm"], task["teachers"]) == ("language", "student", ["head"])


def test_stores_agree_with_plain_transformers(project: LanguageProject) -> None:
    store = store_of(project, "head")
    lock = json.loads((project.run / "stores.lock.json").read_text())
    chunks = view_chunks(open_chunks(Path(lock["corpora"]["train"][0]["rows"]))[1])
    model = AutoModelForCausalLM.from_pretrained(project.model)
    row = 7
    ids = chunks.input_ids[chunks.offsets[row] : chunks.offsets[row + 1]].astype(np.int64)
    with torch.inference_mode():
        logits_TV = model(torch.from_numpy(ids)[None]).logits[0, :-1, : store.layout.entries.vocab].double()
    log_probs = logits_TV.log_softmax(-1)
    expected = log_probs.topk(5)
    kept = store.gather(np.array([row]))
    found_ids = kept.entries.ids.reshape(-1, 5)
    assert (np.sort(expected.indices.numpy()) == found_ids).all()
    values = np.take_along_axis(log_probs.numpy(), found_ids.astype(np.int64), 1)
    assert np.abs(values - kept.entries.log_probs.reshape(-1, 5)).max() < 1e-2
    assert (
        np.abs(kept.stats.target_logprob - log_probs.numpy()[np.arange(len(ids) - 1), ids[1:]]).max() < 1e-4
    )


def test_perplexities_are_those_of_plain_transformers(project: LanguageProject) -> None:
    evaluation = read_any_evaluation(project.run / "evaluation.json")
    (corpus,) = evaluation.corpora
    rows = {row.name: row for row in corpus.models}
    assert set(rows) >= {"student", "golden", "sampled"}
    lock = json.loads((project.run / "stores.lock.json").read_text())
    chunks = view_chunks(open_chunks(Path(lock["corpora"]["test"][0]["rows"]))[1])
    model = AutoModelForCausalLM.from_pretrained(project.run / "student")
    total, count = 0.0, 0
    for row in range(len(chunks.offsets) - 1):
        ids = chunks.input_ids[chunks.offsets[row] : chunks.offsets[row + 1]].astype(np.int64)
        with torch.inference_mode():
            log_probs = model(torch.from_numpy(ids)[None]).logits[0].double().log_softmax(-1).numpy()
        # Ids beyond the true vocabulary have logits too; they count for plain transformers.
        total -= log_probs[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    assert corpus.num_positions == count
    assert rows["student"].perplexity == pytest.approx(np.exp(total / count), rel=0.2)


def test_a_second_run_does_no_work(project: LanguageProject, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in project.run.glob("students/**/model/*")}
    assert run_command(["run", project.recipe(), "--json"]) == 0
    output = capsys.readouterr()
    assert "logit stores: there already" in output.err
    result = json.loads(output.out)
    assert Path(result["student"]).is_dir()
    assert result["evaluation"]["corpora"][0]["corpus"] == "test"
    assert before == {path: path.stat().st_mtime_ns for path in project.run.glob("students/**/model/*")}


def test_distill_needs_no_teacher(project: LanguageProject) -> None:
    """The student starts from a configuration and a tokenizer: no weights of the teacher are there."""
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    init = {"kind": "config", "config": config, "tokenizer": str(project.model)}
    recipe = project.recipe(name="again", student={"init": init, "max_length": 32}, compare={"arms": []})
    again = project.root / "runs" / "again"
    again.mkdir()
    shutil.copy(project.run / "stores.lock.json", again)
    weights = project.model / "model.safetensors"
    weights.rename(project.root / "gone")
    try:
        assert run_command(["distill", recipe]) == 0
    finally:
        (project.root / "gone").rename(weights)
    assert AutoModelForCausalLM.from_pretrained(again / "student").config.hidden_size == 16


def test_every_arm_has_the_losses_that_it_was_given(project: LanguageProject) -> None:
    for arm, names in {
        "student": {"ghost_kl_t2", "cross_entropy"},
        "golden": {"cross_entropy"},
        "sampled": {"unbiased_kl"},
    }.items():
        directory = project.run / "students" / arm / "seed-17" / "stage-1"
        steps = [line for line in read_metrics(directory) if line["kind"] == "step"]
        assert len(steps) == 3
        assert names <= set(steps[0])


def test_another_recipe_under_the_same_name_is_refused(
    project: LanguageProject, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["run", project.recipe(), "--set", "stages.0.losses.1.weight=0.25"]) == 4
    assert "weight: 0.5 -> 0.25" in capsys.readouterr().err


def test_a_store_made_otherwise_is_refused_unless_a_new_one_is_asked_for(
    project: LanguageProject, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["precompute", project.recipe(name="other"), "--set", "teachers.head.keep.k=6"]
    assert run_command(arguments) == 4
    assert "policy" in capsys.readouterr().err


def test_distill_refuses_stores_that_were_made_otherwise_than_the_recipe_says(
    project: LanguageProject, capsys: pytest.CaptureFixture[str]
) -> None:
    """Precompute was not run again after the recipe had been edited."""
    for change, told in (("keep.k=6", "policy.k: 5 -> 6"), ("dtype=bfloat16", "dtype: float32 -> bfloat16")):
        assert run_command(["distill", project.recipe(), "--set", f"teachers.head.{change}"]) == 4
        said = capsys.readouterr().err
        assert "the store of teacher head over train/train is not what the recipe asks for now" in said
        assert told in said
        assert "tmkd precompute" in said


def test_a_masked_model_runs_from_end_to_end(tmp_path: Path) -> None:
    project = LanguageProject(tmp_path, "masked")
    assert run_command(["run", project.recipe(compare={"arms": []})]) == 0
    (corpus,) = read_any_evaluation(project.run / "evaluation.json").corpora
    assert {row.name for row in corpus.models} >= {"head", "student"}
    AutoModelForMaskedLM.from_pretrained(project.run / "student")
