"""The life of a scope on one rank: order, what surfaces, what stays behind."""

# ruff: noqa: PT012  (it is the end of a block that raises)

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import sys
import threading
import time
import unittest
import warnings
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch.distributed as dist

from collective_scope import (
    CleanupMismatchError,
    CollectiveScope,
    CollectiveScopeError,
    Outcome,
    PeerFailedError,
    Verdict,
    _failures,
    collective_scope,
    current_scope,
)
from tests.forks import in_a_fork
from tests.ranks import Sequencer
from tests.stores import PATIENCE_S, RankGroup, is_waiting, meet, record_of, wait_until


class _BodyError(Exception):
    pass


class _CleanupError(Exception):
    pass


class _Thing:
    """Something that a weak reference can watch."""

    def method(self) -> None:
        pass


@pytest.fixture(name="calls")
def _calls() -> list[Any]:
    return []


@pytest.fixture(name="unlogged")
def _unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep pytest's handlers from keeping errors."""
    monkeypatch.setattr(logging.getLogger("collective_scope"), "disabled", True)


@pytest.fixture(name="collected")
def _collected() -> Iterator[None]:
    """Leave the collector as it was."""
    was_enabled = gc.isenabled()
    yield
    (gc.enable if was_enabled else gc.disable)()


def _raise(error: BaseException) -> None:
    raise error


def _verdict(scope: CollectiveScope) -> Verdict:
    assert scope.verdict is not None
    return scope.verdict


# Order


def test_scope_cleanups_run_once_last_registered_first_then_after_barrier(calls: list[str]) -> None:
    """Cleanups run in reverse order, then what was registered for after the barrier, in reverse order."""
    with collective_scope(cleanups=[lambda: calls.append("given 1"), lambda: calls.append("given 2")]) as scope:
        scope.after_barrier(calls.append, "after 1")
        scope.cleanup(calls.append, "local")
        scope.after_barrier(calls.append, "after 2")
        scope.collective_cleanup(calls.append, "collective")
        scope.cleanup(calls.append, "top")
        calls.append("body")

    assert ["body", "top", "collective", "local", "given 2", "given 1", "after 2", "after 1"] == calls


@pytest.mark.parametrize("failing", ["body", "cleanup", "collective_cleanup", "after_barrier", "enter_context"])
def test_scope_whatever_fails_every_cleanup_runs_once(failing: str, calls: list[str]) -> None:
    """An error anywhere does not keep any cleanup from running, nor make one run again."""

    class Context(contextlib.AbstractContextManager[None]):
        def __exit__(self, *_: object) -> None:
            calls.append("enter_context")
            if failing == "enter_context":
                raise _CleanupError

    def call(name: str) -> None:
        calls.append(name)
        if name == failing:
            raise _CleanupError

    with pytest.raises((_BodyError, _CleanupError)), collective_scope() as scope:
        scope.cleanup(calls.append, "bottom")
        scope.after_barrier(calls.append, "after bottom")
        for register in (scope.cleanup, scope.collective_cleanup, scope.after_barrier):
            register(call, register.__name__)
        scope.enter_context(Context())
        if failing == "body":
            raise _BodyError

    assert calls == [
        "enter_context",
        "collective_cleanup",
        "cleanup",
        "bottom",
        "after_barrier",
        "after bottom",
    ]


def test_scope_cleanup_registered_by_a_cleanup_runs_in_the_same_teardown(calls: list[str]) -> None:
    """A cleanup's registrations still run: at once if local, after the barrier if for then."""

    def register() -> None:
        calls.append("registers")
        scope.cleanup(calls.append, "registered")
        scope.after_barrier(scope.after_barrier, calls.append, "after, registered after")

    with collective_scope() as scope:
        scope.cleanup(calls.append, "bottom")
        scope.cleanup(register)

    assert ["registers", "registered", "bottom", "after, registered after"] == calls


def test_scope_cleanup_registered_after_the_barrier_runs_or_is_refused(calls: list[str]) -> None:
    """From there a local cleanup still runs, once; a collective one would be alone, and is refused."""

    def register() -> None:
        scope.cleanup(calls.append, "local")
        with pytest.raises(RuntimeError, match=r"^the ranks have left the barrier of scope 's'; .* too late$"):
            scope.collective_cleanup(calls.append, "collective")

    with collective_scope(name="s") as scope:
        scope.after_barrier(calls.append, "bottom")
        scope.after_barrier(register)

    assert ["local", "bottom"] == calls


def test_scope_cleanup_registered_by_a_collective_one_runs_before_the_rest(calls: list[str]) -> None:
    """A collective cleanup may register more of either kind."""

    def register() -> None:
        calls.append("registers")
        scope.collective_cleanup(calls.append, "collective")
        scope.cleanup(calls.append, "local")

    with collective_scope() as scope:
        scope.cleanup(calls.append, "bottom")
        scope.collective_cleanup(register)

    assert ["registers", "local", "collective", "bottom"] == calls
    assert "exit 3" == _verdict(scope).stage


def test_scope_arguments_are_passed_to_each_kind_of_cleanup(calls: list[Any]) -> None:
    """Arguments and keyword arguments given at the registration arrive."""

    def take(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    with collective_scope() as scope:
        assert take is scope.cleanup(take, 1, key="local")
        assert take is scope.collective_cleanup(take, 2, name="n", fingerprint=lambda: 1, key="collective")
        assert take is scope.after_barrier(take, 3, key="after")

    assert [((2,), {"key": "collective"}), ((1,), {"key": "local"}), ((3,), {"key": "after"})] == calls


def test_scope_registration_decorates_a_function(calls: list[str]) -> None:
    """Each way to register returns the function, so it decorates one."""
    with collective_scope() as scope:

        @scope.cleanup
        def local() -> None:
            calls.append("local")

        @scope.collective_cleanup
        def collective() -> None:
            calls.append("collective")

        @scope.after_barrier
        def after() -> None:
            calls.append("after")

    assert ["collective", "local", "after"] == calls
    local()
    assert "local" == calls[-1]


@pytest.mark.parametrize("register", ["cleanup", "collective_cleanup", "after_barrier", "cleanups"])
@pytest.mark.parametrize("what", [None, 3, "text"], ids=repr)
def test_scope_what_cannot_be_called_is_refused_at_registration(register: str, what: Any) -> None:
    """A cleanup that cannot be called is refused where it is registered."""
    with pytest.raises(TypeError, match=rf"^a cleanup must be callable \(got {what!r}\)$"):
        if register == "cleanups":
            collective_scope(cleanups=[what])
        else:
            getattr(collective_scope(), register)(what)


@pytest.mark.parametrize("register", ["cleanup", "after_barrier", "collective_cleanup"])
def test_scope_what_cannot_be_called_is_refused_with_arguments_too(register: str) -> None:
    """Arguments do not hide that there is nothing to call."""
    with pytest.raises(TypeError, match="must be callable"):
        getattr(collective_scope(), register)(None, 1)


async def _never_awaited() -> None:
    """Do nothing, later."""


class _NeverAwaited:
    async def __call__(self) -> None:
        """Do nothing, later."""


@pytest.mark.parametrize("method", ["cleanup", "collective_cleanup", "after_barrier"])
@pytest.mark.parametrize(
    ("fn", "name"), [(_never_awaited, "_never_awaited"), (_NeverAwaited(), "_NeverAwaited")], ids=["function", "object"]
)
def test_cleanup_that_nobody_would_await_is_refused(method: str, fn: Callable[[], object], name: str) -> None:
    """A coroutine function would do nothing, and not say so; nor would an object that is called like one."""
    with (
        collective_scope() as scope,
        pytest.raises(TypeError, match=rf"cannot be a coroutine function \(got {name}\)"),
    ):
        getattr(scope, method)(fn)


def test_scope_cleanups_that_are_no_list_are_refused() -> None:
    """One function in place of a list of them is named."""
    with pytest.raises(TypeError, match=r"^cleanups must be a list of functions \(got <built-in function print>\)$"):
        collective_scope(cleanups=print)  # type: ignore[arg-type]  # wrong on purpose


def test_scope_collective_cleanup_with_a_name_that_is_no_text_is_refused() -> None:
    """A name that could not be compared is refused at the registration; nothing is skipped because of it."""
    with pytest.raises(TypeError, match=r"^name must be a text \(got 7\)$"):
        collective_scope().collective_cleanup(print, name=7)  # type: ignore[arg-type]  # wrong on purpose


def test_scope_fingerprint_that_cannot_be_called_is_refused() -> None:
    """A fingerprint is a function: it is asked in the teardown, not at the registration."""
    with pytest.raises(TypeError, match=r"^fingerprint must be callable \(got 3\)$"):
        collective_scope().collective_cleanup(print, fingerprint=3)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    "register",
    [
        pytest.param(lambda scope: scope.cleanup(print), id="cleanup"),
        pytest.param(lambda scope: scope.collective_cleanup(print), id="collective_cleanup"),
        pytest.param(lambda scope: scope.after_barrier(print), id="after_barrier"),
        pytest.param(lambda scope: scope.enter_context(contextlib.nullcontext()), id="enter_context"),
        pytest.param(lambda scope: scope.hold(object()), id="hold"),
    ],
)
def test_scope_registration_after_the_exit_is_refused(register: Callable[[CollectiveScope], object]) -> None:
    """Things never to run or be released are refused."""
    with collective_scope(name="s") as scope:
        pass

    with pytest.raises(
        RuntimeError, match=r"(^scope 's' has been left; nothing can be|the barrier of scope 's'; .* too late$)"
    ):
        register(scope)


def test_scope_registration_before_the_entry_counts(calls: list[str]) -> None:
    """Cleanups registered before the `with` run in its teardown."""
    scope = collective_scope()
    scope.cleanup(calls.append, "early")
    with scope:
        calls.append("body")

    assert ["body", "early"] == calls


# Contexts and held objects


@pytest.mark.parametrize("failing", [False, True], ids=["ok", "failed"])
def test_enter_context_is_left_in_the_teardown_with_the_error_of_the_body(*, failing: bool) -> None:
    """A context manager is entered now, left in the teardown, told of the body's error, and cannot suppress it."""
    seen: list[Any] = []

    class Context(contextlib.AbstractContextManager[str]):
        def __enter__(self) -> str:
            seen.append("enter")
            return "value"

        def __exit__(self, *exc: object) -> bool:
            seen.append(exc)
            return True

    error = _BodyError()
    expected = pytest.raises(_BodyError) if failing else contextlib.nullcontext()
    with expected, collective_scope() as scope:
        assert "value" == scope.enter_context(Context())
        if failing:
            raise error

    assert "enter" == seen[0]
    assert [((_BodyError, error, error.__traceback__) if failing else (None, None, None))[:2]] == [
        each[:2] for each in seen[1:]
    ]
    assert (seen[1][2] is not None) == failing


def test_enter_context_is_told_of_a_cleanup_that_failed_before(unlogged: None) -> None:  # noqa: ARG001  (given to every function of a rank)
    """A transaction is not committed when a cleanup above it has failed; the first error is the one it sees."""
    seen: list[object] = []

    class Transaction(contextlib.AbstractContextManager[None]):
        def __exit__(self, *exc: object) -> bool:
            seen.append(exc[1])
            return True

    first, second = _CleanupError("first"), _CleanupError("second")
    with pytest.raises(ExceptionGroup), collective_scope() as scope:
        scope.enter_context(Transaction())
        scope.cleanup(_raise, second)
        scope.cleanup(_raise, first)

    assert [first] == seen


def test_enter_context_of_something_else_is_refused() -> None:
    """Objects of other types are refused, and nothing of them is called."""
    with (
        pytest.raises(TypeError, match=r"^enter_context\(\) takes a context manager \(got 3\)$"),
        collective_scope() as scope,
    ):
        scope.enter_context(3)  # type: ignore[arg-type]  # wrong on purpose


def test_enter_context_that_fails_to_enter_is_not_left(calls: list[str]) -> None:
    """A context manager whose `__enter__` raises is not registered; the error is the body's."""

    class Context(contextlib.AbstractContextManager[None]):
        def __enter__(self) -> None:
            raise _BodyError

        def __exit__(self, *_: object) -> None:
            calls.append("exit")

    with pytest.raises(_BodyError), collective_scope() as scope:
        scope.enter_context(Context())

    assert [] == calls
    assert "body" == _verdict(scope).failures[0].phase


def test_hold_keeps_an_object_until_after_everything_else() -> None:
    """A held object goes when the scope has been left, and not before the last callback."""
    alive: list[bool] = []
    with collective_scope() as scope:
        thing = scope.hold(_Thing())
        reference = weakref.ref(thing)
        del thing
        scope.cleanup(lambda: alive.append(reference() is not None))
        scope.after_barrier(lambda: alive.append(reference() is not None))

    assert [True, True] == alive
    assert reference() is None


@pytest.mark.parametrize("register", ["cleanup", "collective_cleanup"])
def test_scope_bound_method_keeps_its_object_until_after_the_barrier(register: str) -> None:
    """Registering a method holds its object like `hold()`, though it has run before."""
    alive: list[bool] = []
    with collective_scope() as scope:
        thing = _Thing()
        reference = weakref.ref(thing)
        getattr(scope, register)(thing.method)
        del thing
        scope.after_barrier(lambda: alive.append(reference() is not None))

    assert [True] == alive
    assert reference() is None


@pytest.mark.parametrize("register", ["cleanups", "cleanup", "collective_cleanup", "after_barrier"])
def test_scope_that_has_been_left_keeps_nothing_alive(register: str) -> None:
    """Cleanups given or registered go with the exit, although the scope itself is still referred to."""
    thing = _Thing()
    reference = weakref.ref(thing)
    with collective_scope(cleanups=[thing.method] if register == "cleanups" else []) as scope:
        if register != "cleanups":
            getattr(scope, register)(thing.method)
        del thing

    assert _verdict(scope).ok
    assert reference() is None


# Objects kept for ever


def _die(reference: weakref.ref[Any]) -> bool:
    gc.collect()
    return reference() is None


def _use(scope: CollectiveScope, register: Callable[[CollectiveScope, _Thing], object]) -> tuple[weakref.ref[Any], str]:
    """Go through *scope*, in which something is registered; return what watches that, and what was raised."""
    thing = _Thing()
    try:
        with scope:
            register(scope, thing)
    except CollectiveScopeError as error:
        return weakref.ref(thing), "\n".join([str(error), *getattr(error, "__notes__", ())])
    return weakref.ref(thing), ""


def test_collective_cleanup_that_a_peer_lacks_is_kept_alive_for_ever() -> None:
    """A cleanup not run on all ranks is named on the rank that has it. Its destructor never runs there alone."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> tuple[bool, str]:
        scope = collective_scope(group, name="s")
        used = _use(scope, lambda scope, thing: scope.collective_cleanup(thing.method) if rank == 0 else None)
        del scope
        return _die(used[0]), used[1]

    (died_0, text_0), (died_1, text_1) = meet(2, run)

    assert (False, True) == (died_0, died_1)
    assert "disagree on the collective cleanups of scope 's'" in text_0
    assert "disagree on the collective cleanups of scope 's'" in text_1
    assert "Not run, because " in text_0
    assert "cleanup '_Thing.method' (registered at " in text_0


@pytest.mark.parametrize(
    ("register", "lives", "is_named"),
    [
        pytest.param(lambda scope, thing: scope.hold(thing), True, False, id="hold"),
        pytest.param(lambda scope, thing: scope.after_barrier(thing.method), True, True, id="after_barrier"),
        pytest.param(
            lambda scope, thing: scope.after_barrier(thing.method, even_if_missing=True), False, False, id="anyway"
        ),
        pytest.param(lambda scope, thing: scope.cleanup(thing.method), False, False, id="cleanup"),
    ],
)
def test_scope_with_a_missing_rank_keeps_what_that_may_still_use(
    register: Callable[[CollectiveScope, _Thing], object], *, lives: bool, is_named: bool
) -> None:
    """A rank that gives up on its peer frees nothing that was to wait for that; what is skipped is named."""

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> tuple[bool, str] | None:
        if rank == 1:
            return sequencer.wait_for("rank 0 has given up")  # type: ignore[func-returns-value]  # for its effect
        reference, text = _use(collective_scope(group, timeout=0.1), register)
        sequencer.announce("rank 0 has given up")
        return _die(reference), text

    died, text = meet(2, run)[0]

    assert lives == (not died)
    assert "rank 1 of 2 missing" in text
    assert is_named == ("cleanup '_Thing.method' (registered at " in text)


def test_scope_to_which_all_came_lets_go_and_runs_what_is_for_after_the_barrier() -> None:
    """A peer that failed has arrived: it uses nothing any more."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> tuple[list[str], bool]:
        calls: list[str] = []

        def register(scope: CollectiveScope, thing: _Thing) -> None:
            scope.hold(thing)
            scope.after_barrier(calls.append, "after")
            if rank == 1:
                raise _BodyError

        reference = None
        with contextlib.suppress(_BodyError):
            reference, _text = _use(collective_scope(group), register)
        return calls, reference is None or _die(reference)

    assert [(["after"], True)] * 2 == meet(2, run)


# The current scope


def test_current_scope_is_the_innermost_in_its_body() -> None:
    """Each body sees its own scope, also after an inner one."""
    with collective_scope() as outer:
        seen = [current_scope()]
        with collective_scope() as inner:
            seen.append(current_scope())
        seen.append(current_scope())

    assert [outer, inner, outer] == seen


@pytest.mark.parametrize("failing", [False, True], ids=["ok", "failed"])
def test_current_scope_outside_of_a_body_is_an_error(*, failing: bool) -> None:
    """Outside of a body, in the teardown too, there is no current scope."""
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            current_scope()
        except RuntimeError as error:
            errors.append(error)

    with contextlib.suppress(_BodyError), collective_scope() as scope:
        scope.cleanup(ask)
        if failing:
            raise _BodyError
    ask()

    assert ["current_scope() was called outside of the body of a scope"] * 2 == list(map(str, errors))


def test_current_scope_default_is_what_there_is_outside_of_a_body() -> None:
    """A library that may be used without a scope asks with a default."""
    with collective_scope() as scope:
        assert scope is current_scope(None) is current_scope(default=3)

    assert (None, 3) == (current_scope(None), current_scope(default=3))


def test_current_scope_in_another_thread_is_not_this_one() -> None:
    """A thread has scopes of its own."""
    errors: list[type[BaseException]] = []

    def ask() -> None:
        try:
            current_scope()
        except RuntimeError as error:
            errors.append(type(error))

    with collective_scope():
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(PATIENCE_S)

    assert [RuntimeError] == errors


# Life cycle


def test_scope_entered_twice_is_refused() -> None:
    """A scope guards one block: not the same one again, not another one."""
    scope = collective_scope()
    with scope, pytest.raises(RuntimeError, match=r"^a scope guards one 'with' block; make a new one"), scope:
        pass
    with pytest.raises(RuntimeError, match="one 'with' block"), scope:
        pass

    assert _verdict(scope).ok


def test_scope_repr_shows_name_state_and_number_of_cleanups() -> None:
    """The repr tells where in its life the scope is."""
    texts: list[str] = []
    scope = collective_scope(name="s")
    texts.append(repr(scope))
    with scope:
        scope.cleanup(lambda: texts.append(repr(scope)))
        texts.append(repr(scope))
    texts.append(repr(scope))

    assert texts == [
        "<CollectiveScope 's', new, cleanups=0>",
        "<CollectiveScope 's', in the body, cleanups=1>",
        "<CollectiveScope 's', in the teardown, cleanups=0>",
        "<CollectiveScope 's', left, cleanups=0>",
    ]


def test_scope_name_defaults_to_file_and_line() -> None:
    """Without a name, a scope is called after the place that made it."""
    scope = collective_scope()
    line = test_scope_name_defaults_to_file_and_line.__code__.co_firstlineno + 2

    assert f"{Path(__file__).name}:{line}" == scope.name
    assert "given" == collective_scope(name="given").name


def test_scope_name_of_another_type_is_refused() -> None:
    """A name is text; anything else is refused at once."""
    with pytest.raises(TypeError, match=r"^name must be a text \(got 3\)$"):
        collective_scope(name=3)  # type: ignore[arg-type]  # wrong on purpose


def test_scope_verdict_comes_with_the_exit() -> None:
    """There is no verdict before the exit; after it, it says what this rank did."""
    with collective_scope(name="s") as scope:
        assert scope.verdict is None

    assert Verdict("s", 1, (0,), outcomes={0: Outcome()}) == scope.verdict


# Times


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        pytest.param({}, {}, (300.0, 30.0, 30.0, 10.0), id="default"),
        pytest.param(
            {"timeout": 2, "failure_timeout": 1.5, "warn_after": 1},
            {},
            (2.0, 1.5, 30.0, 1.0),
            id="numbers",
        ),
        pytest.param(
            {"timeout": timedelta(minutes=1), "failure_timeout": timedelta(milliseconds=5)},
            {},
            (60.0, 0.005, 30.0, 10.0),
            id="delta",
        ),
        pytest.param(
            {},
            {"TIMEOUT": "7.5", "FAILURE_TIMEOUT": "3", "HEARTBEAT_TIMEOUT": "9", "WARN_AFTER": "4"},
            (7.5, 3.0, 9.0, 4.0),
            id="environment",
        ),
        pytest.param({"warn_after": None}, {"WARN_AFTER": "4"}, (300.0, 30.0, 30.0, None), id="no-warnings"),
        pytest.param({}, {"TIMEOUT": "7.5"}, (7.5, 30.0, 30.0, 10.0), id="environment-of-one"),
        pytest.param(
            {"timeout": 2}, {"TIMEOUT": "7.5", "FAILURE_TIMEOUT": "3"}, (2.0, 3.0, 30.0, 10.0), id="argument-first"
        ),
    ],
)
def test_scope_times_come_from_argument_or_environment_or_default(
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    environment: dict[str, str],
    expected: tuple[float | None, ...],
) -> None:
    """An argument counts before the environment, and that before the default."""
    for name in ("TIMEOUT", "FAILURE_TIMEOUT", "HEARTBEAT_TIMEOUT", "WARN_AFTER"):
        monkeypatch.delenv(f"COLLECTIVE_SCOPE_{name}", raising=False)
        if name in environment:
            monkeypatch.setenv(f"COLLECTIVE_SCOPE_{name}", environment[name])

    options = collective_scope(**arguments)._options  # noqa: SLF001  (tests of barriers cover their use)
    names = ("timeout", "failure_timeout", "heartbeat_timeout", "warn_after")
    assert expected == tuple(getattr(options, name) for name in names)


@pytest.mark.parametrize("parameter", ["timeout", "failure_timeout", "warn_after", "kill_after"])
@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        pytest.param(0, ValueError, "must be positive and finite (got 0)", id="zero"),
        pytest.param(-1.5, ValueError, "must be positive and finite (got -1.5)", id="negative"),
        pytest.param(float("inf"), ValueError, "must be positive and finite (got inf)", id="infinite"),
        pytest.param(float("nan"), ValueError, "must be positive and finite (got nan)", id="nan"),
        pytest.param(10**400, ValueError, "must be positive and finite (got 1000", id="no-float"),
        pytest.param(timedelta(0), ValueError, "must be positive and finite", id="zero-delta"),
        pytest.param("soon", TypeError, "must be seconds as a number, or a timedelta (got 'soon')", id="text"),
        pytest.param("60", TypeError, "must be seconds as a number, or a timedelta (got '60')", id="digits"),
        pytest.param(True, TypeError, "must be seconds as a number, or a timedelta (got True)", id="flag"),
        pytest.param([1], TypeError, "must be seconds as a number, or a timedelta (got [1])", id="list"),
    ],
)
def test_scope_time_that_makes_no_sense_is_refused_by_its_name(
    parameter: str, value: Any, error: type[Exception], rule: str
) -> None:
    """A bad time is refused when the scope is made, with the rule and the parameter."""
    with pytest.raises(error) as caught:
        collective_scope(**{parameter: value})

    assert str(caught.value).startswith(f"{parameter} {rule}")


@pytest.mark.parametrize("value", ["", "soon", "0", "inf"])
def test_scope_time_in_the_environment_that_makes_no_sense_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """A bad time in the environment is refused with the name of the variable."""
    monkeypatch.setenv("COLLECTIVE_SCOPE_TIMEOUT", value)

    with pytest.raises(ValueError, match=r"^COLLECTIVE_SCOPE_TIMEOUT must be "):
        collective_scope()
    assert collective_scope(timeout=1) is not None


# Surfacing


_SKIP = pytest.skip.Exception


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(_BodyError("no"), id="exception"),
        pytest.param(_SKIP("not here"), id="pytest-skip"),
        pytest.param(unittest.SkipTest("not here"), id="unittest-skip"),
        pytest.param(SystemExit(3), id="system-exit"),
        pytest.param(KeyboardInterrupt(), id="keyboard-interrupt"),
        pytest.param(ExceptionGroup("two", [ValueError(), KeyError()]), id="group"),
    ],
)
def test_scope_error_of_the_body_surfaces_unchanged(error: BaseException, calls: list[str]) -> None:
    """The body's exception goes on as itself: the same object, nothing attached, no new context."""
    with pytest.raises(type(error)) as caught, collective_scope() as scope:
        scope.cleanup(calls.append, "cleanup")
        raise error

    assert error is caught.value
    assert (None, None) == (error.__cause__, error.__context__)
    assert not hasattr(error, "__notes__")
    assert not hasattr(error, "collective_scope_errors")
    assert ["cleanup"] == calls
    assert "body" == _verdict(scope).failures[0].phase


def test_scope_error_of_one_cleanup_surfaces_as_itself() -> None:
    """A single cleanup error is raised as it is, not wrapped."""
    error = _CleanupError("no")
    with pytest.raises(_CleanupError) as caught, collective_scope() as scope:
        scope.cleanup(_raise, error)

    assert error is caught.value
    assert "cleanup '_raise'" == _verdict(scope).failures[0].phase


def test_scope_errors_of_several_cleanups_surface_as_a_group_in_order() -> None:
    """Several cleanup errors are raised together, in the order in which they happened."""
    errors = [_CleanupError("1"), ValueError("2"), _CleanupError("3")]
    with pytest.raises(ExceptionGroup) as caught, collective_scope(name="s") as scope:
        scope.after_barrier(_raise, errors[2])
        scope.cleanup(_raise, errors[1])
        scope.cleanup(_raise, errors[0])

    assert errors == list(caught.value.exceptions)
    assert "3 cleanups of scope 's' failed" == caught.value.message
    assert ("cleanup '_raise': ValueError: 2",) == _verdict(scope).failures[0].also


def test_scope_errors_after_the_one_of_the_body_are_attached_to_it() -> None:
    """Cleanup errors do not replace the body's; they are in its notes and its attribute."""
    body, first, second = _BodyError("body"), _CleanupError("first"), _CleanupError("second")
    with pytest.raises(_BodyError) as caught, collective_scope() as scope:
        scope.after_barrier(_raise, second)
        scope.cleanup(_raise, first)
        raise body

    assert body is caught.value
    assert (first, second) == body.collective_scope_errors  # type: ignore[attr-defined]  # set by the scope
    assert body.__notes__ == [
        f"In addition, cleanup '_raise': {__name__}._CleanupError: first",
        f"In addition, after_barrier '_raise': {__name__}._CleanupError: second",
    ]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("body", [None, _BodyError("body")], ids=["body-ok", "body-failed"])
def test_scope_interrupt_in_a_cleanup_outranks_ordinary_errors(
    interrupt: BaseException, body: Exception | None, calls: list[str]
) -> None:
    """Ctrl-C in a cleanup does not skip the others, and is what surfaces; the rest is attached."""
    # The same objects are raised in several cases.
    for each in (interrupt, body):
        if each is not None:
            each.__dict__.clear()
    other = _CleanupError("other")
    with pytest.raises(type(interrupt)) as caught, collective_scope() as scope:
        scope.cleanup(calls.append, "bottom")
        scope.cleanup(_raise, interrupt)
        scope.cleanup(_raise, other)
        if body is not None:
            raise body

    assert interrupt is caught.value
    assert ["bottom"] == calls
    assert tuple(each for each in (body, other) if each is not None) == interrupt.collective_scope_errors  # type: ignore[attr-defined]  # set by the scope


def test_scope_interrupt_in_the_body_stays_before_one_in_a_cleanup() -> None:
    """The first interrupt is the one that surfaces."""
    first, second = KeyboardInterrupt(), SystemExit(3)
    with pytest.raises(KeyboardInterrupt) as caught, collective_scope() as scope:
        scope.cleanup(_raise, second)
        raise first

    assert first is caught.value
    assert (second,) == first.collective_scope_errors  # type: ignore[attr-defined]  # set by the scope


class _NoAttributesError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        msg = f"no {name}"
        raise AttributeError(msg)


@attrs.frozen
class _FrozenError(Exception):
    code: int


class _PeevishError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        msg = f"no {name}"
        raise ValueError(msg)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(_NoAttributesError(), id="no-attributes"),
        pytest.param(_FrozenError(3), id="frozen-attrs"),
        pytest.param(_PeevishError(), id="raises-what-it-likes"),
    ],
)
def test_scope_error_that_takes_no_attributes_surfaces_and_the_rest_is_logged(
    error: Exception, caplog: pytest.LogCaptureFixture, calls: list[str]
) -> None:
    """Where an exception class forbids attributes, the log has what would have been attached."""
    with pytest.raises(type(error)) as caught, collective_scope(name="s") as scope:
        scope.after_barrier(calls.append, "after")
        scope.cleanup(_raise, _CleanupError("later"))
        raise error

    assert error is caught.value
    assert ["after"] == calls
    assert "_CleanupError: later" in caplog.messages[-1]
    assert "left" in repr(scope)


def test_scope_errors_of_nested_scopes_are_all_attached() -> None:
    """An error that passes through two scopes collects what went wrong in either."""
    body, inner_error, outer_error = _BodyError("body"), _CleanupError("inner"), _CleanupError("outer")
    with pytest.raises(_BodyError), collective_scope() as outer:
        outer.cleanup(_raise, outer_error)
        with collective_scope() as inner:
            inner.cleanup(_raise, inner_error)
            raise body

    assert (inner_error, outer_error) == body.collective_scope_errors  # type: ignore[attr-defined]  # set by the scope
    assert 2 == len(body.__notes__)


def test_scope_error_whose_str_raises_surfaces_and_is_attached() -> None:
    """An exception that cannot be printed is reported all the same."""

    class MuteError(Exception):
        def __str__(self) -> str:
            msg = "no words"
            raise LookupError(msg)

    body, later = MuteError(), MuteError()
    with pytest.raises(MuteError) as caught, collective_scope() as scope:
        scope.cleanup(_raise, later)
        raise body

    assert body is caught.value
    assert (later,) == body.collective_scope_errors  # type: ignore[attr-defined]  # set by the scope
    assert "<its str() raised LookupError>" == _verdict(scope).failures[0].message


@pytest.mark.usefixtures("collected", "unlogged")
def test_scope_refused_at_entry_is_left_and_its_error_leaves_no_reference_cycle() -> None:
    """A scope whose body was refused has been left: its error goes with the last reference; it cannot be entered."""

    def enter(scope: CollectiveScope) -> weakref.ref[Any] | None:
        try:
            with scope:
                pass
        except CollectiveScopeError as error:
            return weakref.ref(error)
        return None

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> list[Any] | None:
        if rank == 1:
            return sequencer.wait_for("rank 0 has given up")  # type: ignore[func-returns-value]  # for its effect
        scopes = [collective_scope(group, timeout=0.1) for _ in range(3)]
        references = [enter(scope) for scope in scopes]
        sequencer.announce("rank 0 has given up")
        with pytest.raises(RuntimeError, match="guards one 'with' block"):
            scopes[1].__enter__()
        return [reference and reference() for reference in references]

    gc.collect()
    gc.disable()

    assert [None, None, None] == meet(2, run)[0]


def test_scope_whose_group_cannot_be_found_runs_what_it_was_given_and_names_the_rest(calls: list[str]) -> None:
    """A group that raises when it is looked up refuses the body; local cleanups run, a collective one is named."""
    error = LookupError("no group")

    def group() -> None:
        raise error

    scope = collective_scope(group, cleanups=[lambda: calls.append("given")])
    scope.cleanup(calls.append, "registered")
    scope.collective_cleanup(calls.append, "collective", name="destroy")
    with pytest.raises(LookupError) as caught, scope:
        calls.append("body")

    assert error is caught.value
    assert ["registered", "given"] == calls
    assert 1 == len(error.__notes__)
    assert "cleanup 'destroy' (registered at " in error.__notes__[0]
    assert "left" in repr(scope)


# A failure that the body reports itself


def test_fail_surfaces_at_the_exit_as_if_the_body_had_raised_it(calls: list[str]) -> None:
    """A body that catches its error hands it to the scope, goes on, and the scope raises it."""
    error = _BodyError("caught")
    with pytest.raises(_BodyError) as caught, collective_scope() as scope:
        scope.cleanup(calls.append, "cleanup")
        scope.fail(error)
        calls.append("the rest of the body")

    assert error is caught.value
    assert ["the rest of the body", "cleanup"] == calls
    assert "body" == _verdict(scope).failures[0].phase


def test_fail_before_the_body_raises_is_attached_to_that() -> None:
    """A later error of the body surfaces. The one it had reported is not lost."""
    reported, raised = _BodyError("reported"), ValueError("raised")
    with pytest.raises(ValueError, match="raised") as caught, collective_scope() as scope:
        scope.fail(reported)
        raise raised

    assert (reported,) == caught.value.collective_scope_errors  # type: ignore[attr-defined]  # set by the scope


def _has_told_of_a_failure(group: RankGroup, rank: int) -> bool:
    record = record_of(group.store, rank)
    return record is not None and not record.outcome.ok


def test_fail_is_told_to_the_peers_at_once() -> None:
    """A peer that waits learns of it while the body of the rank that failed goes on."""

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> str:
        with pytest.raises((_BodyError, PeerFailedError)) as caught, collective_scope(group) as scope:
            if rank == 1:
                scope.fail(_BodyError("reported"))
                assert wait_until(lambda: _has_told_of_a_failure(group, 1))
                assert not is_waiting(group.store, 1)
                sequencer.announce("told")
            sequencer.wait_for("told")
        return str(caught.value).splitlines()[0]

    assert ["rank 1 of 2 failed in scope", "reported"] == [text[:27].strip() for text in meet(2, run)]


def test_fail_against_the_rules_is_refused() -> None:
    """Only an exception, and only in the body."""
    scope = collective_scope(name="s")
    with pytest.raises(RuntimeError, match=r"^scope 's' can fail in its body only"):
        scope.fail(_BodyError())
    with scope, pytest.raises(TypeError, match=r"^error must be an exception \(got 'no'\)$"):
        scope.fail("no")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(RuntimeError, match=r"^scope 's' can fail in its body only"):
        scope.fail(_BodyError())

    assert _verdict(scope).ok


# Against the rules


@pytest.mark.parametrize("register", ["cleanup", "collective_cleanup", "after_barrier"])
def test_scope_with_cleanups_that_is_never_entered_warns(register: str) -> None:
    """A forgotten `with` does not pass silently: the cleanups would never run."""
    scope = collective_scope(name="s")
    getattr(scope, register)(print)
    with pytest.warns(
        ResourceWarning, match=rf"^scope 's' \({__file__}:\d+\) was never entered; its cleanups did not run"
    ):
        del scope


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda scope: scope(lambda: None)(), id="decorator"),
        pytest.param(lambda scope: scope.__enter__().__exit__(None, None, None), id="entered"),
        pytest.param(repr, id="nothing-registered"),
    ],
)
def test_scope_that_lost_no_cleanup_does_not_warn(use: Callable[[CollectiveScope], object]) -> None:
    """A scope that decorates, was entered, or has nothing of its own goes quietly."""
    scope = collective_scope(cleanups=[lambda: None])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use(scope)
        del scope

    assert [] == caught


def _leave(scope: CollectiveScope) -> str:
    """Leave *scope* by hand; return what that raised."""
    try:
        scope.__exit__(None, None, None)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def test_scope_left_before_one_within_it_says_so_and_the_peers_stay_in_step() -> None:
    """A scope around the yield of a generator that is closed late breaks the order: told here and to the peers, once."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> tuple[list[str], bool]:
        said: list[str] = []
        if rank == 0:
            outer, inner = (collective_scope(group, name=name).__enter__() for name in ("outer", "inner"))
            said += [_leave(outer), _leave(inner), f"then in {current_scope(None)}"]
        else:
            with (
                pytest.raises(PeerFailedError) as caught,
                collective_scope(group, name="outer"),
                collective_scope(group, name="inner"),
            ):
                pass
            said.append(str(caught.value).splitlines()[0])
        with collective_scope(group, name="next") as scope:
            pass
        return said, _verdict(scope).ok

    (said, is_ok), (told, is_peer_ok) = meet(2, run)

    assert said == [
        "scope 'outer' was left before scope 'inner', which was entered within it",
        "scope 'inner' was left after a scope around it",
        "then in None",
    ]
    assert told[0].startswith("rank 0 of 2 failed in scope 'outer', around scope 'inner': RuntimeError: ")
    assert is_ok
    assert is_peer_ok


def test_scopes_of_overlapping_tasks_on_one_group_say_so_and_later_ones_work() -> None:
    """Tasks have contexts of their own, and share the thread that a rank is: their scopes must be nested, too."""

    async def overlap(group: object) -> list[str]:
        entered, left = asyncio.Event(), asyncio.Event()

        async def first() -> str:
            scope = collective_scope(group, name="first").__enter__()
            entered.set()
            await left.wait()
            return _leave(scope)

        async def second() -> str:
            await entered.wait()
            scope = collective_scope(group, name="second").__enter__()
            left.set()
            await task
            return _leave(scope)

        task = asyncio.create_task(first())
        return list(await asyncio.gather(task, second()))

    def run(_rank: int, group: RankGroup, _: Sequencer) -> tuple[list[str], bool]:
        said = asyncio.run(overlap(group))
        with collective_scope(group, name="next") as scope:
            pass
        return said, _verdict(scope).ok

    for said, is_ok in meet(2, run):
        assert said == [
            "scope 'first' was left before scope 'second', which was entered within it",
            "scope 'second' was left after a scope around it",
        ]
        assert is_ok


def test_scope_left_out_of_order_without_a_group_says_so_too() -> None:
    """Where there are no peers the rule is the same, and the next scope finds everything in order."""

    def misnest() -> list[str]:
        outer, inner = (collective_scope(name=name).__enter__() for name in ("outer", "inner"))
        return [_leave(outer), _leave(inner), f"then in {current_scope(None)}"]

    assert contextvars.copy_context().run(misnest) == [
        "scope 'outer' was left before scope 'inner', which was entered within it",
        "scope 'inner' was left after a scope around it",
        "then in None",
    ]


def test_scope_left_by_another_thread_says_what_that_means() -> None:
    """Its peers were told nothing, and no later scope works yet: the advice for a broken order would be untrue."""
    said: list[str] = []

    def leave() -> None:
        with pytest.raises(RuntimeError) as caught:
            scope.__exit__(None, None, None)
        said.append(str(caught.value))

    with collective_scope(name="s") as scope:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join(PATIENCE_S)

    assert "Nothing of it was torn down: its own thread has to leave it." in said[0]
    assert "later scopes work again" not in said[0]


def test_scope_left_by_another_thread_says_so_and_can_still_be_left(calls: list[str]) -> None:
    """A scope belongs to the thread that entered it; another one is told, and changes nothing."""
    said: list[str] = []
    with collective_scope(name="s") as scope:
        scope.cleanup(calls.append, "cleanup")
        thread = threading.Thread(target=lambda: said.append(_leave(scope)))
        thread.start()
        thread.join(PATIENCE_S)
        assert [] == calls

    assert ["scope 's' was left by another thread than the one that entered it"] == said
    assert ["cleanup"] == calls
    assert _verdict(scope).ok


def test_scope_entered_while_another_thread_is_in_one_of_the_group_is_refused() -> None:
    """Two threads cannot be one rank: the second is told so at once, and does not disturb the first."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> tuple[list[str], bool]:
        said: list[str] = []

        def enter() -> None:
            with pytest.raises(RuntimeError) as caught, collective_scope(group, name="second"):
                said.append("body")
            said.append(str(caught.value))

        with collective_scope(group, name="first") as scope:
            if rank == 0:
                thread = threading.Thread(target=enter)
                thread.start()
                thread.join(PATIENCE_S)
        with collective_scope(group, name="next") as following:
            pass
        return said, _verdict(scope).ok and _verdict(following).ok

    (said, is_ok), other = meet(2, run)

    assert ["scope 'second' cannot be entered: another thread of this process is in scope 'first'"] == [
        text.partition(" of the same group")[0] for text in said
    ]
    assert is_ok
    assert ([], True) == other


def test_scope_that_a_forked_child_unwinds_through_is_its_parents() -> None:
    """In the child the exit runs nothing and tells nothing, and lets the exception pass; the parent's is undisturbed."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> tuple[str, list[str], bool]:
        calls: list[str] = []
        text = ""
        with collective_scope(group, timeout=5.0) as scope:
            scope.cleanup(calls.append, "cleanup")

            def unwind() -> str:
                is_suppressed = scope.__exit__(_BodyError, _BodyError(), None)  # as the end of the block calls it
                return f"{is_suppressed} {calls} {scope.verdict}"

            if rank == 0:
                text = in_a_fork(unwind)
        return text, calls, _verdict(scope).ok

    assert [("None [] None", ["cleanup"], True), ("", ["cleanup"], True)] == meet(2, run)


# No cycles


@pytest.mark.parametrize("failing", ["nothing", "body", "cleanup", "two cleanups", "interrupt in a cleanup", "peer"])
@pytest.mark.usefixtures("collected", "unlogged")
def test_scope_left_on_any_path_leaves_no_reference_cycle(failing: str) -> None:
    """When the error and the scope are dropped they go at once, without the cyclic collector."""

    class Watched(Exception):  # noqa: N818  (no error)
        pass

    references: list[weakref.ref[Any]] = []

    def make() -> Watched:
        error = Watched()
        references.append(weakref.ref(error))
        return error

    def fail(kind: type[BaseException] | None = None) -> None:
        raise make() if kind is None else kind

    def use() -> None:
        thing = _Thing()
        references.append(weakref.ref(thing))
        try:
            with collective_scope() as scope:
                references.append(weakref.ref(scope))
                scope.hold(thing)
                scope.cleanup(thing.method)
                for _ in range({"cleanup": 1, "two cleanups": 2, "interrupt in a cleanup": 1}.get(failing, 0)):
                    scope.cleanup(fail)
                if failing == "interrupt in a cleanup":
                    scope.cleanup(fail, KeyboardInterrupt)
                if failing in ("body", "interrupt in a cleanup"):
                    fail()
                if failing == "peer":
                    raise PeerFailedError(failing, Verdict("s", 2))  # noqa: TRY301  (raised into the scope under test)
        except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
            assert type(error).__name__ in {  # noqa: PT017  (one of several)
                "Watched",
                "ExceptionGroup",
                "KeyboardInterrupt",
                "PeerFailedError",
            }
        else:
            assert "nothing" == failing

    use()  # the first time may fill caches
    references.clear()
    gc.collect()
    gc.disable()
    use()

    assert [] == [each for each in (reference() for reference in references) if each is not None]


@pytest.mark.usefixtures("collected", "unlogged")
def test_scope_raising_for_its_peers_leaves_no_reference_cycle() -> None:
    """An error that the scope makes goes at once as well, with the frames that it passed."""
    references: list[weakref.ref[Any]] = []

    def run(rank: int, group: RankGroup, _: Sequencer) -> None:
        thing = _Thing()
        references.append(weakref.ref(thing))
        try:
            with collective_scope(group) as scope:
                references.append(weakref.ref(scope))
                if rank == 1:
                    raise _BodyError  # noqa: TRY301  (raised into the scope under test)
        except (_BodyError, PeerFailedError) as error:
            references.append(weakref.ref(error))

    gc.collect()
    gc.disable()
    meet(2, run)

    assert 6 == len(references)
    assert [] == [each for each in (reference() for reference in references) if each is not None]


# Logging


def test_scope_failure_is_logged_with_its_traceback_before_the_cleanups(
    caplog: pytest.LogCaptureFixture, calls: list[int]
) -> None:
    """The failing rank says what happened before it does anything that may take long."""
    with pytest.raises(_BodyError), collective_scope(name="s") as scope:
        scope.cleanup(lambda: calls.append(len(caplog.records)))
        raise _BodyError

    assert [1] == calls
    assert (logging.ERROR, "collective_scope") == (caplog.records[0].levelno, caplog.records[0].name)
    assert caplog.messages[0] == "scope 's' failed, body"
    assert caplog.records[0].exc_info is not None
    assert _BodyError is caplog.records[0].exc_info[0]


class _Handler(logging.Handler):
    """A handler that does as told."""

    def __init__(self, emit: Callable[[], object]) -> None:
        super().__init__()
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002  (given to every handler)
        self._emit()


@contextlib.contextmanager
def _handling(emit: Callable[[], object]) -> Iterator[None]:
    handler, logger = _Handler(emit), logging.getLogger("collective_scope")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def test_scope_failure_is_told_before_it_is_logged_and_logged_before_any_wait() -> None:
    """The peers know while the log is still being written, and the traceback is there before the cleanups begin."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> list[object]:
        seen: list[object] = []

        def emit() -> None:
            # As long as the pipe behind a log may be full.
            seen.append(wait_until(lambda: _has_told_of_a_failure(group, 1)))

        handling = _handling(emit) if rank == 1 else contextlib.nullcontext()
        with contextlib.suppress(_BodyError, PeerFailedError), handling, collective_scope(group) as scope:
            scope.cleanup(seen.append, "cleanup")
            if rank == 1:
                raise _BodyError
        return seen

    assert [["cleanup"], [True, "cleanup"]] == meet(2, run)


class _NotesError(Exception):
    @property
    def __notes__(self) -> list[str]:
        msg = "no notes"
        raise LookupError(msg)


class _GroupError(ExceptionGroup[Exception]):
    @property
    def exceptions(self) -> Any:
        msg = "no members"
        raise LookupError(msg)


class _MappingError(Exception):
    def __getattr__(self, name: str) -> object:
        raise KeyError(name)


@pytest.mark.parametrize(
    "emit",
    [lambda: _raise(OSError("no space left")), lambda: _raise(SystemExit(5)), None],
    ids=["raises", "exits", "ok"],
)
@pytest.mark.parametrize(
    "make",
    [_BodyError, _NotesError, _MappingError, lambda: _GroupError("x", [ValueError()])],
    ids=["plain", "notes-raise", "attributes-raise", "members-raise"],
)
@pytest.mark.parametrize("where", ["body", "cleanup"])
def test_scope_failure_that_cannot_be_logged_or_formatted_costs_neither_cleanups_nor_barrier(
    where: str, make: Callable[[], Exception], emit: Callable[[], object] | None
) -> None:
    """Every cleanup runs, the peers are told, and no error vanishes, whatever the log and the exception do."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> tuple[list[str], bool, Verdict | None, bool]:
        calls: list[str] = []
        error = make()
        raised: BaseException | None = None
        handling = _handling(emit) if rank == 1 and emit is not None else contextlib.nullcontext()
        scope = collective_scope(group, timeout=5.0)
        try:
            with handling, scope:
                scope.after_barrier(calls.append, "after")
                scope.cleanup(calls.append, "first")
                if rank == 1:
                    scope.cleanup(_raise, _CleanupError())
                    scope.cleanup(_raise, error if where == "cleanup" else _CleanupError())
                scope.cleanup(calls.append, "last")
                if rank == 1 and where == "body":
                    raise error  # noqa: TRY301  (raised into the scope under test)
        except BaseException as surfaced:  # noqa: BLE001  (kept, and looked at by the test)
            raised = surfaced
        told = [raised, *_members(raised), *vars(raised or error).get("collective_scope_errors", ())]
        with collective_scope(group, timeout=5.0) as following:
            pass
        return calls, any(each is error for each in told), scope.verdict, _verdict(following).ok

    (calls_0, _, verdict_0, is_ok_0), (calls_1, is_there, verdict_1, is_ok_1) = meet(2, run)

    assert ["last", "first", "after"] == calls_0 == calls_1
    assert is_there
    assert verdict_0 is not None
    assert verdict_0 == verdict_1
    assert [1] == list(verdict_0.failures)
    assert verdict_0.complete
    assert is_ok_0
    assert is_ok_1


def _members(error: BaseException | None) -> tuple[BaseException, ...]:
    return BaseExceptionGroup.exceptions.__get__(error) if isinstance(error, BaseExceptionGroup) else ()


def _fail_in_a_decorated_function() -> None:
    raise _BodyError


@pytest.mark.parametrize("where", ["decorated", "cleanup", "after_barrier", "enter_context"])
def test_scope_failure_is_shown_without_frames_of_the_library(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """The log and the report to peers have the lines of the test and of functions it called, and no others."""
    scope = collective_scope()
    if where == "decorated":
        with pytest.raises(_BodyError):
            scope(_fail_in_a_decorated_function)()
    else:
        with pytest.raises(_BodyError), scope:
            if where == "enter_context":
                stack = scope.enter_context(contextlib.ExitStack())
                stack.callback(_fail_in_a_decorated_function)
            else:
                getattr(scope, where)(_fail_in_a_decorated_function)
    told = "" if scope.verdict is None else "".join(outcome.traceback for outcome in scope.verdict.failures.values())

    assert "in _fail_in_a_decorated_function" in caplog.text
    assert str(Path(_failures.__file__).parent) not in caplog.text
    assert str(Path(_failures.__file__).parent) not in told


@pytest.mark.parametrize("error", [_SKIP("no GPU"), unittest.SkipTest("no GPU")], ids=["pytest", "unittest"])
def test_scope_skip_is_logged_at_info(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """A skipped body is told to the peers, and is no error in the log."""
    caplog.set_level(logging.INFO, "collective_scope")
    with pytest.raises(type(error)), collective_scope():
        raise error

    assert [logging.INFO] == [record.levelno for record in caplog.records]


def test_scope_error_that_passes_through_nested_scopes_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback that an inner scope has logged is not logged again on the way out."""
    with pytest.raises(_BodyError), collective_scope(name="outer"), collective_scope(name="inner"):
        raise _BodyError

    assert ["scope 'inner' failed, body"] == caplog.messages


def test_scope_new_error_after_an_inner_one_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    """An error that replaces what an inner scope raised is new, and logged."""
    with pytest.raises(ValueError, match="new"), collective_scope(name="outer"):
        with contextlib.suppress(_BodyError), collective_scope(name="inner"):
            raise _BodyError
        msg = "new"
        raise ValueError(msg)

    assert ["inner", "outer"] == [message.split("'")[1] for message in caplog.messages]


def test_scope_in_peace_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The healthy path is silent."""
    caplog.set_level(logging.DEBUG)
    with collective_scope() as scope:
        scope.cleanup(print, end="")

    assert [] == caplog.messages


# Large things


@pytest.mark.parametrize("what", ["scope", "cleanup", "message"])
def test_scope_with_nine_megabytes_to_say_agrees_all_the_same(what: str) -> None:
    """A name or a message over the limit of a store is shortened; the ranks hold one verdict, and it can be read."""
    huge = "é" * 9_000_000
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(rank: int, group: RankGroup, _: Sequencer) -> tuple[Verdict | None, str]:
        scope = collective_scope(group, name=huge if what == "scope" else "s", timeout=10.0)
        with pytest.raises((CollectiveScopeError, _BodyError)) as caught, scope:
            if rank == 1:
                scope.collective_cleanup(print, name=huge if what == "cleanup" else "c")
                raise _BodyError(huge if what == "message" else "no")
        return scope.verdict, caught.type.__name__

    (verdict, raised), mine = meet(2, run, store=store)

    assert "PeerFailedError" == raised
    assert (verdict, "_BodyError") == mine
    assert verdict is not None
    assert verdict.complete
    assert len(repr(attrs.asdict(verdict))) < 1_000_000


def test_fingerprints_that_differ_in_their_middle_are_different() -> None:
    """Four hundred handles of which one differs: the cleanup runs on no rank, whatever of them is shown."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> tuple[list[str], str]:
        calls: list[str] = []
        handles = [10_000 + each for each in range(400)]
        handles[200] += rank
        with pytest.raises(CleanupMismatchError) as caught, collective_scope(group) as scope:
            scope.collective_cleanup(calls.append, "freed", fingerprint=lambda: handles)
        return calls, str(caught.value)

    (calls, text), other = meet(2, run)

    assert ([], text) == (calls, other[1])
    assert [] == other[0]
    assert len(text) < 5_000


@pytest.mark.usefixtures("unlogged")
@pytest.mark.parametrize("how", ["fail", "are-skipped"])
def test_sixty_thousand_cleanups_that_fail_are_not_quadratic(how: str) -> None:
    """A body that registers a cleanup per tensor may see all of them fail, in seconds and not in minutes."""
    scope = collective_scope((lambda: _raise(LookupError())) if how == "are-skipped" else None)
    register = scope.collective_cleanup if how == "are-skipped" else scope.cleanup
    for number in range(60_000):
        register(_raise, ValueError(number), **({"name": "c"} if how == "are-skipped" else {}))
    start = time.thread_time()
    with pytest.raises((ExceptionGroup, LookupError)), scope:
        pass

    assert time.thread_time() - start < 8.0


# The collector in lockstep


@pytest.mark.parametrize("failing", ["nothing", "body", "cleanup", "interrupt"])
@pytest.mark.parametrize("was_enabled", [True, False], ids=["on-before", "off-before"])
@pytest.mark.usefixtures("collected")
def test_lockstep_gc_is_off_in_the_body_and_as_before_after_any_exit(failing: str, *, was_enabled: bool) -> None:
    """The collector rests in the body, and is afterwards what it was, whatever happened."""
    (gc.enable if was_enabled else gc.disable)()
    states = []
    error: BaseException | None = {"body": _BodyError(), "interrupt": KeyboardInterrupt()}.get(failing)
    with contextlib.suppress(_BodyError, _CleanupError, KeyboardInterrupt), collective_scope(lockstep_gc=True) as scope:
        if failing == "cleanup":
            scope.cleanup(_raise, _CleanupError())
        scope.cleanup(lambda: states.append(gc.isenabled()))
        states.append(gc.isenabled())
        if error is not None:
            raise error
    states.append(gc.isenabled())

    assert [False, False, was_enabled] == states


@pytest.mark.usefixtures("collected")
def test_lockstep_gc_nested_stays_off_until_the_outermost_exit() -> None:
    """An inner scope does not switch the collector on in the outer one's body."""
    gc.enable()
    states = []
    with collective_scope(lockstep_gc=True):
        for lockstep in (True, False):
            with collective_scope(lockstep_gc=lockstep):
                states.append(gc.isenabled())
            states.append(gc.isenabled())
    states.append(gc.isenabled())

    assert [False, False, False, False, True] == states


@pytest.mark.parametrize("failing", [False, True], ids=["ok", "failed"])
@pytest.mark.usefixtures("collected")
def test_lockstep_gc_collects_the_garbage_of_the_body_before_the_cleanups(*, failing: bool) -> None:
    """Objects the body left in cycles, or in frames of its failure, are gone when cleanups run, not before."""
    references: list[weakref.ref[_Thing]] = []

    def litter() -> None:
        thing = _Thing()
        thing.itself = thing  # type: ignore[attr-defined]  # an attribute of its own, for a cycle
        references.append(weakref.ref(thing))
        in_a_frame = _Thing()
        references.append(weakref.ref(in_a_frame))
        # Up to CPython 3.12, that leaves a copy of the locals in the frame.
        assert "in_a_frame" in sys._getframe().f_locals  # noqa: SLF001  (documented; pytest looks at locals, too)
        if failing:
            try:
                raise _BodyError  # noqa: TRY301  (raised into the scope under test)
            except _BodyError as cause:
                msg = "effect"
                raise ValueError(msg) from cause

    seen: list[list[bool]] = []
    with contextlib.suppress(ValueError), collective_scope(lockstep_gc=True) as scope:
        scope.cleanup(lambda: seen.append([reference() is None for reference in references]))
        litter()
        assert references[0]() is not None

    assert [[True, True]] == seen


@pytest.mark.usefixtures("collected", "unlogged")
def test_lockstep_gc_collects_whatever_the_failure_of_the_body_does() -> None:
    """An exception that does not show its members keeps no rank from collecting at the same point as its peers."""
    references: list[weakref.ref[_Thing]] = []
    seen: list[bool] = []
    error = _GroupError("x", [ValueError()])
    with pytest.raises(_GroupError), collective_scope(lockstep_gc=True) as scope:
        scope.cleanup(lambda: seen.append(references[0]() is None))
        thing = _Thing()
        thing.itself = thing  # type: ignore[attr-defined]  # an attribute of its own, for a cycle
        references.append(weakref.ref(thing))
        del thing
        raise error

    assert [True] == seen
