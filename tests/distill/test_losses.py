"""Losses against numbers worked out by hand and against independent float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distill.losses import SOFT_LOSSES, combine, golden_loss

NAMES = sorted(SOFT_LOSSES)
TEMPERATURES = (1.0, 2.5)


def _random_BNC(seed: int, rows: int = 4, heads: int = 3, labels: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, heads, labels, generator=generator, dtype=torch.float64)


def test_mse_of_two_heads_matches_the_numbers_worked_out_by_hand():
    student_BNC = torch.tensor([[[1.0, 2.0], [0.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    teacher_BNC = torch.tensor([[[3.0, 2.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]]])
    # Row 0: head 0 (4 + 0) / 2 = 2, head 1 (0 + 9) / 2 = 4.5, mean 3.25. Row 1: (0.5 + 0) / 2.
    expected_B = torch.tensor([3.25, 0.25])
    assert torch.equal(SOFT_LOSSES["mse"].per_row(student_BNC, teacher_BNC, 1.0), expected_B)


def test_kl_matches_the_number_worked_out_by_hand():
    # Teacher probabilities 3/4, 1/4; student 1/2, 1/2: 3/4 ln(3/2) + 1/4 ln(1/2).
    teacher_BNC = torch.tensor([[[math.log(3.0), 0.0]]], dtype=torch.float64)
    student_BNC = torch.zeros(1, 1, 2, dtype=torch.float64)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert SOFT_LOSSES["kl"].per_row(student_BNC, teacher_BNC, 1.0).item() == pytest.approx(
        expected, abs=1e-14
    )
    # At T = 2 logits 2 ln 3 give the same tempered probabilities, and T^2 = 4 times the loss.
    assert SOFT_LOSSES["kl"].per_row(student_BNC, 2 * teacher_BNC, 2.0).item() == pytest.approx(4 * expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_matches_an_independent_formula(temperature: float):
    student_BNC, teacher_BNC = _random_BNC(1), _random_BNC(2)

    def probabilities(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits / temperature)
        return powers / powers.sum(axis=-1, keepdims=True)

    p, q = probabilities(teacher_BNC.numpy()), probabilities(student_BNC.numpy())
    expected_B = temperature**2 * (p * np.log(p / q)).sum(axis=-1).mean(axis=1)
    actual_B = SOFT_LOSSES["kl"].per_row(student_BNC, teacher_BNC, temperature)
    np.testing.assert_allclose(actual_B.numpy(), expected_B, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_every_soft_loss_is_zero_at_equality_and_positive_elsewhere(name: str, temperature: float):
    student_BNC, teacher_BNC = _random_BNC(3), _random_BNC(4)
    loss = SOFT_LOSSES[name].per_row
    torch.testing.assert_close(loss(student_BNC, student_BNC, temperature), torch.zeros(4).double())
    assert (loss(student_BNC, teacher_BNC, temperature) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_soft_loss_has_the_gradient_of_finite_differences(name: str):
    student_BNC, teacher_BNC = _random_BNC(5).requires_grad_(), _random_BNC(6)
    assert torch.autograd.gradcheck(lambda s: SOFT_LOSSES[name].per_row(s, teacher_BNC, 2.0), student_BNC)


@pytest.mark.parametrize("name", NAMES)
def test_every_soft_loss_treats_rows_and_heads_alike_and_apart(name: str):
    student_BNC, teacher_BNC = _random_BNC(7), _random_BNC(8)
    loss = SOFT_LOSSES[name].per_row
    whole_B = loss(student_BNC, teacher_BNC, 2.0)
    torch.testing.assert_close(loss(student_BNC[2:3], teacher_BNC[2:3], 2.0), whole_B[2:3])
    torch.testing.assert_close(loss(student_BNC.flip(1), teacher_BNC.flip(1), 2.0), whole_B)
    by_head = [loss(student_BNC[:, [i]], teacher_BNC[:, [i]], 2.0) for i in range(3)]
    torch.testing.assert_close(torch.stack(by_head).mean(dim=0), whole_B)


@pytest.mark.parametrize("name", NAMES)
def test_every_soft_loss_keeps_its_float32_value_in_half_precision(name: str):
    student_BNC, teacher_BNC = _random_BNC(9).bfloat16(), _random_BNC(10).bfloat16()
    loss = SOFT_LOSSES[name].per_row
    half_B = loss(student_BNC, teacher_BNC, 1.0)
    assert half_B.dtype == torch.float32
    torch.testing.assert_close(half_B, loss(student_BNC.float(), teacher_BNC.float(), 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_every_soft_loss_reacts_to_the_temperature_only_if_it_says_so(name: str):
    student_BNC, teacher_BNC = _random_BNC(11), _random_BNC(12)
    entry = SOFT_LOSSES[name]
    reacts = not torch.allclose(
        entry.per_row(student_BNC, teacher_BNC, 1.0), entry.per_row(student_BNC, teacher_BNC, 3.0)
    )
    assert reacts == entry.uses_temperature


def test_a_shift_of_all_logits_changes_mse_and_leaves_kl():
    student_BNC, teacher_BNC = _random_BNC(13), _random_BNC(14)
    for name, expected in (("mse", False), ("kl", True)):
        loss = SOFT_LOSSES[name].per_row
        shifted_B = loss(student_BNC + 2.0, teacher_BNC, 1.0)
        assert torch.allclose(shifted_B, loss(student_BNC, teacher_BNC, 1.0)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_averaging_teachers_that_agree_changes_nothing(name: str):
    one_B1C, student_BNC = _random_BNC(15, heads=1), _random_BNC(16, heads=1)
    entry = SOFT_LOSSES[name]
    average_BC = entry.average(one_B1C.expand(-1, 3, -1), 2.0)
    torch.testing.assert_close(
        entry.per_row(student_BNC, average_BC[:, None], 2.0), entry.per_row(student_BNC, one_B1C, 2.0)
    )


def test_averages_are_mean_logits_for_mse_and_mean_probabilities_for_kl():
    teacher_BKC = torch.tensor([[[math.log(3.0), 0.0], [math.log(1.0), 0.0]]], dtype=torch.float64)
    mean_logits_BC = SOFT_LOSSES["mse"].average(teacher_BKC, 1.0)
    torch.testing.assert_close(mean_logits_BC, torch.tensor([[math.log(3.0) / 2, 0.0]]).double())
    # (3/4 + 1/2) / 2 = 5/8.
    probabilities_BC = SOFT_LOSSES["kl"].average(teacher_BKC, 1.0).softmax(dim=-1)
    torch.testing.assert_close(probabilities_BC, torch.tensor([[0.625, 0.375]]).double())
    tempered_BC = (SOFT_LOSSES["kl"].average(2 * teacher_BKC, 2.0) / 2).softmax(dim=-1)
    torch.testing.assert_close(tempered_BC, torch.tensor([[0.625, 0.375]]).double())


def test_golden_loss_is_the_negative_log_probability_and_zero_for_unlabelled_rows():
    logits_BC = torch.tensor([[math.log(3.0), 0.0]] * 3, dtype=torch.float64)
    actual_B = golden_loss(logits_BC, torch.tensor([0, 1, -1]))
    expected_B = torch.tensor([-math.log(0.75), -math.log(0.25), 0.0]).double()
    torch.testing.assert_close(actual_B, expected_B, atol=1e-7, rtol=0)


def test_combine_weighs_golden_and_soft_loss_and_leaves_padding_out():
    golden_B = torch.tensor([1.0, 0.0, 5.0])
    soft_B = torch.tensor([2.0, 4.0, 7.0])
    weights_B = torch.tensor([1.0, 1.0, 0.0])
    # 0.1 * 1 + 0.9 * 2 = 1.9; the second row is unlabelled: 0.9 * 4 = 3.6; the third is padding.
    assert combine(golden_B, soft_B, 0.9, weights_B).item() == pytest.approx(5.5)
    assert combine(golden_B, None, 0.9, weights_B).item() == 1.0
    assert combine(None, soft_B, 1.0, weights_B).item() == 6.0


def test_alpha_one_leaves_the_golden_head_without_gradient():
    golden_B = torch.tensor([1.0], requires_grad=True)
    soft_B = torch.tensor([2.0], requires_grad=True)
    combine(golden_B, soft_B, 1.0, torch.ones(1)).backward()
    assert golden_B.grad is None
    assert soft_B.grad is not None


def test_combine_refuses_what_has_no_loss():
    with pytest.raises(ValueError, match="no loss"):
        combine(None, None, 0.5, torch.ones(1))
    with pytest.raises(ValueError, match="golden"):
        combine(None, torch.ones(1), 0.5, torch.ones(1))


def test_a_step_cut_into_micro_batches_with_padding_has_the_same_loss():
    generator = torch.Generator().manual_seed(1)
    golden_B, soft_B = torch.rand(6, generator=generator), torch.rand(6, generator=generator)
    whole = combine(golden_B, soft_B, 0.9, torch.ones(6)) / 6
    pad = torch.tensor([9.0])
    first = combine(golden_B[:4], soft_B[:4], 0.9, torch.ones(4))
    second = combine(
        torch.cat([golden_B[4:], pad]), torch.cat([soft_B[4:], pad]), 0.9, torch.tensor([1.0, 1.0, 0.0])
    )
    torch.testing.assert_close((first + second) / 6, whole)


def test_the_table_of_losses_cannot_be_changed():
    with pytest.raises(TypeError):
        SOFT_LOSSES["mine"] = SOFT_LOSSES["mse"]  # type: ignore[index]
