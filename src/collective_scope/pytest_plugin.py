"""
The pytest plugin: the ranks go through a suite together, from the same collection to the same exit code.

It stands on ``_pytest_phases`` (a scope around each phase of each test), ``_pytest_terminal`` (what a rank
says past pytest's capture), ``_pytest_tellings`` (the words of the ranks to each other on a phase) and
``_pytest_reports`` (the report that all make of these).
"""

from __future__ import annotations

import hashlib
import pkgutil
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch.distributed as dist

from ._api import collective_scope
from ._groups import find
from ._pytest_phases import Phase, Phases, World, Wrapper, new_scope, stop
from ._pytest_tellings import hear, telling
from ._pytest_terminal import Quiet, Terminal
from ._renewable import RenewableGroup
from .exceptions import BarrierTimeoutError, CleanupMismatchError, CollectiveScopeError, PeerFailedError, PeerLostError


MOST_NAMED = 10
"""Tests that are named, at most, for each rank that has collected others."""


class Plugin:
    """
    The hooks of the session.

    Args:
        config: pytest's.
        asks: Whether a test is to run in scopes; None if all are.
        given: Options, by name; those of the command line and of ini files are texts.

    Raises:
        pytest.UsageError: If an option makes no sense.
    """

    def __init__(
        self, config: pytest.Config, asks: Callable[[pytest.Item], bool] | None, given: Mapping[str, Any]
    ) -> None:
        self._config = config
        # The workers of pytest-xdist each run other tests.
        self._world = world = World() if hasattr(config, "workerinput") else World.of_environment()
        if world.world_size > 1 and config.getoption("numprocesses", None):
            msg = "with collective_scope every rank runs every test, in order; so -n cannot be used under a launcher"
            raise pytest.UsageError(msg)
        self._group, self._options = _read_options(world, given)
        self._is_quiet = world.rank > 0 and asks is None
        if self._is_quiet:
            config.option.xmlpath = None  # rank 0 writes it
        self._uncollected: list[str] = []
        self._asks = asks or (lambda _: True)
        self._terminal = Terminal(config, world.rank, world.world_size)
        self.phases = Phases(config, self._asks, self._group, self._options, self._terminal)
        config.pluginmanager.register(self.phases, "collective_scope phases")
        config.pluginmanager.register(Refusals(self.phases), "collective_scope refusals")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Let rank 0 alone print, if all tests run in scopes; let the peers see where this rank is from now on."""
        if self._is_quiet and self._config.pluginmanager.has_plugin("terminalreporter"):
            self._config.get_terminal_writer()._file = Quiet(self._terminal.stderr)  # noqa: SLF001  (pytest cannot be quiet)
        found = None if self._world.store is None else find(self._world)
        if found is not None and (barrier := found[0].barrier) is not None:
            barrier.join()

    def pytest_report_header(self) -> str:
        """Say what the tests run on."""
        is_plain = self._world.world_size > 1 and self._group is self._world  # neither make nor a group was given
        hint = "; no --collective-scope-make, so a rank that is stuck in a collective stays there" if is_plain else ""
        return f"collective_scope: {self._world.world_size} rank{'s' * (self._world.world_size > 1)}{hint}"

    def pytest_internalerror(self, excrepr: object) -> None:
        """Let a rank say why it dies that prints nothing else."""
        if self._is_quiet:
            self._terminal.say(f"rank {self._world.rank}: {excrepr}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note what cannot be collected."""
        if report.failed:
            self._uncollected.append(f"{report.nodeid} (not collected: {report.longreprtext.splitlines()[-1]})")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Wrapper:
        """Refuse to run tests that are not the same on all ranks, or are marked in a wrong way."""
        tests = [item for item in session.items if self._asks(item)]
        for item in tests:
            try:
                new_scope(item.nodeid, None, self._options, item)
            except (TypeError, ValueError) as error:
                msg = f"the marker 'collective' of {item.nodeid}: {error}"
                raise pytest.UsageError(msg) from error
        try:
            if self._world.store is not None:
                _compare(self._world, [*self._uncollected, *(item.nodeid for item in tests)], self._options)
        except CollectiveScopeError as error:
            stop(session, error)
            if self._world.rank == 0 or isinstance(error, PeerLostError | BarrierTimeoutError):
                self._terminal.say(str(error))
            raise session.Failed(session.shouldfail) from error
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Wrapper:
        """End together, with the same exit code."""
        phase = Phase(new_scope("end of the session", self._world, self._options))
        phase.enter()
        raised = None
        try:
            yield
        except BaseException as error:
            raised = error
        code = int(session.exitstatus) or int(raised is not None)
        errors = phase.leave(telling(raised, f"exit code {code}", kind="ended", returncode=code) if code else None)
        theirs = {each.returncode: each.rank for each in hear(phase.verdict)}
        worst = max([code, *theirs, int(bool(errors))])
        if worst != code:
            session.exitstatus = worst
            why = [str(error) for error in errors if not isinstance(error, PeerFailedError)]
            self._terminal.say("\n".join([f"exit code {worst}", *(why or [f"as on rank {theirs[worst]}"])]))
        rank = self._world.rank
        if rank > 0 and phase.verdict is not None and set(range(rank)) <= set(phase.verdict.lost):
            self._terminal.tell_failures()
        self._terminal.leave()  # the launcher ends other ranks with SIGTERM when the first one has ended
        if isinstance(self._group, RenewableGroup) and phase.verdict is not None and phase.verdict.complete:
            self._group.destroy()
        if raised is not None:
            raise raised

    def pytest_unconfigure(self) -> None:
        """Leave the process as it was, if the session has not begun."""
        self._terminal.leave()


class Refusals:
    """The hooks that leave out what was refused: within those of pytest's own plugins, whose teardown needs their setup."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:  # noqa: ARG002  (given to all)
        """Raise the refusal, before any fixture."""
        self._phases.raise_refusal()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:  # noqa: ARG002  (given to all)
        """Raise the refusal, before the test."""
        self._phases.raise_refusal()


def _read_options(world: World, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """
    Return the group that runs the tests, and options for `collective_scope`.

    Args:
        world: All ranks.
        given: Options of the plugin, by name; those of the command line and of ini files are texts.

    Raises:
        pytest.UsageError: If one of them makes no sense.
    """
    names = {name: given.get(name, "") for name in ("group", "make")}
    options: dict[str, Any] = {}
    try:
        named = {name: pkgutil.resolve_name(text) for name, text in names.items() if text not in ("", "auto")}
        for name, value in given.items():
            if name not in names:
                options[name] = float(value) if isinstance(value, str) else value
        collective_scope(**options)  # refuses what makes no sense
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        msg = f"collective_scope: {error} (options: {dict(given)})"
        raise pytest.UsageError(msg) from error
    if all(names.values()):
        msg = "collective_scope: group and make exclude each other"
        raise pytest.UsageError(msg)
    if not names["make"]:
        return named.get("group", world), options
    store = dist.HashStore() if world.store is None else dist.PrefixStore("make", world.store)
    return RenewableGroup(named.get("make"), store=store, rank=world.rank, world_size=world.world_size), options


def _compare(world: World, tests: list[str], options: Mapping[str, Any]) -> None:
    """
    Return on all ranks if all have collected these *tests*, in this order.

    Raises:
        CollectiveScopeError: On all ranks if not.
    """
    store: Any = world.store
    text = "\n".join(tests).encode(errors="surrogateescape")
    store.set(f"tests/{world.rank}", zlib.compress(text))
    mark = f"{len(tests)} tests, {hashlib.sha256(text).hexdigest()}"
    try:
        with collective_scope(world, name="collection", **options) as scope:
            scope.collective_cleanup(int, name="tests", fingerprint=lambda: mark)
    except CleanupMismatchError as error:
        texts = [zlib.decompress(store.get(f"tests/{rank}")) for rank in range(world.world_size)]
        lists = [text.decode(errors="surrogateescape").split("\n") for text in texts]
        msg = "\n".join(["the ranks have collected different tests", *_differences(lists)])
        raise CollectiveScopeError(msg, error.verdict) from None


def _differences(lists: list[list[str]]) -> list[str]:
    """Say what other ranks have collected besides the tests of rank 0, and what they have not."""
    lines, mine = [], lists[0]
    for rank, theirs in enumerate(lists):
        lacks, has = Counter(mine) - Counter(theirs), Counter(theirs) - Counter(mine)
        if theirs != mine and not lacks and not has:
            first = next(test for test, other in zip(theirs, mine, strict=True) if test != other)
            lines.append(f"  rank {rank} has the tests of rank 0 in another order, from {first} on")
        for what, tests in (("lacks", lacks), ("alone has", has)):
            more = [f"and {len(tests) - MOST_NAMED} more"] if len(tests) > MOST_NAMED else []
            lines += [f"  rank {rank} {what} {test}" for test in [*list(tests)[:MOST_NAMED], *more]]
    return lines
