"""Options that choose configurations."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe layer")
    group.addoption("--subtests", metavar="ID,ID", help="run exactly these configurations")
    group.addoption("--full", action="store_true", help="run all configurations")
