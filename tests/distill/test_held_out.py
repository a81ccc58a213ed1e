"""Measures on held-out rows, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.held_out import HeldOutSums
from distill.metrics import macro_f1
from distill.objective import Objective

CPU = torch.device("cpu")


def measure(
    rows: int, batch_rows: int, seed: int = 0, num_labels: int = 3
) -> tuple[dict[str, float], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_BHC = torch.randn(rows, 3, num_labels, generator=generator)
    teacher_BNC = torch.randn(rows, 2, num_labels, generator=generator)
    labels_B = torch.randint(-1, num_labels, (rows,), generator=generator)
    objective = Objective(uses_golden=True, num_soft=2, alpha=0.5, soft_loss="mse", temperature=1.0)
    sums = HeldOutSums.empty(num_labels, CPU)
    for start in range(0, rows, batch_rows):
        cut = slice(start, start + batch_rows)
        weights_B = torch.ones(len(labels_B[cut]))
        # A repeated row of weight 0, as padding.
        index = torch.cat([torch.arange(len(weights_B)), torch.zeros(1, dtype=torch.int64)])
        weights_B = torch.cat([weights_B, torch.zeros(1)])
        batch = (logits_BHC[cut][index], labels_B[cut][index])
        losses = objective.sum_losses(*batch, teacher_BNC[cut][index], weights_B)
        sums.add(*batch, weights_B, losses)
    probabilities_BC = logits_BHC.softmax(dim=-1).mean(dim=1)
    pairs = torch.stack([labels_B, probabilities_BC.argmax(dim=-1)])
    return sums.measures(golden=True, soft=True), pairs[:, labels_B >= 0]


def test_measures_do_not_depend_on_the_size_of_batches() -> None:
    assert measure(50, 50)[0] == pytest.approx(measure(50, 7)[0], rel=1e-6)


@pytest.mark.parametrize("num_labels", [2, 3, 20])
def test_accuracy_and_macro_f1_are_those_of_scikit_learn(num_labels: int) -> None:
    found, (golden, predicted) = measure(40, 16, num_labels=num_labels)
    assert found["accuracy"] == pytest.approx(float((golden == predicted).double().mean()))
    expected = macro_f1(golden.numpy(), predicted.numpy(), num_labels)
    assert found["macro_f1"] == pytest.approx(expected)


def test_losses_are_means_over_rows_worked_out_by_hand() -> None:
    objective = Objective(uses_golden=True, num_soft=1, alpha=0.25, soft_loss="mse", temperature=1.0)
    logits_BHC = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    teacher_BNC = torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]]])
    labels_B, weights_B = torch.tensor([0, 1]), torch.ones(2)
    losses = objective.sum_losses(logits_BHC, labels_B, teacher_BNC, weights_B)
    sums = HeldOutSums.empty(2, CPU)
    sums.add(logits_BHC, labels_B, weights_B, losses)
    found = sums.measures(golden=True, soft=True)
    # Golden: log 2 for each row. Soft: (2^2 + 0) / 2 = 2 and 0, so 1 on average.
    assert found["golden_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert found["soft_loss"] == pytest.approx(1.0)
    assert found["loss"] == pytest.approx(0.75 * np.log(2) + 0.25, rel=1e-6)
    # Row 0 is right; row 1 is a tie, which the first label wins.
    assert found["accuracy"] == 0.5


def test_without_labelled_rows_there_is_no_accuracy() -> None:
    objective = Objective(uses_golden=False, num_soft=1, alpha=1.0, soft_loss="mse", temperature=1.0)
    logits_BHC, labels_B, weights_B = torch.zeros(2, 1, 2), torch.tensor([-1, -1]), torch.ones(2)
    losses = objective.sum_losses(logits_BHC, labels_B, torch.ones(2, 1, 2), weights_B)
    sums = HeldOutSums.empty(2, CPU)
    sums.add(logits_BHC, labels_B, weights_B, losses)
    assert sums.measures(golden=False, soft=True) == {"loss": 1.0, "soft_loss": 1.0}
