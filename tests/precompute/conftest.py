"""One local Ray for all tests that need one: starting it takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this test run's own with two CPUs."""
    from cluster.ray_session import ray_session

    with ray_session(num_cpus=2):
        yield
