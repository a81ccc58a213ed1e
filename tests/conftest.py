"""Settings that hold for every test: offline, no inherited cluster, few threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.smollm2 import smollm2  # noqa: F401  fixture
from tests.tally import counts, tally  # noqa: F401  fixtures

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("RAY_ADDRESS", None)

_PREFIXES = ("AWS_", "GOOGLE_", "TMKD_")


@pytest.fixture(autouse=True)
def _no_variable_is_left_behind() -> Iterator[None]:
    """Fails a test after which another account, endpoint or cache is in the environment."""
    before = _variables()
    yield
    left = {name for name, _ in before.items() ^ _variables().items()}
    assert not left, f"the test has changed {', '.join(sorted(left))} for those after it"


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
