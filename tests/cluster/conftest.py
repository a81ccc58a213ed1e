"""Stores that several tests of ``tmkd store`` copy, damage and mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cluster.project_stores import ProjectStores
    from tests.reliability.here_pool import HerePool

# What the fixtures need takes seconds to import, which tests without them need not pay.


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> ProjectStores:
    """Two teachers' stores over three corpora of at most 40 rows, in shards of 16."""
    from tests.cluster.project_stores import make_project_stores

    return make_project_stores(tmp_path_factory.mktemp("project"))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> HerePool:
    """Real workers in this process, in place of Ray."""
    from tests.cluster.project_stores import use_here_pool

    return use_here_pool(monkeypatch)
