"""The page of a language run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cluster.charts import Scale, draw_lines, log_ticks
from cluster.language.summary import summarise_language
from cluster.report import write_report
from cluster.report_stores import list_run_stores
from schemas.errors import DataError
from schemas.language_evaluation import LanguageRunEvaluation
from tests.cluster.language.finished_run import (
    LENGTHS,
    NUM_OTHERS,
    NUM_POSITIONS,
    make_language_run,
    write_log,
)
from tests.cluster.language.measured_texts import make_evaluation
from tests.cluster.page_reader import read_page
from tests.cluster.test_report import HOSTILE


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_run(tmp_path_factory.mktemp("out"))


def test_the_page_is_well_formed_and_loads_nothing(run_dir: Path) -> None:
    path = write_report(run_dir)
    page = read_page(path)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "xlink:href", "action"} & names
    assert "://" not in path.read_text(encoding="utf-8")
    first = path.read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_the_page_holds_what_the_run_found(run_dir: Path) -> None:
    page = read_page(write_report(run_dir))
    for text in (
        "the student has a perplexity of 27.91 (95 % interval 26.81 to 29.10, the mean of 3 seeds)",
        "The same student trained on the text alone (plain) reaches 35.51",
        "so distillation helped here",
        "The teacher has 14.30; the student closes",
        "Every seed",
        "student/seed-2",
        "Against plain",
        "Stage 1: training on docs",
        "not there any more",
        "4 min 20 s",
        "kind: top_k, k: 5",
        "a note <b>of</b> the test",
    ):
        assert text in page.text, text
    labels = [value for name, value in page.attributes if name == "aria-label"]
    for label in (
        "perplexity",
        "reliability of large",
        "reliability of top-k",
        "held-out perplexity of student",
        "training loss of plain",
    ):
        assert label in labels, label


def test_stores_are_listed_with_policy_codec_positions_and_bytes(run_dir: Path) -> None:
    found = {one.store.teacher: one for one in list_run_stores(run_dir)}
    large, drawn, gone = found["large"], found["drawn"], found["gone"]
    assert (large.store.policy, large.store.codec, large.num_positions) == (
        "top_k k=5",
        "packed",
        NUM_POSITIONS,
    )
    # A chunk without logits has no positions; a policy's seed is no property of what it keeps.
    assert (drawn.store.policy, drawn.store.codec) == ("hybrid k=4 m=3", "compact")
    assert (drawn.store.num_excluded, drawn.num_positions) == (1, NUM_OTHERS)
    assert large.bytes_per_position == pytest.approx(large.store.num_bytes / NUM_POSITIONS, abs=0.05)
    assert (gone.num_positions, gone.bytes_per_position) == (None, None)
    page = read_page(write_report(run_dir))
    assert f"hybrid k=4 m=3 compact {len(LENGTHS) - 1} {NUM_OTHERS} 1 2" in page.text


def test_a_damaged_store_is_listed_as_far_as_it_is_known(tmp_path: Path) -> None:
    run = make_language_run(tmp_path)
    for path in (tmp_path / "stores" / "large" / "data").iterdir():
        path.unlink()
    found = {one.store.teacher: one for one in list_run_stores(run)}
    assert (found["large"].store.policy, found["large"].num_positions) == ("top_k k=5", None)
    assert "top_k k=5" in read_page(write_report(run)).text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evaluation = make_evaluation(teachers=(HOSTILE,), seeds=(1,), arms=("student", HOSTILE + "a", "plain"))
    corpus = evaluation.corpora[0].model_copy(update={"corpus": HOSTILE})
    hostile = evaluation.model_copy(update={"corpora": (corpus,), "run": HOSTILE})
    run = make_language_run(tmp_path, name="<b>run", evaluation=hostile)
    (run / "recipe.yaml").write_text(json.dumps({"name": HOSTILE}), encoding="utf-8")
    write_log(run / "students" / "<i>arm" / "seed-1" / "stage-1", HOSTILE, 3.0)
    page = read_page(write_report(run))
    assert not {"script", "img", "i"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert all(re.fullmatch("[a-z][a-z0-9-]*", name) and not name.startswith("on") for name in names), names
    assert page.text.count("<script>alert('x')</script>") > 5
    assert "{{ 7 * 7 }}" in page.text


@pytest.mark.parametrize(
    ("teachers", "arms"), [((), ("plain",)), ((), ("student", "plain")), (("a", "b", "c", "d"), ("student",))]
)
def test_runs_with_few_or_many_models_have_a_page(
    tmp_path: Path, teachers: tuple[str, ...], arms: tuple[str, ...]
) -> None:
    evaluation = make_evaluation(teachers=teachers, seeds=(1,), arms=arms, num_chunks=30)
    page = read_page(write_report(make_language_run(tmp_path, evaluation=evaluation)))
    assert f"reliability of {arms[0]}" in [value for name, value in page.attributes if name == "aria-label"]
    assert "only 30 chunks" in page.text
    assert "Every seed" not in page.text


def test_undefined_perplexities_have_a_page(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    corpus = evaluation.corpora[0]
    undefined = {"nll": None, "perplexity": None, "perplexity_interval": None, "perplexity_std": None}
    models = tuple(row.model_copy(update=undefined) for row in corpus.models)
    changed = evaluation.model_copy(
        update={"corpora": (corpus.model_copy(update={"models": models, "comparisons": ()}),)}
    )
    page = read_page(write_report(make_language_run(tmp_path, evaluation=changed)))
    assert "a perplexity of \N{INFINITY} (beyond what a number holds" in page.text


def test_an_evaluation_of_no_corpus_has_a_page(tmp_path: Path) -> None:
    run = make_language_run(tmp_path, evaluation=LanguageRunEvaluation(run="r", corpora=()))
    assert "This run has no evaluation yet." in read_page(write_report(run)).text


def test_a_damaged_evaluation_is_an_error(tmp_path: Path) -> None:
    run = make_language_run(tmp_path)
    path = run / "evaluation.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(DataError, match="does not match its own digest"):
        write_report(run)


def test_the_summary_claims_no_gain_that_the_interval_does_not_show() -> None:
    evaluation = make_evaluation()
    corpus = evaluation.corpora[0]
    main = corpus.comparisons[0]
    expected = {
        (-0.01, 0.03): "this run shows no effect",
        (0.01, 0.03): "distillation did harm here",
        (-0.03, -0.01): "distillation helped here",
    }
    for (low, high), verdict in expected.items():
        interval = main.interval.model_copy(update={"low": low, "high": high})
        changed = main.model_copy(update={"interval": interval})
        other = corpus.model_copy(update={"comparisons": (changed,)})
        sentences = summarise_language(evaluation.model_copy(update={"corpora": (other,)}))
        assert verdict in " ".join(sentences), verdict


def test_a_difference_that_rounds_to_nothing_is_called_so() -> None:
    evaluation = make_evaluation()
    corpus = evaluation.corpora[0]
    interval = corpus.comparisons[0].interval.model_copy(update={"low": 0.0001, "high": 0.0004})
    tiny = corpus.comparisons[0].model_copy(update={"mean_difference": 0.0003, "interval": interval})
    other = corpus.model_copy(update={"comparisons": (tiny,)})
    text = " ".join(summarise_language(evaluation.model_copy(update={"corpora": (other,)})))
    assert "+0.000 nats a token, with a 95 % interval from +0.000 to +0.000, which is next to nothing" in text
    assert "harm" not in text


def test_a_student_of_the_text_alone_is_said_to_be_one() -> None:
    evaluation = make_evaluation(teachers=(), arms=("plain",)).model_copy(update={"main_arm": "plain"})
    text = " ".join(summarise_language(evaluation))
    assert "the student plain, which learnt from the text alone, has a perplexity" in text
    assert "The teacher" not in text


def test_a_logarithmic_axis_has_round_ticks_and_equal_ratios() -> None:
    assert log_ticks(9, 1200) == pytest.approx([10, 100, 1000])
    assert log_ticks(8, 60) == pytest.approx([10, 20, 50])
    assert log_ticks(21, 27) == pytest.approx([22, 24, 26])
    assert len(log_ticks(1.5, 1e9)) <= 5
    assert Scale(1.0, 100.0, 0.0, 50.0, is_log=True)(10.0) == pytest.approx(25.0)
    drawn = str(draw_lines([[(0, 1.0), (5, 10.0), (10, 100.0)]], label="l", bounds=(1.0, 100.0), is_log=True))
    (points,) = re.findall(r'points="([^"]*)"', drawn)
    assert points == "52.0,128.0 151.0,69.0 250.0,10.0"
