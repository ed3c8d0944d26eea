"""The suite under pytest: one pool for the session, and one item for each subtest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .pool import Pool
from .suite import HEALTHY, WORLD_SIZE


@pytest.fixture(scope="session", name="pool")
def _pool() -> Iterator[Pool]:
    with Pool(WORLD_SIZE) as pool:
        yield pool


@pytest.mark.parametrize("name", HEALTHY)
def test_subtest(name: str, pool: Pool) -> None:
    """All ranks run it; it fails here if it failed on any."""
    pool.check(name, HEALTHY[name])
