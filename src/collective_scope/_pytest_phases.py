"""
A scope around each phase of each test, in pytest's own hooks: a fixture does not see what a test raised.

A phase begins when all ranks have come to it. It ends when its report has been made: each rank tells what
became of the phase there, and all make the same report of what they have been told.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import unittest
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal

import attrs
import pytest
import torch.distributed as dist

from ._api import collective_scope
from ._environment import VARIABLES, store_of_launcher
from ._notes import GROUP_IS_DEAD, MADE_AGAIN, MADE_TWICE, NOT_RUN, STILL_DEAD
from ._pytest_reports import as_judged, failed, judge, name_ranks, subtests_elsewhere
from ._pytest_tellings import hear, is_xpassed, tell, telling
from ._pytest_terminal import Terminal
from ._scope import CollectiveScope
from .agreement.records import Verdict
from .agreement.stacks import innermost
from .exceptions import RevokedInterrupt


__tracebackhide__ = True
"""Where pytest leaves frames out: they tell nothing of a test."""

_TOLD = (NOT_RUN, GROUP_IS_DEAD, STILL_DEAD, MADE_AGAIN, MADE_TWICE)
"""A note that begins with one of these is shown in the report."""

_SCOPE = pytest.StashKey[CollectiveScope]()

Wrapper = Generator[None, Any, Any]


@attrs.define(eq=False)
class World:
    """All ranks that the launcher has started, whatever groups they make; without a launcher, one rank."""

    store: dist.Store | None = None
    rank: int = 0
    world_size: int = 1

    @classmethod
    def of_environment(cls) -> World:
        """Return the world that torchrun's variables describe."""
        if any(name not in os.environ for name in VARIABLES) or os.environ["WORLD_SIZE"] == "1":
            return cls()
        rank = int(os.environ["RANK"])
        return cls(store_of_launcher(rank, "pytest/"), rank, int(os.environ["WORLD_SIZE"]))


@attrs.define(eq=False)
class Phase:
    """
    One phase of a test.

    Attributes:
        scope: Its scope.
        refusal: Why it did not begin; then *scope* is one of this rank alone.
        verdict: What the ranks did.
        subtests: The reports of its subtests that failed.
        notes: What the scope says of cleanups that did not run, and of a group that is dead.
        state: How far it has come.
    """

    scope: CollectiveScope
    refusal: BaseException | None = None
    verdict: Verdict | None = None
    subtests: list[dict[str, Any]] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    state: Literal["body", "report", "agreement"] = "body"

    def enter(self) -> None:
        """Enter the scope; if that is refused, one of this rank alone."""
        try:
            self.scope.__enter__()
        except (Exception, pytest.fail.Exception) as refusal:
            self.refusal, self.verdict = refusal, self.scope.verdict
            self.scope = new_scope(self.scope.name, World(), {"kill_after": self.scope._options.kill_after})  # noqa: SLF001  (the plugin is a part of this package)
            self.scope.__enter__()

    def end(self) -> None:
        """Leave the body: the rank is not interrupted any more."""
        self.state = "report"
        span = self.scope._span  # noqa: SLF001  (a part of it)
        if span is not None and span.revocation is not None:
            span.revocation.leave_body()

    def leave(self, error: BaseException | None) -> list[BaseException]:
        """Leave the scope with *error*; return what else went wrong, here or on the peers."""
        try:
            self.scope.__exit__(None if error is None else type(error), error, None)
            errors = []
        except BaseException as raised:
            error, errors = raised, [raised]
        errors += getattr(error, "collective_scope_errors", ())
        self.notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_TOLD)]
        if self.refusal is None:
            self.verdict = self.scope.verdict
        else:
            errors.append(self.refusal)
        return errors


def stop(session: pytest.Session, error: BaseException) -> None:
    """Let no other test run, and say why."""
    session.shouldfail = session.shouldfail or str(error).split("\n", 1)[0]


def new_scope(name: str, group: Any, options: Mapping[str, Any], item: pytest.Item | None = None) -> CollectiveScope:
    """
    Return a scope with *options*, and those of the marker of *item*.

    Raises:
        TypeError: If an option is not one of `collective_scope`, or of a wrong type.
        ValueError: If its value makes no sense.
    """
    marker = None if item is None else item.get_closest_marker("collective")
    scope = collective_scope(
        group, name=name, **{"meet_at_entry": True, **options, **(marker.kwargs if marker else {})}
    )
    scope._body = getattr(inspect.unwrap(getattr(item, "obj", int)), "__code__", None)  # noqa: SLF001  (a part of it)
    return scope


class Phases:
    """
    The hooks that run phases.

    Args:
        config: pytest's.
        asks: Whether a test is to run in scopes.
        group: What the scopes are on.
        options: For `collective_scope`.
        terminal: Where this rank says what cannot wait.
    """

    def __init__(
        self,
        config: pytest.Config,
        asks: Callable[[pytest.Item], bool],
        group: Any,
        options: Mapping[str, Any],
        terminal: Terminal,
    ) -> None:
        self.asks = asks
        self._config, self._group, self._options, self._terminal = config, group, options, terminal
        self._phase: Phase | None = None
        self._is_aside = False
        """Whether fixtures were not set up here that others have: then these tear down what this rank has not."""
        self._xpassed = ""
        """Why the test was to fail that has passed here, and failed on no other rank; told at its teardown."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Wrapper:
        """Run it in a scope."""
        return (yield from self._run(item, "setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Wrapper:
        """Run it in a scope."""
        return (yield from self._run(item, "call"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Wrapper:
        """Run it in a scope."""
        return (yield from self._run(item, "teardown"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Wrapper:
        """Leave the scope of the phase, and make the report that all ranks make."""
        report = yield
        phase = self._phase
        if phase is None or phase.state != "report":  # of a subtest, for example
            return report
        phase.state = "agreement"
        try:
            return self._settle(phase, item, call, report)
        finally:
            self._phase = None
            self._terminal.known.clear()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep failures, for the peers and for the case that the process is ended."""
        if not report.failed:
            return
        if self._phase is not None and self._phase.state == "body":
            data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
            self._phase.subtests.append(data)
            if self._phase.scope._barrier is not None:  # noqa: SLF001  (a part of it)
                name_ranks(report, [self._terminal.rank])
        self._terminal.failures.append(report)

    def scope_of_test(self, item: pytest.Item) -> CollectiveScope:
        """Return the scope that the test function will run in, or runs in."""
        if _SCOPE not in item.stash:
            item.stash[_SCOPE] = new_scope(f"{item.nodeid} (call)", self._group, self._options, item)
        return item.stash[_SCOPE]

    def raise_refusal(self) -> None:
        """Raise what refuses the phase, if anything does."""
        if self._phase is not None and self._phase.refusal is not None:
            raise self._phase.refusal

    def _run(self, item: pytest.Item, when: str) -> Wrapper:
        if not self.asks(item):
            return (yield)
        scope, name = item.stash.get(_SCOPE, None), f"{item.nodeid} ({when})"
        if when == "setup":
            self._is_aside, self._xpassed = False, ""
        if scope is None or when == "setup":
            scope = new_scope(name, self._group, self._options, item)
        else:  # at the teardown, of a test whose setup failed
            del item.stash[_SCOPE]
            scope.name = name
        self._terminal.begin(scope)
        self._phase = phase = Phase(scope)
        try:
            phase.enter()
            if (barrier := phase.scope._barrier) is not None:  # noqa: SLF001  (a part of it)
                self._terminal.rank = barrier.rank
            return (yield)
        except (KeyboardInterrupt, pytest.exit.Exception) as end:
            self._phase = None
            code = getattr(end, "returncode", None)
            code = int(pytest.ExitCode.INTERRUPTED if code is None else code)
            line = str(end) or f"{type(end).__name__} at {innermost(end.__traceback__)}"
            phase.leave(telling(end, line, kind="ended", returncode=code))
            raise
        finally:
            phase.end()

    def _settle(
        self, phase: Phase, item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
    ) -> pytest.TestReport:
        errors = self._leave(phase, item, call, report)
        if interrupt := next((e for e in errors if isinstance(e, KeyboardInterrupt | pytest.exit.Exception)), None):
            raise interrupt
        verdict = phase.verdict
        if verdict is not None and verdict.ok and not errors:
            self._xpassed = str(report.longrepr) if is_xpassed(report) else ""
            return report
        told = hear(verdict)
        if call.when == "setup":
            self._is_aside = not report.passed and (verdict is None or len(told) < verdict.world_size)
        if end := next((each for each in told if each.kind == "ended"), None):
            pytest.exit(f"rank {end.rank}: {end.line}", end.returncode)
        if verdict is not None and (verdict.lost or verdict.names):
            stop(item.session, errors[-1])
        for each in subtests_elsewhere(self._config, phase.subtests, told, self._terminal.rank):
            item.ihook.pytest_runtest_logreport(report=each)
        kind = judge(verdict, told)
        if kind != "failed":
            is_of_unittest = issubclass(getattr(item, "cls", None) or object, unittest.TestCase)
            return as_judged(kind, report, told, counts_subtests=not is_of_unittest)

        def make(error: BaseException) -> pytest.TestReport:
            # Other plugins decide by what was raised, so they are to see the same on all ranks.
            try:
                raise error  # noqa: TRY301  (for a traceback)
            except BaseException as raised:
                call.excinfo = pytest.ExceptionInfo.from_exception(raised)
            made: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
            return made

        return failed(report, verdict, errors, phase.notes, rank=self._terminal.rank, config=self._config, make=make)

    def _leave(
        self, phase: Phase, item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
    ) -> list[BaseException]:
        """Leave the scope of a phase, and tell the peers what became of it; return what else went wrong."""
        error = None if call.excinfo is None else call.excinfo.value
        if not isinstance(error, RevokedInterrupt):
            told = None
            # That a test passes strands nobody: ranks on which it is still to fail, as expected, are waited for.
            if (error is None or error is not phase.refusal) and not is_xpassed(report):
                told = tell(self._config, report, error, phase.subtests)
            if told is None and call.when == "teardown" and self._is_aside:
                told = telling(None, "the setup failed here, and not on all ranks", kind="aside")
            if told is None and call.when == "teardown" and self._xpassed:
                told = telling(None, self._xpassed, kind="xpassed")
            if told is not None and self._options["lockstep_gc"]:
                told.__cause__ = error  # whose frames are to be cleared
            error = told
        if report.failed:
            self._terminal.known.append(report.longreprtext)
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        with contextlib.nullcontext() if capture is None else capture.item_capture(call.when, item):
            return phase.leave(error)
