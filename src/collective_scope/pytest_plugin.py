"""
The pytest plugin: a scope around each phase of each test, so that the ranks go through a suite together.

It wraps pytest's hooks, because a fixture does not see what a test raised. A phase begins when all
ranks have come to it. It ends when its report has been made: each rank tells what became of the phase
there, and all make the same report of what they have been told.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import inspect
import io
import logging
import os
import pkgutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal

import attrs
import pytest
import torch.distributed as dist

from . import _kill
from ._api import collective_scope
from ._pytest_reports import Telling, Told, expected, failed, hear, judge, name_ranks, subtests_elsewhere, tell, telling
from ._renewable import RenewableGroup
from ._scope import CollectiveScope
from .agreement.records import Verdict
from .agreement.stacks import where_is
from .exceptions import CleanupMismatchError, CollectiveScopeError, PeerFailedError, RevokedInterrupt


__tracebackhide__ = True
"""Where pytest leaves frames out: they tell nothing of a test."""

MOST_NAMED = 10
"""Tests that are named, at most, for each rank that has collected others."""

STAY_S = 0.5
"""How long a rank stays after it has told what it knows at its end, so that others see that it has."""

_ENV = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
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
        if any(name not in os.environ for name in _ENV) or os.environ["WORLD_SIZE"] == "1":
            return cls()
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # If the server is here, groups that tests make over env:// share it.
        store = dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, multi_tenant=True)
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"collective_scope/pytest/{restarts}", store), rank, size)


@attrs.define(eq=False)
class Phase:
    """
    One phase of a test.

    Attributes:
        scope: Its scope.
        refusal: Why it did not begin; then *scope* is one of this rank alone.
        verdict: What the ranks did.
        subtests: The reports of its subtests that failed.
        state: How far it has come.
        began: When it began, on the monotonic clock.
    """

    scope: CollectiveScope
    refusal: BaseException | None = None
    verdict: Verdict | None = None
    subtests: list[dict[str, Any]] = attrs.field(factory=list)
    state: Literal["body", "report", "agreement"] = "body"
    began: float = attrs.field(factory=time.monotonic)

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
        if self.refusal is None:
            self.verdict = self.scope.verdict
        else:
            errors.append(self.refusal)
        return errors


def differences(lists: Mapping[int, list[str]]) -> list[str]:
    """Say what other ranks have collected besides the tests of rank 0, and what they have not."""
    lines, mine = [], lists[0]
    for rank, theirs in sorted(lists.items()):
        lacks, has = Counter(mine) - Counter(theirs), Counter(theirs) - Counter(mine)
        if theirs != mine and not lacks and not has:
            first = next(test for test, other in zip(theirs, mine, strict=True) if test != other)
            lines.append(f"  rank {rank} has the tests of rank 0 in another order, from {first} on")
        for what, tests in (("lacks", lacks), ("alone has", has)):
            more = [f"and {len(tests) - MOST_NAMED} more"] if len(tests) > MOST_NAMED else []
            lines += [f"  rank {rank} {what} {test}" for test in [*list(tests)[:MOST_NAMED], *more]]
    return lines


class Quiet(io.StringIO):
    """What the terminal of a rank writes to that shall not print."""

    def __init__(self, stderr: int) -> None:
        super().__init__()
        self._stderr = stderr

    def write(self, text: str) -> int:
        """Print what another thread writes: such as pytest-timeout's, which ends the process next."""
        if threading.current_thread() is not threading.main_thread():
            os.write(self._stderr, text.encode(errors="replace"))
        return len(text)


class Plugin:
    """
    The hooks.

    Args:
        config: pytest's.
        asks: Whether a test is to run in scopes; None if all are.
        given: Options, by name, as texts.

    Raises:
        pytest.UsageError: If an option makes no sense.
    """

    def __init__(
        self, config: pytest.Config, asks: Callable[[pytest.Item], bool] | None, given: Mapping[str, Any]
    ) -> None:
        self._config, self._asks = config, asks
        # The workers of pytest-xdist each run other tests.
        self._world = World() if hasattr(config, "workerinput") else World.of_environment()
        if self._world.world_size > 1 and config.getoption("numprocesses", None):
            msg = "with collective_scope every rank runs every test, in order; so -n cannot be used under a launcher"
            raise pytest.UsageError(msg)
        self._group, self._options = self._read(given)
        self._rank = self._world.rank
        self._phase: Phase | None = None
        self._failures: list[pytest.TestReport] = []
        self._known: list[str] = []
        """What scopes of the tests' own have logged of failures in this phase."""
        self._uncollected: list[str] = []
        self._is_aside = False
        """Whether fixtures were not set up here that others have: then these tear down what this rank has not."""
        self._undo = contextlib.ExitStack()
        # pytest captures neither now nor while it loads plugins.
        self._stderr = _kill.stderr_fd = os.dup(2)
        self._undo.callback(os.close, self._stderr)
        self._undo.callback(setattr, _kill, "stderr_fd", None)
        logger = logging.getLogger("collective_scope")
        logger.addFilter(self._hear_log)
        self._undo.callback(logger.removeFilter, self._hear_log)
        self._wakeup = -1
        if self._world.world_size > 1 and threading.current_thread() is threading.main_thread():
            self._listen_for_end()

    def _read(self, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the group, and options for `collective_scope`."""
        options, named = dict(given), {}
        try:
            for name in ("group", "make"):
                text = options.pop(name, "")
                named[name] = pkgutil.resolve_name(text) if text and text != "auto" else text
            for name in [name for name, value in options.items() if isinstance(value, str)]:
                options[name] = float(options[name])
            collective_scope(**options)  # refuses what makes no sense
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            msg = f"collective_scope: {error} (options: {dict(given)})"
            raise pytest.UsageError(msg) from error
        if named["make"] and named["group"]:
            msg = "collective_scope: group and make exclude each other"
            raise pytest.UsageError(msg)
        if not named["make"]:
            return named["group"] or self._world, options
        if self._world.store is None:
            return self._world, options
        store, make = dist.PrefixStore("make", self._world.store), named["make"]
        rank, size = self._world.rank, self._world.world_size
        return RenewableGroup(None if make == "auto" else make, store=store, rank=rank, world_size=size), options

    def _applies_to(self, item: pytest.Item) -> bool:
        return self._asks is None or self._asks(item)

    # The session.

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Let rank 0 alone print, if all tests run in scopes."""
        if self._world.rank > 0 and self._asks is None and self._config.pluginmanager.has_plugin("terminalreporter"):
            self._config.get_terminal_writer()._file = Quiet(self._stderr)  # noqa: SLF001  (pytest cannot be quiet)

    def pytest_report_header(self) -> str:
        """Say what the tests run on."""
        return f"collective_scope: {self._world.world_size} rank{'s' * (self._world.world_size > 1)}"

    def pytest_internalerror(self, excrepr: object) -> None:
        """Let a rank say why it dies that prints nothing else."""
        if self._world.rank > 0:
            self._say(f"rank {self._world.rank}: {excrepr}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note what cannot be collected."""
        if report.failed:
            self._uncollected.append(f"{report.nodeid} (not collected: {report.longreprtext.splitlines()[-1]})")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Wrapper:
        """Refuse to run tests that are not the same on all ranks."""
        if self._world.world_size > 1:
            tests = [*self._uncollected, *(item.nodeid for item in session.items if self._applies_to(item))]
            try:
                self._compare(tests)
            except CollectiveScopeError as error:
                self._stop(session, str(error).split("\n", 1)[0])
                self._say(str(error))
                raise session.Failed(session.shouldfail) from error
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Wrapper:
        """End together, with the same exit code."""
        phase = self._enter(Phase(self._new_scope("end of the session", self._world)))
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
            self._say("\n".join([f"exit code {worst}", *(why or [f"as on rank {theirs[worst]}"])]))
        if isinstance(self._group, RenewableGroup) and not errors and raised is None:
            self._group.destroy()
        if raised is not None:
            raise raised

    def pytest_unconfigure(self) -> None:
        """Leave the process as it was."""
        self._undo.close()

    def _stop(self, session: pytest.Session, reason: str) -> None:
        session.shouldfail = session.shouldfail or reason

    def _compare(self, tests: list[str]) -> None:
        """Raise on all ranks if these tests are not those of all ranks."""
        text = "\n".join(tests).encode(errors="surrogateescape")
        mark = f"{len(tests)} tests, {hashlib.sha256(text).hexdigest()}"
        try:
            with collective_scope(self._world, name="collection", **self._options) as scope:
                scope.collective_cleanup(int, name="tests", fingerprint=lambda: mark)
        except CleanupMismatchError:
            packed = base64.b64encode(zlib.compress(text)).decode()
            phase = self._enter(Phase(self._new_scope("collection, what differs", self._world)))
            errors = phase.leave(telling(None, "collected other tests", kind="collected", text=packed))
            if not errors or not all(isinstance(error, PeerFailedError) for error in errors):
                raise
            lists = {}
            for told in hear(phase.verdict):
                if told.kind != "collected":  # the list was too long
                    raise
                each = zlib.decompress(base64.b64decode(told.text)).decode(errors="surrogateescape")
                lists[told.rank] = each.split("\n")
            msg = "\n".join(["the ranks have collected different tests", *differences(lists)])
            raise CollectiveScopeError(msg) from None

    # The phases.

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

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep failures, for the peers and for the case that the process is ended."""
        if not report.failed:
            return
        if self._phase is not None and self._phase.state == "body":
            data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
            self._phase.subtests.append(data)
            if self._world.world_size > 1:
                name_ranks(report, [self._rank])
        self._failures.append(report)

    def scope_of_test(self, item: pytest.Item) -> CollectiveScope:
        """Return the scope that the test function will run in, or runs in."""
        if _SCOPE not in item.stash:
            item.stash[_SCOPE] = self._new_scope(f"{item.nodeid} (call)", self._group, item)
        return item.stash[_SCOPE]

    def _new_scope(self, name: str, group: Any, item: pytest.Item | None = None) -> CollectiveScope:
        marker = None if item is None else item.get_closest_marker("collective")
        options = {"meet_at_entry": True, **self._options, **({} if marker is None else marker.kwargs)}
        scope = collective_scope(group, name=name, **options)
        scope._body = getattr(inspect.unwrap(getattr(item, "obj", int)), "__code__", None)  # noqa: SLF001  (a part of it)
        return scope

    def _enter(self, phase: Phase) -> Phase:
        """Enter the scope; if that is refused, one of this rank alone."""
        try:
            phase.scope.__enter__()
            if (barrier := phase.scope._barrier) is not None:  # noqa: SLF001  (a part of it)
                self._rank = barrier.rank
        except (Exception, pytest.fail.Exception) as refusal:
            phase.refusal, phase.verdict = refusal, phase.scope.verdict
            phase.scope = self._new_scope(phase.scope.name, World())
            phase.scope.__enter__()
        return phase

    def _run(self, item: pytest.Item, when: str) -> Wrapper:
        if not self._applies_to(item):
            return (yield)
        scope, name = item.stash.get(_SCOPE, None), f"{item.nodeid} ({when})"
        if scope is None or when == "setup":
            scope = self._new_scope(name, self._group, item)
        else:  # at the teardown, of a test whose setup failed
            del item.stash[_SCOPE]
            scope.name = name
        if self._wakeup >= 0:
            self._take_wakeup()
        self._known.clear()
        self._phase = phase = Phase(scope)
        try:
            self._enter(phase)
            if phase.refusal is not None and when != "teardown":
                raise phase.refusal
            return (yield)
        except (KeyboardInterrupt, pytest.exit.Exception) as end:
            self._phase = None
            code = getattr(end, "returncode", None)
            code = int(pytest.ExitCode.INTERRUPTED if code is None else code)
            phase.leave(telling(end, str(end) or type(end).__name__, kind="ended", returncode=code))
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
            return report
        told = hear(verdict)
        if call.when == "setup":
            self._is_aside = not report.passed and len(told) < self._world.world_size
        if end := next((each for each in told if each.kind == "ended"), None):
            pytest.exit(f"rank {end.rank}: {end.line}", end.returncode)
        if verdict is not None and (verdict.lost or verdict.names):
            self._stop(item.session, str(errors[-1]).split("\n", 1)[0])
        self._log_subtests(item, phase, told)
        kind = judge(verdict, told)
        if kind != "failed":
            return as_judged(kind, report, told)

        def make(error: BaseException) -> pytest.TestReport:
            # Other plugins decide by what was raised, so they are to see the same on all ranks.
            try:
                raise error  # noqa: TRY301  (for a traceback)
            except BaseException as raised:
                call.excinfo = pytest.ExceptionInfo.from_exception(raised)
            made: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
            return made

        return failed(report, verdict, errors, rank=self._rank, config=self._config, make=make)

    def _leave(
        self, phase: Phase, item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
    ) -> list[BaseException]:
        """Leave the scope of a phase, and tell the peers what became of it; return what else went wrong."""
        error = None if call.excinfo is None else call.excinfo.value
        if not isinstance(error, RevokedInterrupt):
            told = None
            if error is None or error is not phase.refusal:
                told = tell(self._config, report, error, phase.subtests)
            if told is None and call.when == "teardown" and self._is_aside:
                told = telling(None, "the setup failed here, and not on all ranks", kind="aside")
            if told is not None and self._options["lockstep_gc"]:
                told.__cause__ = error  # whose frames are to be cleared
            error = told
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        with capture.item_capture(call.when, item):
            return phase.leave(error)

    def _log_subtests(self, item: pytest.Item, phase: Phase, told: list[Told]) -> None:
        """Report subtests that failed on other ranks only."""
        for report in subtests_elsewhere(self._config, phase.subtests, told, self._rank):
            if "_pytest.subtests" in sys.modules:  # which fails the tests that it counts here
                counts = self._config.stash[sys.modules["_pytest.subtests"].failed_subtests_key]
                counts[getattr(item, "id", item.nodeid)] += 1
            item.ihook.pytest_runtest_logreport(report=report)

    # What is said past pytest's capture.

    def _say(self, text: str, **markup: bool) -> None:
        if self._config.pluginmanager.has_plugin("terminalreporter"):
            text = self._config.get_terminal_writer().markup(text, **(markup or {"red": True}))
        os.write(self._stderr, f"\n{text}\n".encode(errors="replace"))

    def _hear_log(self, record: logging.LogRecord) -> bool:
        """Print warnings at once; keep what reports will say out of the log."""
        if record.levelno < logging.WARNING:
            return True
        if record.exc_info is None:
            if self._speaks(record):
                self._say(record.getMessage(), yellow=True)
            return False
        if isinstance(record.exc_info[1], Telling):
            return False
        self._known.append(f"{record.getMessage()}\n{logging.Formatter().formatException(record.exc_info)}")
        return True

    def _speaks(self, record: logging.LogRecord) -> bool:
        """Whether this rank is the lowest of those that log the same."""
        phase, what = self._phase, getattr(record, "phase", "")
        span = None if phase is None or phase.scope.name != getattr(record, "scope", "") else phase.scope._span  # noqa: SLF001
        if span is None or what not in ("waiting", "lost"):
            return True
        peers = [span.part.records.get(rank) for rank in range(self._rank) if rank not in span.part.lost]
        if what == "lost":
            return not peers
        here = span.wait and span.wait.record.round
        return not any(peer is not None and peer.arrived and peer.round == here for peer in peers)

    # The end by SIGTERM, from torchrun or at the limit of a CI job.

    def _listen_for_end(self) -> None:
        """Have a thread of its own hear of SIGTERM: that of the rank may be stuck in native code."""
        previous = signal.getsignal(signal.SIGTERM)
        if previous in (signal.SIG_IGN, None):
            return
        reader, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        has_told = threading.Event()

        def in_main_thread(number: int, frame: Any) -> None:
            if callable(previous) and has_told.wait(10 * STAY_S):
                previous(number, frame)

        def listen() -> None:
            while numbers := os.read(reader, 64):
                if signal.SIGTERM in numbers:
                    self._tell_all()
                    has_told.set()
                    time.sleep(STAY_S + (10 * STAY_S if callable(previous) else 0.0))
                    os._exit(128 + signal.SIGTERM)
            os.close(reader)

        signal.signal(signal.SIGTERM, in_main_thread)
        self._undo.callback(os.close, self._wakeup)
        self._undo.callback(signal.set_wakeup_fd, -1)
        self._undo.callback(signal.signal, signal.SIGTERM, previous)
        self._take_wakeup()
        threading.Thread(target=listen, name="collective_scope-sigterm", daemon=True).start()

    def _take_wakeup(self) -> None:
        """Hear of signals, unless another library does; event loops take this over, and leave it to nobody."""
        other = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        if other not in (-1, self._wakeup):
            signal.set_wakeup_fd(other)

    def _tell_all(self) -> None:
        """Print where this rank is, and, if no lower one is left to do so, which tests have failed."""
        phase = self._phase
        lines = [f"rank {self._rank} of {self._world.world_size} is ended by SIGTERM"]
        is_lowest = self._rank == 0
        if phase is not None:
            lines[0] += f" in {phase.scope.name}, after {time.monotonic() - phase.began:.1f} s"
            lines.append(where_is(threading.main_thread().ident or 0, phase.scope._body))  # noqa: SLF001
            if (span := phase.scope._span) is not None:  # noqa: SLF001
                lower = [record for rank, record in span.part.records.items() if rank < self._rank]
                is_lowest = all(record.process.has_ended for record in lower)
        lines += self._known
        for report in self._failures if is_lowest else ():
            sections = [f"--- {name}\n{text}" for name, text in report.sections]
            lines += [f"{report.nodeid} failed ({report.when}):", report.longreprtext, *sections]
        self._say("\n".join(lines))
