"""Fixtures and options for all tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session", name="rank_pools")
def _rank_pools() -> Iterator[Callable[[int], RankPool]]:
    """
    Return the pool of a given world size, the same for the whole session.

    Use it for functions that leave the group as they found it.
    """
    with contextlib.ExitStack() as stack:
        pools: dict[int, RankPool] = {}

        def get(world_size: int) -> RankPool:
            if world_size not in pools:
                pools[world_size] = stack.enter_context(RankPool(world_size))
            return pools[world_size]

        yield get


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--long``."""
    parser.addoption("--long", action="store_true", help="run tests marked 'long'")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked ``long`` unless asked for."""
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --long"))
