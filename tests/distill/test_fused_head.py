"""The fused head against dense float64 autograd over full logits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill import head_pass
from distill.fused_head import FusedLosses, HeadForm, fused_cross_entropy, fused_losses
from distill.stored_targets import StoredTargets, SupportKind
from distill.token_losses import TOKEN_LOSSES, LossSpec, LossTerm
from schemas.errors import DataError, RecipeError
from tests.distill.dense_reference import random_logits, reference_loss, store, top_supports

NAMES = sorted(TOKEN_LOSSES)
N, D, V, PADDED = 7, 5, 13, 16
SIZES = (4, 1, 0, V, 3, 6, 2)
TARGETS = (3, 0, 12, 5, 9, 1, 2)
WEIGHTS = (1.0, 0.5, 1.0, 2.0, 0.0, 1.0, 1.0)
FORMS = {
    "plain": HeadForm(),
    "scaled": HeadForm(scale=0.3),
    "capped": HeadForm(soft_cap=2.0),
    "scaled and capped": HeadForm(scale=1.7, soft_cap=3.0),
}


@dataclasses.dataclass
class Case:
    """Inputs of the head, and what made the targets."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor
    teacher_NV: Tensor
    supports: list[list[int]]
    targets: StoredTargets

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden_ND, self.weight_VD, self.bias_V

    def run(self, spec: LossSpec, form: HeadForm = FORMS["plain"]) -> FusedLosses:
        return fused_losses(*self.inputs, self.targets, spec, form)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.inputs)


def _case(*, whole: bool = False, dtype: torch.dtype = torch.float64) -> Case:
    teacher_NV = random_logits(1, N, V)
    supports = top_supports(teacher_NV, [V] * N if whole else SIZES)
    kind = SupportKind.COMPLETE if whole else SupportKind.EXACT
    wide = torch.promote_types(dtype, torch.float32)
    targets = store(teacher_NV, supports, TARGETS, kind=kind, dtype=wide, position_weights=WEIGHTS)
    return Case(
        random_logits(2, N, D).to(dtype).requires_grad_(),
        random_logits(3, PADDED, D, 1.0).to(dtype).requires_grad_(),
        random_logits(4, 1, PADDED, 1.0)[0].to(dtype).requires_grad_(),
        teacher_NV,
        supports,
        targets,
    )


def _spec(name: str) -> LossSpec:
    tempered = 2.0 if TOKEN_LOSSES[name].uses_temperature else 1.0
    return LossSpec(
        (LossTerm(name, 0.7, tempered, 0.3), LossTerm(name, 0.2, beta=0.3), LossTerm("cross_entropy", 0.4))
    )


def _logits(case: Case, form: HeadForm) -> Tensor:
    logits_NV = (case.hidden_ND @ case.weight_VD.T + case.bias_V)[:, :V] * form.scale
    return logits_NV if form.soft_cap is None else form.soft_cap * (logits_NV / form.soft_cap).tanh()


def _reference(case: Case, spec: LossSpec, form: HeadForm) -> Tensor:
    logits_NV, total = _logits(case, form), torch.zeros((), dtype=torch.float64)
    for n, weight in enumerate(WEIGHTS):
        for term in spec.terms:
            total = total + weight * term.weight * reference_loss(
                term.name, case.teacher_NV[n], logits_NV[n], case.supports[n],
                target=TARGETS[n], temperature=term.temperature, beta=term.beta,
            )  # fmt: skip
    return total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_value_and_gradients_are_those_of_dense_autograd(name: str, form: HeadForm):
    case, spec = _case(whole=TOKEN_LOSSES[name].needs_whole), _spec(name)
    actual = case.run(spec, dataclasses.replace(form, chunk_positions=3))
    expected = _reference(case, spec, form)
    torch.testing.assert_close(actual.total, expected, rtol=1e-11, atol=1e-12)
    for mine, theirs in zip(case.gradients(actual.total), case.gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str):
    case, spec = _case(whole=TOKEN_LOSSES[name].needs_whole), _spec(name)
    form = HeadForm(scale=0.8, soft_cap=4.0, chunk_positions=3)

    def total(*inputs: Tensor) -> Tensor:
        return fused_losses(*inputs, case.targets, spec, form).total

    assert torch.autograd.gradcheck(total, case.inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 2, 6, 7, 100, None])
def test_the_size_of_chunks_changes_nothing(name: str, chunk: int | None):
    case, spec = _case(whole=TOKEN_LOSSES[name].needs_whole), _spec(name)
    expected = case.run(spec, HeadForm(chunk_positions=4))
    actual = case.run(spec, HeadForm(chunk_positions=chunk))
    torch.testing.assert_close(actual.total, expected.total)
    torch.testing.assert_close(actual.terms_LN, expected.terms_LN)
    for mine, theirs in zip(case.gradients(actual.total), case.gradients(expected.total), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_terms_are_per_position_and_add_up_to_the_total_under_both_weights():
    case, spec = _case(), _spec("ghost_kl")
    losses = case.run(spec)
    weights_L = torch.tensor([term.weight for term in spec.terms]).double()
    expected = (weights_L @ losses.terms_LN) @ torch.tensor(WEIGHTS).double()
    torch.testing.assert_close(losses.total.detach(), expected)
    assert not losses.terms_LN.requires_grad


def test_tokens_of_the_padded_vocabulary_get_no_gradient_and_no_probability():
    case, spec = _case(), _spec("ghost_kl")
    losses = case.run(spec)
    _, of_weight_VD, of_bias_V = case.gradients(losses.total)
    assert not of_weight_VD[V:].any()
    assert not of_bias_V[V:].any()
    with torch.no_grad():
        case.bias_V[V:] += 50.0
    torch.testing.assert_close(case.run(spec).total, losses.total)


def test_a_position_of_weight_zero_moves_nothing():
    case, spec = _case(), _spec("ghost_kl")
    of_hidden_ND, _, _ = case.gradients(case.run(spec).total)
    assert not of_hidden_ND[WEIGHTS.index(0.0)].any()


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_same_without_gradients(name: str):
    case, spec = _case(whole=TOKEN_LOSSES[name].needs_whole), _spec(name)
    expected = case.run(spec, HeadForm(chunk_positions=3))
    with torch.no_grad():
        actual = case.run(spec, HeadForm(chunk_positions=3))
    assert not actual.total.requires_grad
    torch.testing.assert_close(actual.total, expected.total.detach())
    torch.testing.assert_close(actual.terms_LN, expected.terms_LN)


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_keep_theirs():
    case, spec = _case(), _spec("ghost_kl")
    expected_ND, *_ = case.gradients(case.run(spec).total)
    case.weight_VD.requires_grad_(False)
    losses = fused_losses(case.hidden_ND, case.weight_VD, None, case.targets, spec)
    losses.total.backward()
    assert case.weight_VD.grad is None
    plain = fused_losses(case.hidden_ND, case.weight_VD, case.bias_V, case.targets, spec)
    (actual_ND,) = torch.autograd.grad(plain.total, case.hidden_ND)
    torch.testing.assert_close(actual_ND, expected_ND)


def test_gradients_accumulate_under_loss_scaling_as_if_the_batch_were_whole():
    case, spec = _case(), _spec("ghost_kl")
    expected = [gradient / 6.5 for gradient in case.gradients(case.run(spec).total)]
    scale = 1024.0
    for start, stop in ((0, 3), (3, 7)):
        part = fused_losses(
            case.hidden_ND[start:stop], case.weight_VD, case.bias_V, case.targets.narrow(start, stop), spec
        )
        (part.total * (scale / 6.5)).backward()
    for tensor, theirs in zip(case.inputs, expected, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad / scale, theirs)


def test_a_second_backward_pass_gives_the_same_gradients():
    case = _case()
    losses = case.run(_spec("jsd"), HeadForm(chunk_positions=3))
    first = torch.autograd.grad(losses.total, case.inputs, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(3 * losses.total, case.inputs)
    for mine, theirs, before in zip(second, first, kept, strict=True):
        assert torch.equal(theirs, before)
        torch.testing.assert_close(mine, 3 * theirs)


def test_the_weight_is_not_read_by_backward():
    # As under ZeRO-3, where it is gone by then.
    case = _case()
    expected = case.gradients(case.run(_spec("ghost_kl")).total)
    losses = case.run(_spec("ghost_kl"))
    with torch.no_grad():
        case.weight_VD.data.fill_(math.nan)
    for mine, theirs in zip(case.gradients(losses.total), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_tied_weight_gets_the_gradient_of_both_uses():
    case, spec = _case(), LossSpec((LossTerm("ghost_kl"),))
    tokens_N = torch.tensor(TARGETS)
    hidden_ND = case.weight_VD[tokens_N].tanh()
    total = fused_losses(hidden_ND, case.weight_VD, None, case.targets, spec).total
    (actual_VD,) = torch.autograd.grad(total, case.weight_VD)
    tied = dataclasses.replace(
        case, hidden_ND=case.weight_VD[tokens_N].tanh(), bias_V=torch.zeros(PADDED).double()
    )
    (expected_VD,) = torch.autograd.grad(_reference(tied, spec, HeadForm()), case.weight_VD)
    torch.testing.assert_close(actual_VD, expected_VD)


def test_several_teachers_with_weights_are_the_sum_of_single_ones():
    case = _case()
    teacher_NV = random_logits(9, N, V)
    other = store(
        teacher_NV, top_supports(teacher_NV, (2, 5, 3, 0, 1, 4, V)), TARGETS, position_weights=WEIGHTS
    )
    terms = (LossTerm("ghost_kl", temperature=2.0), LossTerm("reverse_kl", 0.5))
    both = [case.targets, other]
    actual = fused_losses(*case.inputs, both, LossSpec(terms, (0.25, 1.5)), HeadForm(chunk_positions=3))
    apart = [fused_losses(*case.inputs, each, LossSpec(terms)).total for each in both]
    expected = 0.25 * apart[0] + 1.5 * apart[1]
    torch.testing.assert_close(actual.total, expected)
    for mine, theirs in zip(case.gradients(actual.total), case.gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_cross_entropy_is_that_of_torch_with_confidence_and_hits():
    case = _case()
    tokens = StoredTargets.of_tokens(torch.tensor(TARGETS), V)
    losses = fused_cross_entropy(*case.inputs, tokens, HeadForm(chunk_positions=3))
    logits_NV = _logits(case, HeadForm())
    expected = nn.functional.cross_entropy(logits_NV, torch.tensor(TARGETS), reduction="sum")
    torch.testing.assert_close(losses.total, expected)
    for mine, theirs in zip(case.gradients(losses.total), case.gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs)
    top_N, best_N = logits_NV.log_softmax(dim=-1).max(dim=-1)
    assert losses.top_log_prob_N is not None
    torch.testing.assert_close(losses.top_log_prob_N, top_N.detach())
    assert torch.equal(losses.hits_N, best_N == torch.tensor(TARGETS))


def test_no_position_at_all_is_a_loss_of_zero():
    case = _case()
    losses = fused_losses(
        case.hidden_ND[:0], case.weight_VD, case.bias_V, case.targets.narrow(0, 0), _spec("ghost_kl")
    )
    assert losses.total.item() == 0
    losses.total.backward()
    assert case.weight_VD.grad is not None
    assert not case.weight_VD.grad.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_float32_sums(name: str, dtype: torch.dtype):
    case = _case(whole=TOKEN_LOSSES[name].needs_whole, dtype=dtype)
    losses = case.run(_spec(name), HeadForm(chunk_positions=3))
    assert losses.total.dtype == losses.terms_LN.dtype == torch.float32
    wide = dataclasses.replace(
        case,
        hidden_ND=case.hidden_ND.detach().double().requires_grad_(),
        weight_VD=case.weight_VD.detach().double().requires_grad_(),
        bias_V=case.bias_V.detach().double().requires_grad_(),
    )
    # The products are rounded to the compute dtype, so their error is that of a logit of about 5.
    expected = _reference(wide, _spec(name), HeadForm())
    torch.testing.assert_close(losses.total.double(), expected, rtol=0.01, atol=0.02)
    for mine, theirs in zip(case.gradients(losses.total), wide.gradients(expected), strict=True):
        assert mine.dtype == dtype
        scale = theirs.abs().max()
        torch.testing.assert_close(mine.double() / scale, theirs / scale, rtol=0, atol=0.02)


def test_a_weight_whose_gradient_is_added_up_in_blocks_gets_all_of_it(monkeypatch: pytest.MonkeyPatch):
    case, spec = _case(dtype=torch.bfloat16), _spec("ghost_kl")
    expected = case.gradients(case.run(spec).total)
    monkeypatch.setattr(head_pass, "BLOCK_ELEMENTS", 2 * D)
    for mine, theirs in zip(case.gradients(case.run(spec).total), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_sums_over_many_positions_are_not_rounded_to_half_precision():
    num = 3000
    hidden_ND = torch.zeros(num, D, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    bias_V = torch.zeros(V, dtype=torch.bfloat16, requires_grad=True)
    tokens = StoredTargets.of_tokens(torch.zeros(num, dtype=torch.int64), V)
    losses = fused_cross_entropy(hidden_ND, weight_VD, bias_V, tokens, HeadForm(chunk_positions=7))
    assert losses.total.item() == pytest.approx(num * math.log(V), rel=1e-5)
    (of_bias_V,) = torch.autograd.grad(losses.total, bias_V)
    # A bfloat16 sum of 3000 / 13 would stop growing at 256 times its step.
    assert of_bias_V[1].item() == pytest.approx(num / V, rel=0.004)


def test_autocast_makes_the_products_in_its_dtype_and_gradients_in_the_parameters_dtype():
    case = _case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = case.run(_spec("ghost_kl"))
    exact = case.run(_spec("ghost_kl"))
    assert losses.total.dtype == torch.float32
    assert losses.total.item() != exact.total.item()
    torch.testing.assert_close(losses.total, exact.total, rtol=0.02, atol=0.02)
    assert {gradient.dtype for gradient in case.gradients(losses.total)} == {torch.float32}


class _Operations(TorchDispatchMode):
    """Remembers the elements of the largest result of any operation, and counts matrix products."""

    largest = 0
    num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("terms", [(LossTerm("ghost_kl"),), (LossTerm("jsd"), LossTerm("ghost_kl", 1, 2.0))])
def test_no_tensor_of_all_positions_and_the_vocabulary_exists(terms: tuple[LossTerm, ...]):
    num, vocab_size = 64, 200
    teacher_NV = random_logits(1, num, vocab_size)
    targets = store(teacher_NV, top_supports(teacher_NV, [5] * num), [0] * num, dtype=torch.float32)
    hidden_ND = random_logits(2, num, 4).float().requires_grad_()
    weight_VD = random_logits(3, vocab_size, 4).float().requires_grad_()
    with _Operations() as seen:
        form = HeadForm(soft_cap=3.0, chunk_positions=8)
        fused_losses(hidden_ND, weight_VD, None, targets, LossSpec(terms), form).total.backward()
    assert 8 * vocab_size <= seen.largest < 2 * 8 * vocab_size


def test_gradients_cost_products_only_where_they_are_wanted():
    case, spec = _case(), _spec("ghost_kl")
    form = HeadForm(chunk_positions=N)
    with _Operations() as seen:
        losses = case.run(spec, form)
        assert seen.num_products == 3
        losses.total.backward()
        assert seen.num_products == 3
    with _Operations() as seen, torch.no_grad():
        case.run(spec, form)
    assert seen.num_products == 1


def test_targets_shifted_by_one_position_are_seen():
    # A language in which token v is followed by v + 1: the head's input is the one-hot current token.
    tokens_T = torch.arange(9)
    weight_VD = torch.zeros(10, 10).double()
    weight_VD[torch.arange(1, 10), torch.arange(9)] = 12.0
    hidden_TD = torch.eye(10).double()[tokens_T]
    spec = LossSpec((LossTerm("cross_entropy"), LossTerm("ghost_kl")))

    def mean_losses(predicted_P: Tensor, hidden_PD: Tensor) -> Tensor:
        teacher_PV = 12.0 * torch.eye(10).double()[predicted_P]
        targets = store(teacher_PV, top_supports(teacher_PV, [1] * len(predicted_P)), predicted_P.tolist())
        return fused_losses(hidden_PD, weight_VD, None, targets, spec).terms_LN.mean(dim=1)

    # Row t of the hidden states predicts token t + 1: right, then without and with too much of a shift.
    assert (mean_losses(tokens_T[1:], hidden_TD[:-1]) < 1e-3).all()
    assert (mean_losses(tokens_T, hidden_TD) > 5).all()
    assert (mean_losses(tokens_T[2:], hidden_TD[:-2]) > 5).all()


def test_inputs_that_do_not_fit_are_refused():
    case, spec = _case(), _spec("ghost_kl")
    with pytest.raises(ValueError, match="for 7 positions"):
        fused_losses(case.hidden_ND[:6], case.weight_VD, None, case.targets, spec)
    with pytest.raises(ValueError, match="12 rows for 13 tokens"):
        fused_losses(case.hidden_ND, case.weight_VD[:12], None, case.targets, spec)
    with pytest.raises(ValueError, match="no targets"):
        fused_losses(case.hidden_ND, case.weight_VD, None, [], spec)
    other = dataclasses.replace(case.targets, target_ids_N=case.targets.target_ids_N.flip(0))
    with pytest.raises(ValueError, match="must share"):
        fused_losses(case.hidden_ND, case.weight_VD, None, [case.targets, other], spec)
    wild = dataclasses.replace(case.targets, target_ids_N=torch.tensor([13, *TARGETS[1:]]))
    with pytest.raises(DataError, match="target id 13 or 0 is out of range"):
        fused_losses(case.hidden_ND, case.weight_VD, None, wild, spec)
    with pytest.raises(RecipeError, match="biased"):
        case.run(LossSpec((LossTerm("unbiased_kl"),)))


def test_half_precision_gradients_that_only_loss_scaling_lifts_are_not_lost():
    # Position weights of 1e-6 make gradients of about 1e-8; float16 ends at 6e-8.
    case = _case(dtype=torch.float16)
    spec, scale = LossSpec((LossTerm("ghost_kl"),)), 2.0**20
    small = dataclasses.replace(case.targets, position_weights_N=torch.tensor(WEIGHTS) * 2.0**-20)
    losses = fused_losses(*case.inputs, small, spec)
    expected = case.gradients(case.run(spec).total)
    for mine, theirs in zip(case.gradients(losses.total * scale), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
