from __future__ import annotations

import pytest

from schemas.keep_trial import KeepPlan, name_policy
from schemas.policy import POLICY_ADAPTER
from tests.cluster.language.keep_plans import make_plan


def test_a_document_reads_back_as_itself_with_null_for_what_is_not_known() -> None:
    plan = make_plan()
    text = plan.model_dump_json()
    assert KeepPlan.model_validate_json(text) == plan
    assert '"kl_from_full":null' in text
    assert "Infinity" not in text
    assert "NaN" not in text


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ({"kind": "top_k", "k": 50}, "top 50"),
        ({"kind": "top_p", "p": 0.95, "k_max": 512}, "top-p 0.95, to 512"),
        ({"kind": "top_p", "p": 0.9, "k_min": 4, "k_max": 64}, "top-p 0.9, 4 to 64"),
        ({"kind": "sampled", "num_samples": 12}, "sampled 12"),
        ({"kind": "sampled", "num_samples": 12, "tau": 0.8}, "sampled 12, tau 0.8"),
        ({"kind": "hybrid", "k": 30, "m": 20}, "hybrid 30+20"),
        ({"kind": "dense"}, "dense"),
    ],
)
def test_policies_have_names(policy: dict[str, object], name: str) -> None:
    assert name_policy(POLICY_ADAPTER.validate_python(policy)) == name
