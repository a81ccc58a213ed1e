"""A plan of keep policies for tests: figures that no teacher gave."""

from __future__ import annotations

from typing import Any

from schemas.keep_trial import KeepPlan


def loss(name: str, variation: float, **changes: Any) -> dict[str, Any]:
    return {
        "loss": name,
        "total_variation": variation,
        "kl_to_full": 0.25,
        "kl_from_full": None,
        "calibration_error": 0.04,
        "gradient_angle": 100 * variation,
        "gradient_ratio": 1.1,
    } | changes


def candidate(policy: dict[str, Any], losses: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "policy": policy,
        "codec": "packed",
        "is_recipe": False,
        "mean_kept": 50.0,
        "missed_mass": 0.17,
        "entry_bytes": 202.0,
        "row_bytes": 224.4,
        "store_bytes": 123_456_789,
        "quantisation": {"total_variation": 0.00016, "divergence": 1e-7},
        "teacher_s": 7200.0,
        "wall_s": 3600.0,
        "gpu_hours": None,
        "cost": None,
        "losses": losses,
    } | changes


def make_plan(**trial: Any) -> KeepPlan:
    """One teacher, four policies."""
    top = [loss("ghost_kl", 0.15, kl_from_full=0.5), loss("support_kl", 0.17)]
    fields: dict[str, Any] = {
        "teacher": "big",
        "vocab": 49152,
        "sample": {"num_chunks": 2, "num_tokens": 1024, "num_positions": 1022},
        "corpora": {"num_chunks": 2000, "num_tokens": 1_000_000, "num_positions": 998_000},
        "corpus_names": ("wiki",),
        "num_shards": 4,
        "device": "cpu",
        "num_threads": 1,
        "tokens_per_s": 512.0,
        "num_actors": 2,
        "gpus_per_actor": 0,
        "perplexity": 22.5,
        "calibration_error": 0.031,
        "student": "layers of small",
        "candidates": [
            candidate({"kind": "top_k", "k": 50}, top, is_recipe=True),
            candidate({"kind": "sampled", "num_samples": 90}, [loss("unbiased_kl", 0.3)]),
            candidate({"kind": "hybrid", "k": 27, "m": 28}, [loss("unbiased_kl", 0.2, kl_to_full=None)]),
            candidate(
                {"kind": "dense"},
                [loss("unbiased_kl", 0.0, kl_to_full=0.0, kl_from_full=0.0)],
                entry_bytes=98304.0,
                mean_kept=49152.0,
            ),
        ],
    }
    return KeepPlan.model_validate({"run": "run", "gpu_hour_price": None, "trials": [fields | trial]})
