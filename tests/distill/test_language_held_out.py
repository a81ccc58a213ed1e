from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distill.engine import start_process_group, stop_process_group
from distill.fused_head import FusedLosses
from distill.language_held_out import NUM_BINS, LanguageSums
from tests.tiny_stage import no_launcher_environment

pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with no_launcher_environment():
        start_process_group(1)
        yield
        if dist.is_initialized():
            stop_process_group()


def make_losses(seed: int, num: int) -> tuple[FusedLosses, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    terms = torch.rand(2, num, generator=generator) * 5
    top = torch.rand(num, generator=generator).clamp(min=0.05).log()
    hits = torch.rand(num, generator=generator) < 0.4
    weights = (torch.rand(num, generator=generator) < 0.8).float()
    return FusedLosses(
        (terms[0] * weights).sum(),
        terms,
        top,
        hits,
    ), weights


def test_measures_are_those_written_out_and_padding_does_not_count() -> None:
    losses, weights = make_losses(1, 200)
    sums = LanguageSums.empty(2, torch.device("cpu"))
    for part in (slice(0, 70), slice(70, 200)):
        total = (losses.terms_LN[0, part] * weights[part]).sum()
        top = losses.top_log_prob_N
        assert top is not None
        sums.add(FusedLosses(total, losses.terms_LN[:, part], top[part], losses.hits_N[part]), weights[part])
    sums.share()
    found = sums.measures(["ghost_kl"], 1)
    real = weights.numpy() > 0
    terms, hits = losses.terms_LN.double().numpy()[:, real], losses.hits_N.numpy()[real]
    confidence = np.exp(losses.top_log_prob_N.double().numpy()[real])  # type: ignore[union-attr]
    ece = 0.0
    for index in range(NUM_BINS):
        inside = (confidence >= index / NUM_BINS) & (confidence < (index + 1) / NUM_BINS)
        if inside.any():
            ece += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    assert found == pytest.approx(
        {
            "loss": terms[0].mean(),
            "ghost_kl": terms[0].mean(),
            "perplexity": np.exp(terms[1].mean()),
            "accuracy": hits.mean(),
            "ece": ece,
        },
        rel=1e-6,
    )


def test_a_loss_without_a_term_at_temperature_1_cannot_be_calibrated() -> None:
    losses, weights = make_losses(1, 4)
    sums = LanguageSums.empty(2, torch.device("cpu"))
    with pytest.raises(ValueError, match="temperature 1"):
        sums.add(FusedLosses(losses.total, losses.terms_LN, None, losses.hits_N), weights)
