"""Options that choose configurations, and what verbosity adds to the report."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe layer")
    group.addoption("--subtests", metavar="ID,ID", help="run exactly these configurations")
    group.addoption("--full", action="store_true", help="run all configurations")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With -vv, say which combinations are invalid and why."""
    if (verbosity := config.get_verbosity()) > 1:
        from .suite import explain_invalid  # noqa: PLC0415 -- imports torch, which --help can do without

        terminalreporter.section("invalid combinations")
        for line in explain_invalid(verbosity):
            terminalreporter.line(line)
