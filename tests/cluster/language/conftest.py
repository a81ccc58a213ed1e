"""Stores of language models that several tests copy, damage and mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cluster.language.project_stores import LanguageStoresOnDisk

# What the fixture needs takes seconds to import, which tests without it need not pay.


@pytest.fixture(scope="session")
def language_stores(tmp_path_factory: pytest.TempPathFactory) -> LanguageStoresOnDisk:
    """Two teachers' stores over one corpus, in shards of 16 chunks."""
    from tests.cluster.language.project_stores import make_language_stores

    return make_language_stores(tmp_path_factory.mktemp("language"))
