"""Model cards: what the hub reads of them, and what they say and do not say."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from cluster.card_facts import CardSource, CorpusFact, is_hub_id
from cluster.model_card import Licences, check_source_names, parse_source_licences, render_card
from cluster.recipe_file import write_recipe
from cluster.run_directory import RunDirectory
from cluster.student_origin import find_origin
from cluster.student_task import StudentTask, write_task
from distill.export import FoldingCost, FoldReport
from schemas.errors import RecipeError
from schemas.evaluation import write_evaluation
from schemas.recipe import Arm, Recipe
from schemas.records import LockedPart, StoresLock, encode_record
from tests.cluster.evaluations import make_evaluation

LABELS = ("yes", "no")
REPORT = FoldReport(Path("/secret/plain"), ("golden", "teacher-a"), LABELS, 12_345, 23_456)
COST = FoldingCost(1200, 1200, 0.8, 0.7925, 0.97, 0.125)


def make_recipe(out: Path, **student: Any) -> Recipe:
    hub = {"kind": "hub", "repo": "nyu-mll/glue", "config": "rte", "split": "train"}
    file = {"kind": "file", "path": str(out / "more|rows.jsonl"), "name": "more"}
    pairs = {"labels": LABELS, "text": ["question", "passage"]}
    return Recipe.model_validate(
        {
            "name": "run",
            "out": str(out),
            "corpora": {
                "train": {**pairs, "parts": [hub, file]},
                "free": {**pairs, "label": None, "parts": [{"kind": "pydocqa", "split": "unlabelled"}]},
            },
            "teachers": [
                {
                    "name": "teacher-a",
                    "model": "owner/large",
                    "train": {"corpus": "train", "learning_rate": 2e-5},
                },
                {"name": "teacher-b", "model": "package://some_weights/model"},
                {"name": "teacher-c", "model": str(out / "local-model")},
            ],
            "student": {"init": {"kind": "layers", "model": "owner/small", "layers": 3}, **student},
            "stages": [
                {
                    "kind": "pretrain",
                    "corpus": "free",
                    "teachers": ["teacher-a", "teacher-b", "teacher-c"],
                    "max_steps": 77,
                },
                {
                    "kind": "finetune",
                    "corpus": "train",
                    "teachers": ["teacher-a"],
                    "alpha": 0.75,
                    "epochs": 4,
                    "soft_loss": "kl",
                    "learning_rate": 3e-5,
                },
            ],
            "evaluation": {"corpora": ["train"]},
        }
    )


def make_source(out: Path, *, arm: Arm = "tmkd", seed: int = 2, **student: Any) -> CardSource:
    """A student of a run that has a lock and an evaluation of seeds 1, 2 and 3."""
    recipe = make_recipe(out, **student)
    directory = RunDirectory.of(recipe)
    directory.run.mkdir(parents=True)
    write_recipe(recipe, directory.recipe)
    parts = [
        LockedPart(part=name, fingerprint="0" * 64, plan_hash="0" * 64, num_rows=rows, rows=str(out / "rows"))
        for name, rows in (("train", 4000), ("more", 5000))
    ]
    directory.lock.write_bytes(encode_record(StoresLock(corpora={"train": tuple(parts)})))
    write_evaluation(directory.evaluation, make_evaluation())
    place = directory.student
    place.mkdir()
    task = StudentTask(text=("question", "passage"), labels=LABELS, arm=arm, seed=seed)
    write_task(task, place)
    return CardSource(
        name="exported",
        report=REPORT,
        max_length=128,
        task=task,
        origin=find_origin(place),
        cost=COST,
        measured_on=CorpusFact("dev", hub_id="nyu-mll/glue", hub_config="rte", hub_split="validation"),
        onnx=None,
    )


def read(card: str) -> dict[str, Any]:
    """Returns the metadata as huggingface_hub reads it."""
    data: dict[str, Any] = ModelCard(card).data.to_dict()
    return data


def test_the_hub_reads_the_metadata_and_the_folded_accuracy(tmp_path: Path) -> None:
    data = read(render_card(make_source(tmp_path), Licences("apache-2.0")))
    assert data["license"] == "apache-2.0"
    assert "license_name" not in data
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-classification")
    assert data["base_model"] == "owner/small"
    assert data["datasets"] == ["nyu-mll/glue"]
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert model["name"] == "exported"
    assert result["dataset"] == {
        "name": "dev",
        "type": "nyu-mll/glue",
        "config": "rte",
        "split": "validation",
    }
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("accuracy", 0.7925)]


def test_the_text_says_how_the_student_came_to_be(tmp_path: Path) -> None:
    card = render_card(make_source(tmp_path), Licences(None, {"teacher-a": "mit", "train": "cc-by-4.0"}))
    for expected in (
        "| teacher-a | `owner/large` | fine-tuned by the run on train | mit |",
        "| teacher-b | `package://some_weights/model`, in an installed package",
        "| teacher-c | `local-model`, a local directory | used as it is | not recorded |",
        "`nyu-mll/glue` (rte), split train, 4,000 rows",
        "a local file `more\\|rows.jsonl`, 5,000 rows | 9,000 | 12 (they share a text",
        "unlabelled: tmkd's built-in question-passage pairs (pydocqa), split unlabelled | not",
        "| 1, pretrain | free | teacher-a, teacher-b, teacher-c | soft labels alone (mean squared error",
        "| 77 steps | 5e-05 |",
        "0.25 of golden labels + 0.75 of soft labels (KL divergence, temperature 1) | 4 epochs | 3e-05 |",
        "80.0 % with all heads and 79.2 % folded (\N{MINUS SIGN}0.8 points)",
        'classify({"text": "first text", "text_pair": "second text"}, truncation=True, max_length=128)',
    ):
        assert expected in card, expected


def test_a_card_names_no_directory_of_this_machine(tmp_path: Path) -> None:
    card = render_card(make_source(tmp_path), Licences("mit"))
    assert str(tmp_path) not in card
    assert "/secret" not in card


def test_the_metrics_are_the_students_own_row_or_are_called_a_mean(tmp_path: Path) -> None:
    (corpus,) = make_evaluation().corpora
    rows = {row.name: row for row in corpus.models}
    own = rows["tmkd/seed-2"]
    source = make_source(tmp_path)
    card = render_card(source, Licences())
    assert (
        f"| dev | tmkd/seed-2 | 1,200 | {100 * own.accuracy:.1f} | {100 * own.accuracy_interval.low:.1f} to "
        f"{100 * own.accuracy_interval.high:.1f} |"
    ) in card
    assert "a mean over" not in card
    card = render_card(make_source(tmp_path / "other", seed=9), Licences())
    shown = f"| 1,200 | {100 * rows['tmkd'].accuracy:.1f}"
    assert f"| dev | tmkd (a mean over 3 seeds, not this model alone) {shown}" in card


def test_a_student_without_teachers_has_none_in_its_card(tmp_path: Path) -> None:
    card = render_card(make_source(tmp_path, arm="golden"), Licences())
    assert "None: it was trained on golden labels alone." in card
    assert "stored logits" not in card
    assert "| 1, finetune | train | none | golden labels alone |" in card
    assert "pretrain" not in card
    assert "| dev | golden/seed-2 |" in card


def test_of_a_bare_student_the_card_says_that_nothing_is_known(tmp_path: Path) -> None:
    source = replace(make_source(tmp_path), task=None, origin=None, cost=None)
    card = render_card(source, Licences())
    data = read(card)
    assert not {"base_model", "datasets", "model-index", "metrics"} & data.keys()
    assert card.count("Not known: the student lay in no run.") == 4
    assert "Not measured." in card
    assert "stored logits" not in card


def test_a_run_without_evaluation_or_lock_is_said_to_have_none(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    assert source.origin is not None
    directory = source.origin.directory
    source = replace(source, origin=replace(source.origin, evaluation=None))
    directory.lock.unlink()
    card = render_card(source, Licences())
    assert "Not known: the run has no evaluation of this student." in card
    assert "split train; more: a local file `more\\|rows.jsonl` | not known | not recorded |" in card
    shutil.rmtree(directory.run)
    assert "teacher-a" in render_card(source, Licences())


def test_a_licence_is_the_callers_word_or_unknown(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    absent = render_card(source, Licences())
    assert read(absent)["license"] == "unknown"
    assert "Unknown: nobody has said" in absent
    other = read(render_card(source, Licences("House: rules\nof 2024")))
    assert (other["license"], other["license_name"]) == ("other", "House: rules\nof 2024")


def test_labels_cannot_break_the_card(tmp_path: Path) -> None:
    report = replace(REPORT, labels=("a\n---\n# b", "<script>"))
    card = render_card(replace(make_source(tmp_path), report=report, name="x\ny: z"), Licences("mit"))
    assert read(card)["license"] == "mit"
    assert "`a --- # b`, `&lt;script>`" in card
    assert "\n# x y: z\n" in card


def test_source_licences_are_name_and_id_of_what_the_run_has(tmp_path: Path) -> None:
    assert parse_source_licences(["a=mit", "b=House = rules"]) == {"a": "mit", "b": "House = rules"}
    for wrong in (["a"], ["=mit"], ["a="], ["a=mit", "a=mit"]):
        with pytest.raises(RecipeError, match="--source-license"):
            parse_source_licences(wrong)
    source = make_source(tmp_path)
    check_source_names(Licences(None, {"free": "mit", "teacher-b": "mit"}), source)
    with pytest.raises(RecipeError, match=r"no teacher or corpus 'typo'; it has teacher-a"):
        check_source_names(Licences(None, {"typo": "mit"}), source)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("bert-base-uncased", True),
        ("owner/name-1.0", True),
        ("package://a/b", False),
        ("/abs/dir", False),
        ("./dir", False),
        ("~/dir", False),
        ("a/b/c", False),
    ],
)
def test_hub_ids_are_told_from_directories_and_packages(reference: str, expected: bool) -> None:
    assert is_hub_id(reference) is expected
