"""Fixtures and options for all tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from collective_scope import _teardown
from collective_scope.agreement import barrier, control, locate, watch
from tests.ranks import RankPool, busy_cores, standstills


# A machine that stands still for a moment makes no example slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


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


@pytest.fixture(scope="session", autouse=True)
def _load(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep all cores busy, or let all stand still, if asked to; one of the processes that run tests does that for all."""
    worker, config = os.environ.get("PYTEST_XDIST_WORKER"), request.config
    with contextlib.ExitStack() as stack:
        if worker in (None, "gw0") and config.getoption("--busy"):
            stack.enter_context(busy_cores())
        if worker in (None, "gw0") and (seconds := config.getoption("--standstill")):
            stack.enter_context(standstills(os.getppid() if worker else os.getpid(), seconds))
        yield


@pytest.fixture(autouse=True)
def _forget_default_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test see that an earlier one, in the same process, had a default group."""
    monkeypatch.setattr(_teardown, "_last_with_default_group", [])


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give ranks that are threads longer to answer, and their stores too, so that a busy machine fails no test."""
    for module in (locate, watch):
        monkeypatch.setattr(module, "ANSWER_S", 2.0)
    if request.node.get_closest_marker("frozen_store") is None:
        for module in (barrier, control, watch):
            monkeypatch.setattr(module, "GRACE_S", 10.0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of these tests."""
    parser.addoption("--long", action="store_true", help="run tests marked 'long'")
    parser.addoption("--repeat", type=int, default=1, metavar="N", help="run each test N times")
    parser.addoption("--busy", action="store_true", help="keep all cores busy meanwhile")
    parser.addoption(
        "--standstill", type=float, default=0.0, metavar="S", help="let all stand still, up to S s at a time"
    )
    parser.addoption("--lanes", type=int, default=8, metavar="N", help="play N faults at a time")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat each test as often as asked for."""
    times = metafunc.config.getoption("--repeat")
    if times > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(times), ids=lambda number: f"time{number}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked ``long`` unless asked for."""
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --long"))
