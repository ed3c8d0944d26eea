"""
Where pytest finds collective_scope: its options, and the way to the rest of the plugin once that is asked for.

Not in the package: pytest imports this for every run, and importing the package imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest


if TYPE_CHECKING:
    from collective_scope import CollectiveScope
    from collective_scope.pytest_plugin import Plugin

_PLUGIN: pytest.StashKey[Plugin] = pytest.StashKey()

_FLAGS = {
    "collective_scope": "run each phase of each test in a scope, on all ranks together",
    "collective_scope_lockstep_gc": "collect garbage at the end of each phase, at the same point on every rank",
}
_VALUES = {
    "timeout": ("SECONDS", "longest wait for the other ranks at the end of a phase"),
    "failure_timeout": ("SECONDS", "longest wait for the other ranks at its start, or once one has failed"),
    "warn_after": ("SECONDS", "when to say first which ranks are late, and where they are"),
    "kill_after": ("SECONDS", "longest time of a phase; a rank that takes longer is ended, with exit code 124"),
    "group": ("NAME", "the group that runs the tests, or a function that returns it, as package.module:name"),
    "make": ("NAME", "a function that makes a group anew after a failure, for RenewableGroup; auto: the default group"),
}

_OPTIONS = [*_FLAGS, *(f"collective_scope_{name}" for name in _VALUES)]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; each can stand in the configuration, too."""
    group = parser.getgroup("collective_scope", "ranks that go through the tests together")
    for name, text in _FLAGS.items():
        group.addoption(_option(name), action="store_true", default=None, help=text)
        parser.addini(name, text, type="bool", default=False)
    for name, (metavar, text) in _VALUES.items():
        group.addoption(_option(f"collective_scope_{name}"), metavar=metavar, help=text)
        parser.addini(f"collective_scope_{name}", text)


def pytest_configure(config: pytest.Config) -> None:
    """Start the plugin if all tests are to run in scopes."""
    text = "collective(**options): run this test in scopes, on all ranks together; options as for collective_scope()"
    config.addinivalue_line("markers", text)
    if _get(config, "collective_scope"):
        _start(config, everywhere=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the plugin if some tests are to run in scopes."""
    config = session.config
    if _PLUGIN in config.stash:
        return
    if any(map(asks_for_scopes, session.items)):
        _start(config, everywhere=False)
    elif given := [_option(name) for name in _OPTIONS if config.getoption(name) is not None]:
        text = f"{', '.join(given)} without --collective-scope: no test runs in a scope"
        config.issue_config_time_warning(pytest.PytestConfigWarning(text), stacklevel=2)


@pytest.fixture(name="collective_scope")
def _collective_scope(request: pytest.FixtureRequest) -> CollectiveScope:
    """Return the scope of the test function: what is registered there runs after it, before fixtures are torn down."""
    plugin = request.config.stash.get(_PLUGIN, None)
    if plugin is None or not plugin.phases.asks(request.node):
        msg = "a test that gets the fixture collective_scope by its name needs --collective-scope or @pytest.mark.collective"
        raise RuntimeError(msg)
    return plugin.phases.scope_of_test(request.node)


def asks_for_scopes(item: pytest.Item) -> bool:
    """Whether a test is to run in scopes although not all are."""
    is_marked = item.get_closest_marker("collective") is not None
    return is_marked or "collective_scope" in getattr(item, "fixturenames", ())


def _start(config: pytest.Config, *, everywhere: bool) -> None:
    from collective_scope.pytest_plugin import Plugin  # noqa: PLC0415  (it imports torch)

    options = {name: value for name in _VALUES if (value := _get(config, f"collective_scope_{name}"))}
    options["lockstep_gc"] = _get(config, "collective_scope_lockstep_gc")
    config.stash[_PLUGIN] = Plugin(config, None if everywhere else asks_for_scopes, options)
    config.pluginmanager.register(config.stash[_PLUGIN], "collective_scope ranks")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _get(config: pytest.Config, name: str) -> Any:
    value = config.getoption(name)
    return config.getini(name) if value is None else value
