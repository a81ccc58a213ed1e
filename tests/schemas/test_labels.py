from __future__ import annotations

import pytest

from schemas.errors import LabelError
from schemas.labels import match_order, rename

GLUE = ("entailment", "neutral", "contradiction")


def test_names_decide_the_order_not_positions() -> None:
    # roberta-large-mnli: CONTRADICTION, NEUTRAL, ENTAILMENT
    assert match_order(("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), GLUE) == (2, 1, 0)


def test_hyphens_spaces_and_case_do_not_matter() -> None:
    assert match_order(("Not Entailment", "entailment"), ("entailment", "not_entailment")) == (1, 0)


def test_placeholder_names_are_an_error_that_asks_for_a_map() -> None:
    with pytest.raises(LabelError, match="label_map") as caught:
        match_order(("LABEL_0", "LABEL_1", "LABEL_2"), GLUE)
    assert caught.value.exit_code == 2


def test_a_map_makes_placeholders_usable() -> None:
    renames = {"LABEL_0": "contradiction", "LABEL_1": "neutral", "LABEL_2": "entailment"}
    assert match_order(rename(("LABEL_0", "LABEL_1", "LABEL_2"), renames), GLUE) == (2, 1, 0)


def test_a_map_that_names_no_label_of_the_teacher_is_an_error() -> None:
    with pytest.raises(LabelError, match="LABEL_9"):
        rename(("LABEL_0", "LABEL_1"), {"LABEL_9": "neutral"})


@pytest.mark.parametrize("native", [("entailment", "neutral"), (*GLUE, "other"), ("yes", "no", "maybe")])
def test_sets_of_names_that_differ_are_an_error(native: tuple[str, ...]) -> None:
    with pytest.raises(LabelError):
        match_order(native, GLUE)
