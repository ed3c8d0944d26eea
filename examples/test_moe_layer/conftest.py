"""Options that choose configurations, one pytest item for each, and what verbosity adds to the report."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe layer")
    group.addoption("--subtests", metavar="ID,ID", help="run exactly these configurations; vLLM's ids are understood")
    group.addoption("--full", action="store_true", help="run all configurations")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that wants a ``config`` one after another; what cannot run is a skip that says why."""
    if "config" not in metafunc.fixturenames:
        return
    from .config import BACKENDS, PARALLEL_COMBOS  # noqa: PLC0415 -- imports torch, which --help can do without
    from .selection import default_device_type, select, select_ids  # noqa: PLC0415  (imported where it is needed)

    is_parallel = metafunc.function.__name__ == "test_moe_layer"
    if ids := metafunc.config.getoption("subtests"):
        configs, skipped = select_ids(ids.split(","), default_device_type())
    else:
        full = metafunc.config.getoption("full")
        configs, skipped = select(list(PARALLEL_COMBOS), BACKENDS, default_device_type(), full=full)
    params = [pytest.param(each, id=each.id().strip("[]")) for each in configs if (each.world_size > 1) == is_parallel]
    if is_parallel:
        params += [pytest.param(None, id=reason, marks=pytest.mark.skip(reason=reason)) for reason in skipped]
    metafunc.parametrize("config", params)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With -vv, say which combinations are invalid and why."""
    if (verbosity := config.get_verbosity()) > 1:
        from .selection import explain_invalid  # noqa: PLC0415 -- as above

        terminalreporter.section("invalid combinations")
        for line in explain_invalid(verbosity):
            terminalreporter.line(line)
