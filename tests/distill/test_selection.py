"""Which evaluation is the best, and when patience ends."""

from __future__ import annotations

import math

from distill.selection import Selection


def test_accuracy_wants_to_be_high() -> None:
    selection = Selection("accuracy")
    assert [selection.update(step, value) for step, value in enumerate((0.5, 0.4, 0.6))] == [
        True,
        False,
        True,
    ]
    assert (selection.best_step, selection.best_value) == (2, 0.6)


def test_losses_want_to_be_low() -> None:
    for metric in ("loss", "soft_loss"):
        selection = Selection(metric)
        found = [selection.update(step, value) for step, value in enumerate((0.5, 0.6, 0.4))]
        assert found == [True, False, True]


def test_of_equal_values_the_earlier_step_is_kept() -> None:
    selection = Selection("accuracy")
    selection.update(5, 0.75)
    assert not selection.update(10, 0.75)
    assert selection.best_step == 5


def test_what_is_not_a_number_is_never_the_best() -> None:
    selection = Selection("loss", patience=2)
    assert not selection.update(1, math.nan)
    assert selection.best_step is None
    assert selection.update(2, 1.0)
    assert not selection.update(3, math.nan)
    assert selection.best_step == 2


def test_patience_counts_evaluations_since_the_best() -> None:
    selection = Selection("accuracy", patience=2)
    for step, value, stops in (
        (1, 0.5, False),
        (2, 0.4, False),
        (3, 0.6, False),
        (4, 0.6, False),
        (5, 0.1, True),
    ):
        selection.update(step, value)
        assert selection.wants_stop is stops


def test_without_patience_nothing_stops() -> None:
    selection = Selection("accuracy")
    for step in range(50):
        selection.update(step, 0.0)
    assert not selection.wants_stop


def test_the_state_comes_back() -> None:
    selection = Selection("loss", patience=3)
    selection.update(1, 0.5)
    selection.update(2, 0.7)
    assert Selection.from_json(selection.to_json()) == selection
