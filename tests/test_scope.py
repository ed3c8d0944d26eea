"""The life of a scope on one rank: order, what surfaces, what stays behind."""

# ruff: noqa: PT012  (it is the end of a block that raises)

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import threading
import unittest
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest

from collective_scope import (
    CollectiveScope,
    CollectiveScopeError,
    PeerFailedError,
    Verdict,
    _barrier,
    _scope,
    collective_scope,
    current_scope,
)
from collective_scope._outcome import Outcome, Record
from tests.ranks import Sequencer
from tests.stores import PATIENCE_S, barriers_as_groups, meet


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
    """What a cleanup registers still runs: at once if local, after the barrier if for then."""

    def register() -> None:
        calls.append("registers")
        scope.cleanup(calls.append, "registered")
        scope.after_barrier(scope.after_barrier, calls.append, "after, registered after")

    with collective_scope() as scope:
        scope.cleanup(calls.append, "bottom")
        scope.cleanup(register)

    assert ["registers", "registered", "bottom", "after, registered after"] == calls


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


@pytest.mark.parametrize("method", ["cleanup", "collective_cleanup", "after_barrier"])
def test_cleanup_that_nobody_would_await_is_refused(method: str) -> None:
    """A coroutine function would do nothing, and not say so."""
    with (
        collective_scope() as scope,
        pytest.raises(TypeError, match=r"cannot be a coroutine function \(got _never_awaited\)"),
    ):
        getattr(scope, method)(_never_awaited)


def test_scope_cleanups_that_are_no_list_are_refused() -> None:
    """One function in place of a list of them is named."""
    with pytest.raises(TypeError, match=r"^cleanups must be a list of functions \(got <built-in function print>\)$"):
        collective_scope(cleanups=print)  # type: ignore[arg-type]


def test_scope_fingerprint_that_cannot_be_called_is_refused() -> None:
    """A fingerprint is a function: it is asked in the teardown, not at the registration."""
    with pytest.raises(TypeError, match=r"^fingerprint must be callable \(got 3\)$"):
        collective_scope().collective_cleanup(print, fingerprint=3)  # type: ignore[arg-type]


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
    """What would never run or be released is refused."""
    with collective_scope(name="s") as scope:
        pass

    with pytest.raises(RuntimeError, match=r"^scope 's' has been left; nothing can be registered any more$"):
        register(scope)


def test_scope_registration_before_the_entry_counts(calls: list[str]) -> None:
    """What is registered before the `with` runs in its teardown."""
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


def test_enter_context_of_something_else_is_refused() -> None:
    """What is no context manager is refused, and nothing of it is called."""
    with (
        pytest.raises(TypeError, match=r"^enter_context\(\) takes a context manager \(got 3\)$"),
        collective_scope() as scope,
    ):
        scope.enter_context(3)  # type: ignore[arg-type]


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
        collective_scope(name=3)  # type: ignore[arg-type]


def test_scope_verdict_comes_with_the_exit() -> None:
    """There is no verdict before the exit; after it, it says what this rank did."""
    with collective_scope(name="s") as scope:
        assert scope.verdict is None

    assert ("s", 0, 1, "exit", {0: Outcome()}) == (
        _verdict(scope).scope,
        _verdict(scope).sequence,
        _verdict(scope).world_size,
        _verdict(scope).stage,
        _verdict(scope).outcomes,
    )


# Times


class _Times:
    """A group that notes what a scope waits at most."""

    rank, world_size, in_step, scopes, rounds = 0, 1, True, 0, 0

    def __init__(self) -> None:
        self.seen: tuple[float, ...] | None = None

    def greet(self) -> None:
        """Have no peers."""

    def arrive(self, mine: Record, **times: float) -> Verdict:
        self.seen = tuple(times[name] for name in ("timeout", "failure_timeout", "heartbeat_timeout", "warn_after"))
        return Verdict(mine.scope, mine.sequence, 1, mine.stage)


def _times(monkeypatch: pytest.MonkeyPatch, **times: Any) -> tuple[float, ...] | None:
    group = _Times()
    monkeypatch.setattr(_scope, "find_barrier", lambda _: (group, None))
    with collective_scope(**times):
        pass
    return group.seen


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        pytest.param({}, {}, (300.0, 30.0, 30.0, 10.0), id="default"),
        pytest.param(
            {"timeout": 2, "failure_timeout": 1.5, "heartbeat_timeout": 4, "warn_after": 1},
            {},
            (2.0, 1.5, 4.0, 1.0),
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
    expected: tuple[float, ...],
) -> None:
    """An argument counts before the environment, and that before the default."""
    for name in ("TIMEOUT", "FAILURE_TIMEOUT", "HEARTBEAT_TIMEOUT", "WARN_AFTER"):
        monkeypatch.delenv(f"COLLECTIVE_SCOPE_{name}", raising=False)
        if name in environment:
            monkeypatch.setenv(f"COLLECTIVE_SCOPE_{name}", environment[name])

    assert expected == _times(monkeypatch, **arguments)


@pytest.mark.parametrize("parameter", ["timeout", "failure_timeout", "heartbeat_timeout", "warn_after", "deadline"])
@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        pytest.param(0, ValueError, "must be positive and finite (got 0)", id="zero"),
        pytest.param(-1.5, ValueError, "must be positive and finite (got -1.5)", id="negative"),
        pytest.param(float("inf"), ValueError, "must be positive and finite (got inf)", id="infinite"),
        pytest.param(float("nan"), ValueError, "must be positive and finite (got nan)", id="nan"),
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


# What surfaces


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
    assert (first, second) == body.collective_scope_errors  # type: ignore[attr-defined]
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
    assert tuple(each for each in (body, other) if each is not None) == interrupt.collective_scope_errors  # type: ignore[attr-defined]


def test_scope_interrupt_in_the_body_stays_before_one_in_a_cleanup() -> None:
    """The first interrupt is the one that surfaces."""
    first, second = KeyboardInterrupt(), SystemExit(3)
    with pytest.raises(KeyboardInterrupt) as caught, collective_scope() as scope:
        scope.cleanup(_raise, second)
        raise first

    assert first is caught.value
    assert (second,) == first.collective_scope_errors  # type: ignore[attr-defined]


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

    assert (inner_error, outer_error) == body.collective_scope_errors  # type: ignore[attr-defined]
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
    assert (later,) == body.collective_scope_errors  # type: ignore[attr-defined]
    assert "<its str() raised LookupError>" == _verdict(scope).failures[0].message


@pytest.mark.usefixtures("collected", "unlogged")
def test_scope_refused_at_entry_is_left_and_keeps_nothing() -> None:
    """A scope whose body was refused has been left: what it held, and its error, can go; it cannot be entered."""

    def enter(scope: CollectiveScope, references: list[weakref.ref[Any]]) -> None:
        try:
            with scope:
                pass
        except CollectiveScopeError as error:
            references.append(weakref.ref(error))

    def run(rank: int, barrier: Any, sequencer: Sequencer) -> Any:
        if rank == 1:
            sequencer.wait_for("rank 0 has given up")
            return None
        references: list[weakref.ref[Any]] = []
        first, second = (collective_scope(barrier, timeout=0.1) for _ in range(2))
        thing = second.hold(_Thing())
        references.append(weakref.ref(thing))
        del thing
        enter(first, references)
        enter(second, references)
        sequencer.announce("rank 0 has given up")
        with pytest.raises(RuntimeError):
            second.__enter__()
        return [reference() for reference in references]

    with barriers_as_groups():
        gc.collect()
        gc.disable()
        kept = meet(2, run)[0]

    assert [None, None, None] == kept


# An interrupt at the wrong moment


@pytest.mark.parametrize(("module", "name"), [(_scope, "Record"), (_barrier, "me")], ids=["before-it", "in-it"])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__)
def test_scope_interrupt_on_the_way_to_the_barrier_does_not_keep_a_rank_from_it(
    module: ModuleType, name: str, interrupt: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the last cleanup, before the rank has arrived, is told to the peers like one in the body."""
    function, due = getattr(module, name), threading.local()

    def call(*args: Any) -> Any:
        # Where a signal's handler would run.
        if getattr(due, "is_now", False):
            due.is_now = False
            raise interrupt
        return function(*args)

    monkeypatch.setattr(module, name, call)

    def make_due(rank: int) -> None:
        due.is_now = rank == 1

    def run(rank: int, barrier: Any, _: Sequencer) -> tuple[Any, ...]:
        scope = collective_scope(barrier)
        with pytest.raises((type(interrupt), PeerFailedError)) as caught, scope:
            scope.cleanup(make_due, rank)
        with collective_scope(barrier) as after:
            pass
        return caught.type, scope.verdict, _verdict(after).ok

    with barriers_as_groups():
        (raised, verdict, is_ok), mine = meet(2, run)

    assert (PeerFailedError, True) == (raised, is_ok)
    assert (type(interrupt), verdict, True) == mine
    assert {1: ("barrier", type(interrupt).__name__)} == {
        rank: (o.phase, o.type_name) for rank, o in verdict.failures.items()
    }
    assert verdict.complete


def test_scope_error_on_the_way_to_the_barrier_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no interrupt would be raised again and again."""
    process, calls = _barrier.me(), itertools.count(1)  # type: ignore[attr-defined]  # imported there

    def call() -> Any:
        if next(calls) == 1:
            msg = "no /proc"
            raise OSError(msg)
        return process

    monkeypatch.setattr(_barrier, "me", call)
    with pytest.raises(OSError, match="no /proc"), collective_scope():
        pass

    assert 2 == next(calls)


# No cycles


@pytest.mark.parametrize("failing", ["nothing", "body", "cleanup", "two cleanups", "interrupt in a cleanup", "peer"])
@pytest.mark.usefixtures("collected", "unlogged")
def test_scope_left_on_any_path_leaves_no_reference_cycle(failing: str) -> None:
    """When the error and the scope are dropped they go at once, without the cyclic collector."""

    class Watched(Exception):  # noqa: N818
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
                    raise PeerFailedError(failing, Verdict("s", 0, 2))  # noqa: TRY301
        except BaseException as error:  # noqa: BLE001
            assert type(error).__name__ in {  # noqa: PT017
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

    def run(rank: int, barrier: Any, _: Sequencer) -> None:
        thing = _Thing()
        references.append(weakref.ref(thing))
        try:
            with collective_scope(barrier) as scope:
                references.append(weakref.ref(scope))
                if rank == 1:
                    raise _BodyError  # noqa: TRY301
        except (_BodyError, PeerFailedError) as error:
            references.append(weakref.ref(error))

    with barriers_as_groups():
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
    assert caplog.messages[0].startswith("rank 0 of 1 failed in scope 's', body")
    assert caplog.records[0].exc_info is not None
    assert _BodyError is caplog.records[0].exc_info[0]


def test_scope_failure_is_logged_before_peers_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """The log has the traceback while the peers have not arrived yet."""

    def run(rank: int, barrier: Any, sequencer: Sequencer) -> None:
        with contextlib.suppress(_BodyError, PeerFailedError), collective_scope(barrier, name="s") as scope:
            if rank == 1:
                scope.cleanup(lambda: sequencer.announce(f"{len(caplog.records)} records"))
                raise _BodyError
            sequencer.wait_for("1 records")

    with barriers_as_groups():
        meet(2, run)

    assert ["rank 1 of 2 failed in scope 's', body"] == [message.split(";")[0] for message in caplog.messages]


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

    assert ["rank 0 of 1 failed in scope 'inner', body"] == [message.split(";")[0] for message in caplog.messages]


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
    """What the body left in cycles, or in the frames of its failure, is gone when cleanups run; not before."""
    references: list[weakref.ref[_Thing]] = []

    def litter() -> None:
        thing = _Thing()
        thing.itself = thing  # type: ignore[attr-defined]
        references.append(weakref.ref(thing))
        in_a_frame = _Thing()
        references.append(weakref.ref(in_a_frame))
        if failing:
            try:
                raise _BodyError  # noqa: TRY301
            except _BodyError as cause:
                msg = "effect"
                raise ValueError(msg) from cause

    seen: list[list[bool]] = []
    with contextlib.suppress(ValueError), collective_scope(lockstep_gc=True) as scope:
        scope.cleanup(lambda: seen.append([reference() is None for reference in references]))
        litter()
        assert references[0]() is not None

    assert [[True, True]] == seen


# A communicator's own barrier


@pytest.fixture(name="as_process_groups")
def _as_process_groups() -> Iterator[None]:
    """Let barriers pass for process groups, whose communicator the tests bring along."""
    with barriers_as_groups(), pytest.MonkeyPatch.context() as patch:
        find_barrier = _scope.find_barrier  # type: ignore[attr-defined]

        def find(group: Any) -> Any:
            found = find_barrier(group)
            return found and (found[0], ("the process group", "its store"))

        patch.setattr(_scope, "find_barrier", find)
        yield


@pytest.mark.usefixtures("as_process_groups")
def test_group_barrier_that_does_not_open_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A communicator that is out of step is an error after the timeout, not a hang."""
    monkeypatch.setattr(_scope, "group_barrier", lambda _: lambda: False)

    def run(_: int, barrier: Any, __: Sequencer) -> list[str]:
        with pytest.raises(TimeoutError) as caught, collective_scope(barrier, timeout=2.0, group_barrier=True) as scope:
            pass
        return [str(caught.value), _verdict(scope).failures[0].phase]

    assert [["the group's own barrier did not open within 2.0 s", "cleanup 'dist.barrier of the group'"]] * 2 == meet(
        2, run
    )


@pytest.mark.usefixtures("as_process_groups")
def test_group_barrier_is_polled_after_all_cleanups_until_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The communicator's barrier is the last thing before the scope's own opens."""
    log: dict[Any, list[str]] = {}

    def start(_: Any) -> Callable[[], bool]:
        mine = log[threading.current_thread()]
        mine.append("starts")

        def opened() -> bool:
            mine.append("asks")
            return mine.count("asks") == 3

        return opened

    monkeypatch.setattr(_scope, "group_barrier", start)

    def run(_: int, barrier: Any, __: Sequencer) -> list[str]:
        mine = log.setdefault(threading.current_thread(), [])
        with collective_scope(barrier, group_barrier=True, cleanups=[lambda: mine.append("given")]) as scope:
            scope.after_barrier(mine.append, "after")
            scope.collective_cleanup(mine.append, "collective")
        return mine

    assert [["collective", "given", "starts", "asks", "asks", "asks", "after"]] * 2 == meet(2, run)


@pytest.mark.usefixtures("as_process_groups")
def test_group_barrier_is_left_out_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure nobody enters the communicator's barrier: a peer may be stuck there."""
    started: list[int] = []

    def start(_: Any) -> Callable[[], bool]:
        started.append(1)
        return lambda: True

    monkeypatch.setattr(_scope, "group_barrier", start)

    def run(rank: int, barrier: Any, __: Sequencer) -> str:
        with pytest.raises((_BodyError, PeerFailedError)) as caught, collective_scope(barrier, group_barrier=True):
            if rank == 1:
                raise _BodyError
        return caught.type.__name__

    assert ["PeerFailedError", "_BodyError"] == meet(2, run)
    assert [] == started
