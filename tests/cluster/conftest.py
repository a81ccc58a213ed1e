"""Stores that several tests of ``tmkd store`` copy, damage and mend."""

from __future__ import annotations

import pytest

from tests.cluster.project_stores import ProjectStores, make_project_stores, use_here_pool
from tests.reliability.here_pool import HerePool


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> ProjectStores:
    """Two teachers' stores over three corpora of at most 40 rows, in shards of 16."""
    return make_project_stores(tmp_path_factory.mktemp("project"))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> HerePool:
    """Real workers in this process, in place of Ray."""
    return use_here_pool(monkeypatch)
