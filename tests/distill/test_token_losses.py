"""Token losses against hand-worked numbers, closed forms and an independent dense float64 formula."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from distill.stored_targets import StoredTargets, SupportKind
from distill.supports import EMPTY, Supports
from distill.token_losses import TOKEN_LOSSES, LossSpec, LossTerm
from schemas.errors import RecipeError, TemperatureError
from tests.distill.dense_reference import GRID, random_logits, reference_loss, store, top_supports

NAMES = sorted(TOKEN_LOSSES)
V = 17
SIZES = (5, 1, 0, V, 3)
TARGETS = (3, 0, 16, 5, 9)
CASES = [
    (name, temperature)
    for name in NAMES
    for temperature in (1.0, *GRID)
    if temperature == 1 or TOKEN_LOSSES[name].uses_temperature
]


def losses_LN(student_NV: Tensor, targets: list[StoredTargets], spec: LossSpec) -> Tensor:
    """The losses with the student's full logits, the rest summed densely."""
    spec.check(targets)
    supports = Supports.of(targets)
    logits_NU = student_NV.gather(1, supports.ids_NU)
    inside_NV = torch.zeros_like(student_NV, dtype=torch.bool).scatter(1, supports.ids_NU, True)
    rest_N = {
        term.temperature: (student_NV / term.temperature)
        .masked_fill(inside_NV, EMPTY)
        .logsumexp(dim=-1)
        .clamp(min=EMPTY)
        for term in spec.terms
    }
    return supports.losses(logits_NU, rest_N, spec)


def loss_N(name: str, student_NV: Tensor, targets: StoredTargets, temperature: float = 1.0) -> Tensor:
    return losses_LN(student_NV, [targets], LossSpec((LossTerm(name, temperature=temperature, beta=0.3),)))[0]


def _case(name: str) -> tuple[Tensor, Tensor, StoredTargets, list[list[int]]]:
    """Teacher, student, targets and supports; a complete store where a truncated one is refused."""
    teacher_NV, student_NV = random_logits(1, len(SIZES), V), random_logits(2, len(SIZES), V)
    whole = TOKEN_LOSSES[name].needs_whole
    supports = top_supports(teacher_NV, [V] * len(SIZES) if whole else SIZES)
    kind = SupportKind.COMPLETE if whole else SupportKind.EXACT
    return teacher_NV, student_NV, store(teacher_NV, supports, TARGETS, kind=kind), supports


def _gradient(loss_N: Tensor, student_NV: Tensor) -> Tensor:
    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    return gradient_NV


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_value_and_gradient_of_every_loss_are_those_of_the_dense_formula(name: str, temperature: float):
    teacher_NV, student_NV, targets, supports = _case(name)
    student_NV.requires_grad_()
    actual_N = loss_N(name, student_NV, targets, temperature)
    expected_N = torch.stack(
        [
            reference_loss(
                name, teacher_NV[n], student_NV[n], supports[n],
                target=TARGETS[n], temperature=temperature, beta=0.3,
            )
            for n in range(len(SIZES))
        ]
    )  # fmt: skip
    torch.testing.assert_close(actual_N, expected_N, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        _gradient(actual_N, student_NV), _gradient(expected_N, student_NV), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_every_loss_says_truly_whether_it_vanishes_at_the_teacher(name: str, temperature: float):
    teacher_NV, _, targets, _ = _case(name)
    student_NV = (teacher_NV + 0.7).requires_grad_()
    actual_N = loss_N(name, student_NV, targets, temperature)
    vanishes = torch.allclose(actual_N, torch.zeros_like(actual_N), atol=1e-12)
    assert vanishes == TOKEN_LOSSES[name].vanishes_at_teacher
    if vanishes:
        assert _gradient(actual_N, student_NV).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "temperature"), [case for case in CASES if not TOKEN_LOSSES[case[0]].can_be_negative]
)
def test_no_loss_is_negative_unless_it_says_so(name: str, temperature: float):
    for seed in range(20):
        teacher_NV, student_NV = random_logits(seed, 3, V, 4.0), random_logits(seed + 99, 3, V, 4.0)
        targets = store(teacher_NV, top_supports(teacher_NV, (4, 1, 9)), (1, 2, 3))
        assert (loss_N(name, student_NV, targets, temperature) >= 0).all()


def test_a_draw_of_the_unbiased_loss_can_be_negative():
    teacher_NV = torch.tensor([[0.0, 0.0]]).double()
    targets = store(teacher_NV, [[0]], [0], kind=SupportKind.UNBIASED, weights=[[1.0]])
    student_NV = torch.tensor([[2.0, 0.0]]).double()
    assert TOKEN_LOSSES["unbiased_kl"].can_be_negative
    assert loss_N("unbiased_kl", student_NV, targets).item() < 0


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name: str):
    _, student_NV, targets, _ = _case(name)
    wider = dataclasses.replace(
        targets,
        ids_NK=torch.nn.functional.pad(targets.ids_NK, (0, 4), value=-5),
        log_probs_NK=torch.nn.functional.pad(targets.log_probs_NK, (0, 4), value=math.inf),
    )
    student_NV.requires_grad_()
    expected_N, actual_N = loss_N(name, student_NV, targets), loss_N(name, student_NV, wider)
    torch.testing.assert_close(actual_N, expected_N, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(_gradient(actual_N, student_NV), _gradient(expected_N, student_NV))


@pytest.mark.parametrize("name", NAMES)
def test_a_position_does_not_depend_on_the_others(name: str):
    _, student_NV, targets, _ = _case(name)
    whole_N = loss_N(name, student_NV, targets)
    for n in range(len(SIZES)):
        alone_N = loss_N(name, student_NV[n : n + 1], targets.narrow(n, n + 1))
        torch.testing.assert_close(alone_N, whole_N[n : n + 1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_of_all_logits_changes_no_loss(name: str):
    _, student_NV, targets, _ = _case(name)
    torch.testing.assert_close(loss_N(name, student_NV + 5.0, targets), loss_N(name, student_NV, targets))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_values_and_float32_sums_stay_near_the_float64_value(name: str):
    teacher_NV, student_NV, _, supports = _case(name)
    student_NV, teacher_NV = student_NV.bfloat16().double(), teacher_NV.bfloat16().double()
    kind = SupportKind.COMPLETE if TOKEN_LOSSES[name].needs_whole else SupportKind.EXACT
    exact_N = loss_N(name, student_NV, store(teacher_NV, supports, TARGETS, kind=kind))
    targets = store(teacher_NV, supports, TARGETS, kind=kind, dtype=torch.float32)
    actual_N = loss_N(name, student_NV.float(), targets)
    assert actual_N.dtype == torch.float32
    torch.testing.assert_close(actual_N, exact_N.float(), rtol=1e-5, atol=2e-6)
    half = dataclasses.replace(targets, log_probs_NK=targets.log_probs_NK.half())
    torch.testing.assert_close(loss_N(name, student_NV.float(), half), exact_N.float(), rtol=0.02, atol=0.01)


def test_ghost_divergence_matches_the_number_worked_out_by_hand():
    # p = 1/2, 1/4, 1/8, 1/8; q = 1/4 each; kept {0}: 1/2 ln 2 + 1/2 ln((1/2) / (3/4)) = 1/2 ln(4/3).
    teacher_NV = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).double().log()
    targets = store(teacher_NV, [[0]], [0])
    actual = loss_N("ghost_kl", torch.zeros(1, 4).double(), targets).item()
    assert actual == pytest.approx(0.5 * math.log(4 / 3), abs=1e-14)
    # Reversed: 1/4 ln((1/4) / (1/2)) + 3/4 ln((3/4) / (1/2)).
    actual = loss_N("reverse_kl", torch.zeros(1, 4).double(), targets).item()
    assert actual == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-14)
    # The support alone: one token, nothing to learn; with {0, 1}: p' = 2/3, 1/3 against 1/2, 1/2.
    assert loss_N("support_kl", torch.zeros(1, 4).double(), targets).item() == pytest.approx(0, abs=1e-15)
    two = store(teacher_NV, [[0, 1]], [0])
    actual = loss_N("support_kl", torch.zeros(1, 4).double(), two).item()
    assert actual == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3), abs=1e-14)
    # Logits ln 4 and ln 2 about their mean are +-(ln 2)/2, the student's are 0.
    actual = loss_N("logit_mse", torch.zeros(1, 4).double(), two).item()
    assert actual == pytest.approx(math.log(2) ** 2 / 4, abs=1e-14)


def test_the_gradient_of_the_ghost_divergence_is_the_closed_form():
    teacher_NV, student_NV = random_logits(5, 4, V), random_logits(6, 4, V).requires_grad_()
    supports = top_supports(teacher_NV, (3, 5, 1, 16))
    targets = store(teacher_NV, supports, (0, 1, 2, 3))
    actual_NV = _gradient(loss_N("ghost_kl", student_NV, targets), student_NV)
    p_NV, q_NV = teacher_NV.softmax(dim=-1), student_NV.detach().softmax(dim=-1)
    for n, support in enumerate(supports):
        outside = [v for v in range(V) if v not in support]
        torch.testing.assert_close(actual_NV[n, support], q_NV[n, support] - p_NV[n, support])
        factor = 1 - p_NV[n, outside].sum() / q_NV[n, outside].sum()
        torch.testing.assert_close(actual_NV[n, outside], q_NV[n, outside] * factor)


def _draws(kind: str, teacher_V: Tensor, num: int) -> tuple[list[list[int]], list[list[float]]]:
    """``num`` independent draws of supports and weights, as the policies define them."""
    generator = torch.Generator().manual_seed(7)
    p_V = teacher_V.softmax(dim=-1)
    supports: list[list[int]] = []
    weights: list[list[float]] = []
    if kind == "hybrid":
        # The 4 best exactly; of the rest, each with probability p / tau, then it stands for tau.
        head = set(p_V.topk(4).indices.tolist())
        tau = 0.12
        assert p_V.sort(descending=True).values[4] < tau
        for uniform_V in torch.rand(num, len(p_V), generator=generator, dtype=torch.float64):
            drawn = [v for v in range(len(p_V)) if float(uniform_V[v]) < float(p_V[v]) / tau]
            tail = [v for v in drawn if v not in head]
            supports.append([*sorted(head), *tail])
            weights.append([*(float(p_V[v]) for v in sorted(head)), *(tau for _ in tail)])
        return supports, weights
    power = 1.0 if kind == "sampled" else 0.7
    proposal_V = (p_V**power) / (p_V**power).sum()
    drawn_ND = torch.multinomial(proposal_V.expand(num, -1), 6, replacement=True, generator=generator)
    for row in drawn_ND.tolist():
        kept = sorted(set(row))
        supports.append(kept)
        weights.append([row.count(v) / 6 * float(p_V[v] / proposal_V[v]) for v in kept])
    return supports, weights


@pytest.mark.parametrize("kind", ["sampled", "sampled with p^0.7", "hybrid"])
def test_the_mean_over_draws_of_the_unbiased_loss_is_the_whole_divergence(kind: str):
    num, vocab_size = 3000, 9
    teacher_NV, student_NV = random_logits(8, 1, vocab_size, 1.5), random_logits(9, 1, vocab_size)
    supports, weights = _draws(kind, teacher_NV[0], num)
    targets = store(
        teacher_NV.expand(num, -1),
        supports,
        [0] * num,
        kind=SupportKind.UNBIASED,
        weights=weights,
        num_exact=[4] * num if kind == "hybrid" else None,
    )
    targets.check()
    student_NV = student_NV.expand(num, -1).clone().requires_grad_()
    actual_N = loss_N("unbiased_kl", student_NV, targets)
    gradient_NV = _gradient(actual_N, student_NV)
    p_V, q_V = teacher_NV[0].softmax(dim=-1), student_NV[0].softmax(dim=-1)
    error_V = gradient_NV.std(dim=0) / math.sqrt(num)
    assert (((gradient_NV.mean(dim=0) - (q_V - p_V)) / error_V.clamp(min=1e-12)).abs() < 4).all()
    assert error_V.max() < 0.01
    whole = (p_V * (p_V / q_V).log()).sum()
    value_error = actual_N.detach().std() / math.sqrt(num)
    assert abs(actual_N.detach().mean() - whole) < 4 * value_error < 0.2 * whole
    # A biased estimate would be seen: the renormalised support is many standard errors away.
    biased_NV = _gradient(loss_N("support_kl", student_NV, targets), student_NV)
    assert (((biased_NV.mean(dim=0) - (q_V - p_V)) / error_V.clamp(min=1e-12)).abs() > 8).any()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"unbiased_kl", "cross_entropy"}))
def test_only_the_exact_head_of_a_hybrid_store_counts_in_losses_with_a_tail_bucket(name: str):
    teacher_NV, student_NV = random_logits(1, 2, V), random_logits(2, 2, V).requires_grad_()
    heads = top_supports(teacher_NV, (3, 4))
    tails = [[v for v in range(V) if v not in head][:3] for head in heads]
    hybrid = store(
        teacher_NV,
        [[*head, *tail] for head, tail in zip(heads, tails, strict=True)],
        (1, 2),
        kind=SupportKind.UNBIASED,
        weights=[[0.1] * 6, [0.1] * 7],
        num_exact=(3, 4),
    )
    actual_N, expected_N = (
        loss_N(name, student_NV, targets) for targets in (hybrid, store(teacher_NV, heads, (1, 2)))
    )
    torch.testing.assert_close(actual_N, expected_N)
    torch.testing.assert_close(_gradient(actual_N, student_NV), _gradient(expected_N, student_NV))


def test_tokens_that_the_teacher_never_says_leave_losses_finite():
    teacher_NV = torch.tensor([[1.0, -math.inf, 0.0, -1.0]]).double()
    student_NV = torch.zeros(1, 4).double().requires_grad_()
    whole = store(teacher_NV, [[0, 1, 2, 3]], [0], kind=SupportKind.COMPLETE)
    whole = dataclasses.replace(whole, entropy_N=None)
    for name in sorted(set(NAMES) - {"reverse_kl"}):
        value_N = loss_N(name, student_NV, whole)
        assert 0 < value_N.item() < 2
        assert _gradient(value_N, student_NV).isfinite().all()
    without = store(teacher_NV[:, [0, 2, 3]], [[0, 1, 2]], [0])
    expected_N = loss_N("logit_mse", student_NV[:, :3], without)
    torch.testing.assert_close(loss_N("logit_mse", student_NV, whole), expected_N)


def _with_tail(tail: float, vocab_size: int = 12) -> Tensor:
    """Logits whose first three tokens hold all mass but ``tail``, the rest unequally."""
    head_3 = torch.tensor([5.0, 3.0, 2.0]).double()
    rest_R = torch.arange(1, vocab_size - 2).double()
    return torch.cat([head_3 / head_3.sum() * (1 - tail), rest_R / rest_R.sum() * tail]).log()[None]


@pytest.mark.parametrize("name", ["ghost_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("teacher_tail", [1e-7, 1e-3, 1 - 1e-7])
@pytest.mark.parametrize("student_tail", [1e-30, 1e-7, 0.5, 1 - 1e-7])
def test_tails_of_any_mass_keep_their_digits_in_float32(name: str, teacher_tail: float, student_tail: float):
    teacher_NV, exact_NV = _with_tail(teacher_tail), _with_tail(student_tail).float().double()
    exact_NV.requires_grad_()
    targets = store(teacher_NV, [[0, 1, 2]], [0], dtype=torch.float32)
    student_NV = exact_NV.detach().float().requires_grad_()
    actual_N = loss_N(name, student_NV, targets)
    expected = reference_loss(name, teacher_NV[0], exact_NV[0], [0, 1, 2], beta=0.3)
    assert actual_N.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-6)
    expected_NV = _gradient(expected, exact_NV)
    torch.testing.assert_close(_gradient(actual_N, student_NV), expected_NV.float(), rtol=1e-5, atol=1e-6)


def test_the_gradient_outside_the_support_has_relative_precision_where_the_tails_are_tiny():
    # q_j (1 - ptail / qtail) with qtail = 1e-7 and ptail = 3e-7: 1 - a float32 sum would be noise.
    teacher_NV, student_NV = _with_tail(3e-7), _with_tail(1e-7)
    student_NV = student_NV.float().requires_grad_()
    targets = store(teacher_NV, [[0, 1, 2]], [0], dtype=torch.float32)
    actual_NV = _gradient(loss_N("ghost_kl", student_NV, targets), student_NV)
    expected_R = student_NV.detach().double().softmax(dim=-1)[0, 3:] * (1 - 3e-7 / 1e-7)
    torch.testing.assert_close(actual_NV[0, 3:].double(), expected_R, rtol=1e-3, atol=0)


def test_a_student_whose_tail_underflows_still_has_a_finite_loss_and_gradient():
    teacher_NV = _with_tail(0.1).float()
    student_NV = teacher_NV.clone()
    student_NV[0, 3:] -= 300.0
    student_NV.requires_grad_()
    targets = store(teacher_NV.double(), [[0, 1, 2]], [0], dtype=torch.float32)
    actual_N = loss_N("ghost_kl", student_NV, targets)
    # 0.1 (log 0.1 - log(e^-300 0.1 / 0.9)) + 0.9 (log 0.9 - log 1).
    expected = 0.1 * (300 + math.log(0.9)) + 0.9 * math.log(0.9)
    assert actual_N.item() == pytest.approx(expected, rel=1e-6)
    gradient_NV = _gradient(actual_N, student_NV)
    # The whole missing mass pulls the tail up: -ptail, shared as the tail is.
    assert gradient_NV[0, 3:].sum().item() == pytest.approx(-0.1, rel=1e-5)
    assert gradient_NV.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"cross_entropy", "unbiased_kl"}))
def test_an_empty_support_teaches_nothing(name: str):
    student_NV = random_logits(3, 2, V).requires_grad_()
    targets = store(random_logits(4, 2, V), [[], []], (1, 2))
    assert targets.ids_NK.shape == (2, 0)
    actual_N = loss_N(name, student_NV, targets)
    torch.testing.assert_close(actual_N, torch.zeros(2).double(), atol=1e-14, rtol=0)
    assert _gradient(actual_N, student_NV).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["ghost_kl", "unbiased_kl", "support_kl"])
def test_a_complete_store_gives_the_whole_divergence(name: str):
    teacher_NV, student_NV = random_logits(3, 2, V), random_logits(4, 2, V)
    targets = store(teacher_NV, [list(range(V))] * 2, (1, 2), kind=SupportKind.COMPLETE)
    p_NV, q_NV = teacher_NV.softmax(dim=-1), student_NV.softmax(dim=-1)
    torch.testing.assert_close(loss_N(name, student_NV, targets), (p_NV * (p_NV / q_NV).log()).sum(dim=-1))


def test_several_teachers_make_the_weighted_sum_of_their_losses_and_share_ids():
    student_NV = random_logits(1, 3, V).requires_grad_()
    teachers = [random_logits(seed, 3, V) for seed in (2, 3)]
    supports = [top_supports(teachers[0], (4, 2, 0)), top_supports(teachers[1], (3, 6, 1))]
    supports[1][0] = sorted({*supports[0][0][:2], *supports[1][0]})
    both = [store(t, s, (5, 6, 7)) for t, s in zip(teachers, supports, strict=True)]
    for term in (LossTerm("ghost_kl", temperature=2.0), LossTerm("reverse_kl"), LossTerm("jsd", beta=0.2)):
        spec = LossSpec((term, LossTerm("cross_entropy")), teacher_weights=(0.25, 2.0))
        actual_LN = losses_LN(student_NV, both, spec)
        apart = [losses_LN(student_NV, [each], LossSpec((term,)))[0] for each in both]
        expected_N = 0.25 * apart[0] + 2.0 * apart[1]
        torch.testing.assert_close(actual_LN[0], expected_N)
        torch.testing.assert_close(_gradient(actual_LN[0], student_NV), _gradient(expected_N, student_NV))
        torch.testing.assert_close(actual_LN[1], loss_N("cross_entropy", student_NV, both[0]))


def test_unbiased_stores_of_several_teachers_mix_exactly():
    student_NV = random_logits(1, 2, V).requires_grad_()
    teachers = [random_logits(seed, 2, V) for seed in (2, 3)]
    everything = [list(range(V))] * 2
    both = [store(t, everything, (5, 6), kind=SupportKind.COMPLETE) for t in teachers]
    spec = LossSpec((LossTerm("unbiased_kl"),), teacher_weights=(0.3, 0.7))
    actual_NV = _gradient(losses_LN(student_NV, both, spec), student_NV)
    mixture_NV = 0.3 * teachers[0].softmax(dim=-1) + 0.7 * teachers[1].softmax(dim=-1)
    torch.testing.assert_close(actual_NV, student_NV.detach().softmax(dim=-1) - mixture_NV)


def test_a_temperature_outside_the_grid_is_refused_with_the_grid():
    targets = store(random_logits(1, 1, V), [[0, 1]], [0])
    with pytest.raises(TemperatureError, match=r"^temperature: 3: .*besides 1 it has: 0\.5, 2") as caught:
        loss_N("ghost_kl", random_logits(2, 1, V), targets, 3.0)
    assert (caught.value.temperature, caught.value.grid) == (3.0, GRID)


def test_a_temperature_is_refused_for_a_sampled_store():
    sampled = store(random_logits(1, 1, V), [[0, 1]], [0], kind=SupportKind.UNBIASED, weights=[[0.5, 0.5]])
    for name in ("unbiased_kl", "ghost_kl"):
        with pytest.raises(TemperatureError, match="is sampled or hybrid"):
            loss_N(name, random_logits(2, 1, V), sampled, 2.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LossSpec(()), "no loss is named"),
        (LossSpec((LossTerm("kl"),)), "no loss is named kl; there are cross_entropy"),
        (LossSpec((LossTerm("jsd", beta=1.0),)), "beta is 1"),
        (LossSpec((LossTerm("ghost_kl", temperature=0.0),)), "no temperature"),
        (LossSpec((LossTerm("logit_mse", temperature=2.0),)), "logit_mse has no temperature"),
        (LossSpec((LossTerm("cross_entropy", temperature=2.0),)), "cross_entropy has no temperature"),
        (LossSpec((LossTerm("unbiased_kl"),)), "biased on a top_k or top_p store"),
        (LossSpec((LossTerm("ghost_kl"),), teacher_weights=(1.0, 1.0)), "2 weights for 1 teachers"),
    ],
)
def test_a_spec_that_does_not_fit_its_stores_is_refused_in_one_line(spec: LossSpec, message: str):
    with pytest.raises(RecipeError, match=message) as caught:
        losses_LN(random_logits(2, 1, V), [store(random_logits(1, 1, V), [[0, 1]], [0])], spec)
    assert "\n" not in str(caught.value)


def test_the_table_of_token_losses_cannot_be_changed():
    with pytest.raises(TypeError):
        TOKEN_LOSSES["mine"] = TOKEN_LOSSES["ghost_kl"]  # type: ignore[index]
