"""Tests of a sweep's page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.report import write_report
from cluster.sweep.report import write_sweep_report
from schemas.errors import DataError
from schemas.sweep import GridPoint, Published
from schemas.sweep_evaluation import PointEvaluation
from tests.cluster.page_reader import read_page
from tests.cluster.sweep.finished_sweep import make_directory, page_of
from tests.cluster.sweep.sweeps import PUBLISHED, make_sweep

HOSTILE = """</style><script>alert('x')</script><img src=x onerror="alert(1)">{{ 7 * 7 }}"""
NOTE = "published figures are on 277 rows: one accuracy has a standard error of about 2.9 points"


def labels_of(path: Path) -> list[str]:
    return [value for name, value in read_page(path).attributes if name == "aria-label"]


def test_the_page_holds_what_the_sweep_found_and_loads_nothing(tmp_path: Path) -> None:
    path = write_report(make_directory(tmp_path / "example", make_sweep(), has_logs=True))
    assert path == tmp_path / "example" / "report.html"
    page = read_page(path)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href", "action"} & {name for name, _ in page.attributes}
    source = path.read_text(encoding="utf-8")
    assert not any(text in source for text in ("url(", "@import", "://"))
    for text in (
        "the student tmkd labels 80.9 % of the rows right",
        "Gain over golden, ours and published",
        "tmkd against golden-long: +3.6 points",
        "Where student and teachers disagree",
        "Pre-training on unlabelled",
        "Fine-tuning on train",
        "TMKD large",
        "24 students from 6 stores: teachers ran once for 11 min 9 s",
        "teacher 16, tmkd 217 examples a second",
        NOTE,
    ):
        assert text in page.text, text
    labels = labels_of(path)
    for label in ("accuracy over examples a second", "reliability of golden-long", "training loss of tmkd"):
        assert label in labels, label
    assert any(label.startswith("tmkd: ours +4.8, interval +2.3 to +7.3, published +9.2") for label in labels)


def test_bars_are_drawn_for_the_arms_that_both_have(tmp_path: Path) -> None:
    path = write_sweep_report(make_directory(tmp_path, make_sweep()))
    bars = [label.split(":")[0] for label in labels_of(path) if ": ours" in label]
    assert bars == ["tmkd", "1-o-1", "m-o-1", "m-o-m"]


def test_points_have_charts_over_their_axis_a_table_and_a_section_each(tmp_path: Path) -> None:
    path = write_sweep_report(make_directory(tmp_path, make_sweep(alphas=(0.9, 0.1, 0.5))))
    page = read_page(path)
    assert "accuracy over stages.1.alpha" in labels_of(path)
    for title in ("alpha 0.9: results on dev", "alpha 0.1: results on dev", "alpha 0.5: results on dev"):
        assert title in page.text
    assert "an arm against itself at the first point, alpha 0.9" in page.text
    assert page.text.count(NOTE) == 4


def test_failed_students_are_named_and_their_arms_marked(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_sweep(lost=(("tmkd", 2), ("m-o-1", 1), ("m-o-1", 2), ("m-o-1", 3))))
    assert "tmkd, seed 2 failed: out of memory [red]here[/red] <b>" in page.text
    assert "* tmkd lacks seed 2: a student failed" in page.text
    assert "* m-o-1 lacks seeds 1, 2, 3: a student failed" in page.text
    assert "Students without a result" not in page_of(tmp_path, make_sweep()).text


def test_hostile_names_and_texts_stay_text(tmp_path: Path) -> None:
    published = Published(source=HOSTILE, num_rows=9, accuracy={HOSTILE: 60.0, "golden": 50.0}, note=HOSTILE)
    sweep = make_sweep(teachers=(HOSTILE, "b"), lost=(("tmkd", 2),), published=published)
    row = sweep.points[0].disagreements[0].model_copy(update={"texts": (HOSTILE * 9,), "example_id": HOSTILE})
    points = [
        one.model_copy(
            update={"disagreements": (row,), "point": GridPoint(coordinates={HOSTILE: f"{HOSTILE}{place}"})}
        )
        for place, one in enumerate(sweep.points * 2)
    ]
    students = [one.model_copy(update={"error": HOSTILE}) for one in sweep.students]
    changes = {"points": tuple(points), "students": tuple(students), "sweep": HOSTILE, "recipe": HOSTILE}
    page = page_of(tmp_path, sweep.model_copy(update=changes))
    assert not {"script", "img", "b<", "red"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert all(re.fullmatch("[a-zA-Z][a-zA-Z0-9-]*", name) and not name.startswith("on") for name in names)
    assert page.text.count("<script>alert('x')</script>") > 10
    assert "{{ 7 * 7 }}" in page.text


def test_a_long_text_folds(tmp_path: Path) -> None:
    source = write_sweep_report(make_directory(tmp_path, make_sweep())).read_text(encoding="utf-8")
    assert source.count('<details class="long">') == 2
    assert "A man [red]is[/red] here. &lt;script&gt;" in source


def test_what_was_not_measured_or_published_is_left_out(tmp_path: Path) -> None:
    sweep = make_sweep(seeds=(1,), has_speed=False, published=None)
    point = sweep.points[0].model_copy(update={"disagreements": ()})
    page = page_of(tmp_path, sweep.model_copy(update={"points": (point,)}))
    assert "No speed was measured." in page.text
    assert "no row on which they disagree" in page.text
    assert "No training has been logged." in page.text
    assert "ours and published" not in page.text
    assert ("class", "theirs") not in page.attributes


def test_a_sweep_without_any_student_has_a_page(tmp_path: Path) -> None:
    sweep = make_sweep(alphas=(0.1, 0.5), published=PUBLISHED)
    points = tuple(PointEvaluation(point=one.point, main_arm="tmkd") for one in sweep.points)
    page = page_of(tmp_path, sweep.model_copy(update={"points": points, "across": ()}))
    assert "No student of this sweep was trained." in page.text
    assert page.text.count("no student was trained") == 2


def test_a_shared_training_is_drawn_once(tmp_path: Path) -> None:
    path = write_sweep_report(make_directory(tmp_path, make_sweep(alphas=(0.1, 0.5)), has_logs=True))
    assert read_page(path).text.count("Pre-training on unlabelled") == 1
    assert read_page(path).text.count("Fine-tuning on train") == 2


def test_a_damaged_or_missing_document_is_an_error(tmp_path: Path) -> None:
    path = make_directory(tmp_path, make_sweep()) / "sweep.json"
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(DataError, match=r"sweep\.json"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        write_sweep_report(tmp_path / "absent")


def test_equal_files_give_equal_pages(tmp_path: Path) -> None:
    directory = make_directory(tmp_path, make_sweep())
    first = write_sweep_report(directory).read_bytes()
    assert write_sweep_report(directory).read_bytes() == first
