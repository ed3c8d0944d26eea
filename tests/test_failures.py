"""The errors of one rank: the one that surfaces, and those attached to it."""

from __future__ import annotations

import logging
import unittest
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from collective_scope import (
    BarrierTimeoutError,
    CleanupMismatchError,
    CollectiveScopeError,
    Outcome,
    PeerFailedError,
    PeerLostError,
    ScopeMismatchError,
    Verdict,
)
from collective_scope._cleanups import Cleanup
from collective_scope._failures import MOST_LINES, Failures, errors_of


_FAILED = Outcome("body", "ValueError", "no", order=2)
_OK = Verdict("s", 2, (0, 1))


def _failures(*raised: tuple[str, BaseException]) -> Failures:
    failures = Failures()
    for phase, error in raised:
        failures.raised.append((phase, error))
        if phase == "body":
            failures.body = error
    return failures


def _attached(error: BaseException) -> list[type[BaseException]]:
    return [type(each) for each in getattr(error, "collective_scope_errors", ())]


# Surfacing


_PEER = Verdict("s", 2, (0, 1), outcomes={1: _FAILED})
_MISSING = Verdict("s", 2, (0,), (1,), timeout=1.0)


@pytest.mark.parametrize("verdict", [_OK, _PEER, _MISSING, None], ids=["peers-ok", "failed", "missing", "no-verdict"])
@pytest.mark.parametrize("skipped", [False, True], ids=["", "skipped"])
@pytest.mark.parametrize("cleanups", [0, 1, 2], ids=["cleanups-ok", "one-failed", "two-failed"])
@pytest.mark.parametrize("body", [None, ValueError, KeyboardInterrupt], ids=["body-ok", "body-failed", "interrupted"])
def test_surface_is_the_bodys_then_the_cleanups_then_the_peers_and_loses_nothing(
    body: type[BaseException] | None, cleanups: int, *, skipped: bool, verdict: Verdict | None
) -> None:
    """In every combination one error surfaces, unless there is none, and all others are in it or attached to it."""
    own = [("body", body())] if body else []
    failures = _failures(*own, *((f"cleanup '{number}'", OSError(number)) for number in range(cleanups)))
    failures.skipped += [Cleanup(print, "destroy", "t.py:3", collective=True)] if skipped else []
    mine = failures.outcome
    if verdict is not None and not mine.ok:  # this rank's outcome is in the verdict; it was the first
        verdict = attrs.evolve(verdict, outcomes={0: attrs.evolve(mine, order=1), **verdict.outcomes})
    raised = [error for _, error in failures.raised]
    surfaced = failures.surface("s", verdict, 0)

    expected: type[BaseException] | None = None
    if body:
        expected = body
    elif cleanups:
        expected = OSError if cleanups == 1 else ExceptionGroup
    elif verdict is not None and verdict.missing:
        expected = BarrierTimeoutError
    elif verdict is not None and verdict.failures:
        expected = PeerFailedError
    elif skipped:
        expected = CleanupMismatchError
    assert expected is (None if surfaced is None else type(surfaced))
    if surfaced is not None:
        told = [surfaced, *getattr(surfaced, "exceptions", ()), *getattr(surfaced, "collective_scope_errors", ())]
        assert all(error in told for error in raised)
        assert (BarrierTimeoutError in map(type, told)) == (verdict is not None and bool(verdict.missing))
        assert skipped == any("destroy" in text for text in [str(surfaced), *getattr(surfaced, "__notes__", ())])


def test_surface_interrupt_of_a_cleanup_comes_before_ordinary_errors_only() -> None:
    """Ctrl-C in a cleanup surfaces before the body's error, not before the body's own interrupt."""
    interrupt = KeyboardInterrupt()

    for body, expected in ((ValueError(), KeyboardInterrupt), (SystemExit(3), SystemExit)):
        surfaced = _failures(("body", body), ("cleanup 'a'", OSError()), ("cleanup 'b'", interrupt)).surface(
            "s", _OK, 0
        )
        assert expected is type(surfaced)
    assert [ValueError, OSError] == _attached(interrupt)[:2]


def test_surface_earlier_failure_of_a_peer_is_attached_to_this_ranks_own() -> None:
    """On a rank that failed itself, a peer's failure is news only if it came first: it may be the cause."""
    for order, expected in ((1, []), (3, [PeerFailedError])):
        error = ValueError()
        outcomes = {0: attrs.evolve(_FAILED, order=order), 1: attrs.evolve(_FAILED, order=2)}
        assert error is _failures(("body", error)).surface("s", Verdict("s", 2, (0, 1), outcomes=outcomes), 0)
        assert expected == _attached(error)


def test_surface_error_of_an_inner_scope_with_the_same_verdict_is_not_said_twice() -> None:
    """The error of an inner scope that ended with this one says it already."""
    verdict = attrs.evolve(_PEER, outside={1: "s"})
    error = PeerFailedError("text", verdict)
    failures = _failures(("body", error))

    assert error is failures.surface("s", attrs.evolve(verdict, outcomes={1: _FAILED}), 0)
    assert [] == _attached(error)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param({}, [], id="ok"),
        pytest.param({"outcomes": {1: _FAILED}}, [PeerFailedError], id="failed"),
        pytest.param({"arrived": (0,), "missing": (1,)}, [BarrierTimeoutError], id="missing"),
        pytest.param({"arrived": (0,), "lost": (1,)}, [PeerLostError], id="lost"),
        pytest.param({"arrived": (), "missing": (0,), "lost": (1,)}, [PeerLostError], id="lost-before-missing"),
        pytest.param(
            {"arrived": (0,), "missing": (1,), "names": {0: "s", 1: "t"}}, [ScopeMismatchError], id="mismatch"
        ),
        pytest.param({"cleanups": {0: (("a", ""),), 1: ()}}, [CleanupMismatchError], id="cleanups"),
        pytest.param(
            {"outcomes": {1: _FAILED}, "cleanups": {0: (("a", ""),), 1: ()}},
            [PeerFailedError, CleanupMismatchError],
            id="failed-and-cleanups",
        ),
        pytest.param(
            {"arrived": (0,), "missing": (1,), "outcomes": {1: _FAILED}},
            [BarrierTimeoutError, PeerFailedError],
            id="failed-and-missing",
        ),
        pytest.param(
            {"arrived": (0,), "missing": (1,), "outcomes": {1: _FAILED}, "outside": {1: "outer"}},
            [PeerFailedError],
            id="failed-around-it",
        ),
        pytest.param(
            {"outcomes": {1: _FAILED}, "reason": "rank 1 stopped waiting"}, [PeerFailedError], id="peer-interrupted"
        ),
        pytest.param({"arrived": (0,), "missing": (1,), "reason": "no store"}, [BarrierTimeoutError], id="no-store"),
    ],
)
def test_errors_of_a_verdict_are_what_it_says_the_most_important_first(
    facts: dict[str, Any], expected: list[type[CollectiveScopeError]]
) -> None:
    """Each kind of trouble is an error of its own kind, and each has the verdict."""
    verdict = Verdict(**{"scope": "s", "world_size": 2, "arrived": (0, 1), **facts})
    errors = errors_of(verdict, 0)

    assert expected == [type(error) for error in errors]
    assert all(error.verdict is verdict for error in errors)
    assert bool(errors) == (not verdict.ok)


# Reports to peers


def test_outcome_is_the_first_error_and_a_bounded_list_of_the_later_ones() -> None:
    """Peers learn of the first error in full, of some later ones in a line each, and how many more there are."""
    later = [(f"cleanup '{number}'", OSError(number)) for number in range(100)]
    outcome = _failures(("body", ValueError("first")), *later).outcome

    assert ("body", "ValueError", "first") == (outcome.phase, outcome.type_name, outcome.message)
    assert "cleanup '0': OSError: 0" == outcome.also[0]
    assert (MOST_LINES + 1, f"and {100 - MOST_LINES} more") == (len(outcome.also), outcome.also[-1])


# Attached errors


def test_attach_to_an_exception_that_many_scopes_raise_stays_bounded() -> None:
    """An exception object that is raised again and again does not grow without end."""
    error = ValueError("the same")
    for number in range(600):
        failures = _failures(("body", error), (f"cleanup '{number}'", OSError(number)))
        assert error is failures.surface("s", attrs.evolve(_PEER, outcomes={1: attrs.evolve(_FAILED, order=1)}), 0)

    assert 0 < len(error.__notes__) <= 2 * MOST_LINES
    assert sum(map(len, error.__notes__)) < 10_000
    assert 0 < len(_attached(error)) <= 2 * MOST_LINES


class _NoAttributesError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        msg = f"no {name}"
        raise AttributeError(msg)


@attrs.frozen
class _FrozenError(Exception):
    code: int = 3


class _PeevishError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        msg = f"no {name}"
        raise ValueError(msg)


class _NotesError(Exception):
    @property
    def __notes__(self) -> list[str]:
        msg = "no notes"
        raise LookupError(msg)


class _MappingError(Exception):
    def __getattr__(self, name: str) -> object:
        raise KeyError(name)


_odd = pytest.mark.parametrize(
    "kind",
    [_NoAttributesError, _FrozenError, _PeevishError, _NotesError, _MappingError],
    ids=lambda kind: kind.__name__,
)


@_odd
@pytest.mark.parametrize("phase", ["body", "cleanup 'a'"])
def test_surface_of_an_exception_with_ideas_of_its_own_is_that_and_the_rest_is_logged(
    phase: str, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """Where an exception class forbids what others allow, it surfaces all the same, and the log has the rest."""
    error = kind()
    failures = _failures((phase, error))
    failures.skipped.append(Cleanup(print, "destroy", "t.py:3"))

    assert error is failures.surface("s", _OK, 0)
    assert "cleanup 'destroy' (registered at t.py:3)" in caplog.text + "".join(vars(error).get("__notes__", ()))


# The log


class _Raises(logging.Handler):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002  (given to every handler)
        raise self.error


@pytest.fixture(name="handle")
def _handle() -> Any:
    handlers: list[logging.Handler] = []
    logger = logging.getLogger("collective_scope")

    def add(handler: logging.Handler) -> None:
        handlers.append(handler)
        logger.addHandler(handler)

    yield add
    for handler in handlers:
        logger.removeHandler(handler)


@_odd
def test_log_that_is_broken_never_raises_whatever_the_exception(
    kind: type[Exception], handle: Callable[[logging.Handler], None]
) -> None:
    """A handler that raises costs a note at most; an exception that takes no notes costs nothing."""
    error = kind()
    handle(_Raises(OSError("no space left")))
    failures = _failures(("body", error))

    failures.log("body", error, scope="s", rank=0, world_size=2)

    assert error is failures.surface("s", _OK, 0)


def test_log_that_is_broken_leaves_a_note(handle: Callable[[logging.Handler], None]) -> None:
    """An error that could not be logged says so in a note."""
    error = ValueError()
    handle(_Raises(OSError("no space left")))
    _failures().log("body", error, scope="s", rank=0, world_size=2)

    assert ["This could not be logged: OSError: no space left"] == error.__notes__


@pytest.mark.parametrize(
    ("error", "level"),
    [
        pytest.param(ValueError("no"), logging.ERROR, id="error"),
        pytest.param(KeyboardInterrupt(), logging.ERROR, id="interrupt"),
        pytest.param(pytest.skip.Exception("no GPU"), logging.INFO, id="pytest-skip"),
        pytest.param(unittest.SkipTest("no GPU"), logging.INFO, id="unittest-skip"),
    ],
)
def test_log_of_a_failure_has_its_facts_as_fields_and_a_skip_is_no_error(
    error: BaseException, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Log pipelines find rank, scope and phase without parsing text."""
    caplog.set_level(logging.INFO, "collective_scope")
    _failures().log("cleanup 'a'", error, scope="s", rank=1, world_size=2)
    (record,) = caplog.records

    assert (level, 1, "s", "cleanup 'a'") == tuple(
        getattr(record, each) for each in ("levelno", "rank", "scope", "phase")
    )
    assert record.exc_info is not None
    assert error is record.exc_info[1]
