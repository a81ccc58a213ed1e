"""The schedule, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from distill.learning_rate import rate_factor
from schemas.recipe import Training


def factors(total: int, **fields: Any) -> list[float]:
    training = Training(corpus="c", **fields)
    return [rate_factor(training, step, total) for step in range(total)]


def test_warm_up_and_linear_decay() -> None:
    expected = [1 / 3, 2 / 3, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert factors(10, warmup=0.2, schedule="linear") == pytest.approx(expected)


def test_cosine() -> None:
    assert factors(4, warmup=0.0, schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_constant_after_the_warm_up() -> None:
    assert factors(4, warmup=0.25, schedule="constant") == pytest.approx([0.5, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_no_step_is_lost(schedule: str, warmup: float, total: int) -> None:
    assert all(0 < factor <= 1 for factor in factors(total, warmup=warmup, schedule=schedule))
