"""Tests of the report page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cluster.charts import Scale, draw_lines, nice_ticks
from cluster.curves import read_curve, read_student_curves, read_teacher_curves
from cluster.report import write_report
from cluster.summary import summarise
from schemas.digest import write_document
from schemas.errors import DataError
from schemas.evaluation import RunEvaluation
from tests.cluster.evaluations import make_evaluation
from tests.cluster.finished_run import make_run, write_log
from tests.cluster.page_reader import read_page

HOSTILE = """</style></title><script>alert('x')</script><img src=x onerror="alert(1)">&amp;{{ 7 * 7 }}"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("out"))


def test_the_page_is_well_formed_and_loads_nothing(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = read_page(path)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "xlink:href", "action"} & names
    assert not any(name.startswith("on") for name in names)
    source = path.read_text(encoding="utf-8")
    assert "url(" not in source
    assert "@import" not in source
    assert "://" not in source


def test_the_page_holds_what_the_run_found(run_dir: Path) -> None:
    page = read_page(write_report(run_dir))
    for text in (
        "the student tmkd labels 79.6 % of the rows right",
        "Every seed",
        "m-o-m",
        "Against the student without distillation",
        "Fine-tuning of teachers",
        "Pre-training on unlabelled",
        "Fine-tuning on train",
        "not there any more",
        "4 min 20 s",
        "train: 12 of 9,000 rows left out of training",
        "learning_rate: 2.0e-05",
    ):
        assert text in page.text, text
    labels = [value for name, value in page.attributes if name == "aria-label"]
    for label in ("reliability of ensemble", "held-out accuracy of tmkd", "training loss of teacher-a"):
        assert label in labels, label


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evaluation = make_evaluation(teachers=(HOSTILE, "b"), seeds=(1,))
    corpus = evaluation.corpora[0].model_copy(update={"corpus": HOSTILE, "labels": (HOSTILE, "b")})
    hostile = evaluation.model_copy(update={"corpora": (corpus,), "run": HOSTILE})
    run = make_run(tmp_path, name="<b>run", evaluation=hostile)
    (run / "recipe.yaml").write_text(json.dumps({"name": HOSTILE}), encoding="utf-8")
    write_document(run / "timings.json", {"steps": [{"step": HOSTILE, "seconds": 1.0}]})
    write_log(run / "students" / "<i>arm" / "seed-1" / "stage-1-finetune", HOSTILE, 1)
    page = read_page(write_report(run))
    assert not {"script", "img", "i"} & set(page.tags)
    # A quote that got out of an attribute would leave a name such as `alert(1)"`.
    names = {name for name, _ in page.attributes}
    assert all(re.fullmatch("[a-z][a-z0-9-]*", name) and not name.startswith("on") for name in names), names
    assert page.text.count("<script>alert('x')</script>") > 10
    assert "{{ 7 * 7 }}" in page.text


def test_what_is_not_there_yet_is_shown_as_absent(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: new\n", encoding="utf-8")
    page = read_page(write_report(run))
    for text in (
        "This run has no evaluation yet.",
        "No training has been logged.",
        "No stores are locked to this run.",
        "No timings have been written.",
    ):
        assert text in page.text


def test_a_directory_without_a_recipe_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"is no run, it has no recipe\.yaml"):
            write_report(path)


@pytest.mark.parametrize("name", ["evaluation.json", "stores.lock.json"])
def test_a_damaged_file_is_an_error(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path)
    data = (run / name).read_bytes()
    (run / name).write_bytes(data.replace(b"1", b"2", 1))
    with pytest.raises(DataError, match="does not match its own digest"):
        write_report(run)


def test_equal_files_give_equal_pages(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


@pytest.mark.parametrize("num_labels", [2, 3])
def test_runs_with_few_models_or_many_labels_have_a_page(tmp_path: Path, num_labels: int) -> None:
    evaluation = make_evaluation(teachers=(), seeds=(1,), num_labels=num_labels)
    page = read_page(write_report(make_run(tmp_path, evaluation=evaluation)))
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert "reliability of tmkd" in labels
    assert "reliability of ensemble" not in labels
    assert "their ensemble" not in page.text


def test_an_evaluation_of_no_corpus_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, evaluation=RunEvaluation(run="r", corpora=()))
    assert "This run has no evaluation yet." in read_page(write_report(run)).text


def test_torn_lines_and_absent_keys_cost_a_point_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"kind": "step", "step": 1, "loss": 0.5}',
        '{"kind": "step", "step": 2, "loss": null}',
        '{"kind": "step", "step": 3}',
        '{"kind": "step", "step": 4, "loss": 0.25, "golden_loss": null}',
        '{"step": 4, "selection_accuracy": 0.75, "selection_loss": 0.3}',
        '{"kind": "evaluation", "step": 5, "accuracy": 0.8, "best_step": 5}',
        '{"kind": "step", "step": 6, "lo',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    curve = read_curve(path, group="g", model="m", seed="1")
    assert curve is not None
    assert curve.losses == [(1.0, 0.5), (4.0, 0.25)]
    assert (curve.metric, curve.values) == ("accuracy", [(4.0, 0.75), (5.0, 0.8)])
    assert (curve.best_step, curve.best_value) == (5.0, 0.8)
    path.write_text("", encoding="utf-8")
    assert read_curve(path, group="g", model="m", seed="1") is None


def test_stages_are_grouped_by_what_they_train_on_whatever_their_number(run_dir: Path) -> None:
    found = {(curve.group, curve.model, curve.seed) for curve in read_student_curves(run_dir / "students")}
    assert ("Fine-tuning on train", "tmkd", "1") in found
    assert ("Fine-tuning on train", "golden", "3") in found
    assert ("Fine-tuning on train", "1-o-1/teacher-b", "2") in found
    assert ("Pre-training on unlabelled", "tmkd", "1") in found


def test_only_the_recipes_own_teachers_are_shown(tmp_path: Path) -> None:
    for directory, name, corpus in (("a", "t1", "train"), ("b", "t1", "other"), ("c", "t2", "train")):
        write_log(tmp_path / directory / "train", corpus, 0, name=f"teachers/{name}")
    recipe = {"teachers": [{"name": "t1", "train": {"corpus": "train"}}, {"name": "t3"}]}
    (curve,) = read_teacher_curves(tmp_path, recipe)
    assert (curve.model, len(curve.losses)) == ("t1", 134)


def test_the_summary_claims_no_gain_that_the_interval_does_not_show() -> None:
    evaluation = make_evaluation()
    corpus = evaluation.corpora[0]
    main = corpus.comparisons[0]
    expected = {
        (-0.01, 0.03): "this run shows no effect",
        (0.01, 0.03): "distillation helped here",
        (-0.03, -0.01): "distillation did harm here",
    }
    for (low, high), verdict in expected.items():
        interval = main.interval.model_copy(update={"low": low, "high": high})
        changed = main.model_copy(update={"interval": interval})
        other = corpus.model_copy(update={"comparisons": (changed,)})
        sentences = summarise(evaluation.model_copy(update={"corpora": (other,)}))
        assert verdict in " ".join(sentences), verdict


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.71, 0.86) == pytest.approx([0.75, 0.8, 0.85])
    assert nice_ticks(0, 1) == pytest.approx([0, 0.5, 1])
    assert nice_ticks(-3, 9) == pytest.approx([0, 5])
    assert len(nice_ticks(1e-7, 3e-7)) in (3, 4, 5)


def test_a_line_is_drawn_to_scale() -> None:
    assert Scale(0.0, 10.0, 100.0, 0.0)(2.5) == 75.0
    drawn = str(draw_lines([[(0, 0.0), (10, 1.0)]], label="l", bounds=(0.0, 1.0)))
    (points,) = re.findall(r'points="([^"]*)"', drawn)
    # Bottom left to top right of the plot's area: x 52 to 250, y 128 to 10.
    assert points == "52.0,128.0 250.0,10.0"


def test_a_flat_or_single_point_is_drawn() -> None:
    for line in ([(1.0, 0.5)], [(1.0, 0.5), (2.0, 0.5)], [(0.0, 0.0)]):
        assert "polyline" in draw_lines([line], label="l")
