"""Errors of a scope: the tree, the facts as attributes, pickles."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import collective_scope
from collective_scope import (
    BarrierTimeoutError,
    CleanupMismatchError,
    CollectiveScopeError,
    Outcome,
    PeerFailedError,
    PeerLostError,
    RevokedInterrupt,
    ScopeMismatchError,
    Verdict,
    exceptions,
)


_VERDICT = Verdict(
    scope="ep4",
    world_size=4,
    arrived=(0, 1),
    missing=(2,),
    lost=(3,),
    outcomes={0: Outcome(), 1: Outcome("body", "ValueError", "no", "Traceback ...", 1)},
    names={0: "ep4", 1: "other"},
    cleanups={0: (("destroy", "2"),), 1: ()},
    timeout=1.5,
)

_CLASSES = [PeerFailedError, BarrierTimeoutError, PeerLostError, ScopeMismatchError, CleanupMismatchError]
_each_class = pytest.mark.parametrize("cls", _CLASSES, ids=lambda cls: cls.__name__)


@_each_class
def test_exception_class_derives_from_the_base(cls: type[CollectiveScopeError]) -> None:
    """One except clause catches all of ours, as ordinary exceptions."""
    assert issubclass(cls, CollectiveScopeError)
    assert issubclass(cls, Exception)
    assert cls.__bases__ == (CollectiveScopeError,)


@_each_class
def test_exception_module_is_the_package(cls: type[CollectiveScopeError]) -> None:
    """Reports name the class by the path from which users import it."""
    assert "collective_scope" == cls.__module__ == CollectiveScopeError.__module__
    assert cls is getattr(collective_scope, cls.__name__)


@_each_class
def test_exception_docstring_says_when_it_is_raised(cls: type[CollectiveScopeError]) -> None:
    """Each class says in its first words when it is raised, and is in the tree at the top of the module."""
    assert (inspect.getdoc(cls) or "").startswith("Raised ")
    assert f"  + {cls.__name__} " in (exceptions.__doc__ or "")


def test_exceptions_all_lists_the_whole_tree() -> None:
    """The module exports its classes, no more and no less."""
    assert exceptions.__all__ == sorted(cls.__name__ for cls in [CollectiveScopeError, RevokedInterrupt, *_CLASSES])


@pytest.mark.parametrize(
    ("cls", "attribute", "value"),
    [
        pytest.param(PeerFailedError, "failures", {1: _VERDICT.outcomes[1]}, id="failures"),
        pytest.param(BarrierTimeoutError, "missing", (2,), id="missing"),
        pytest.param(BarrierTimeoutError, "timeout", 1.5, id="timeout"),
        pytest.param(PeerLostError, "lost", (3,), id="lost"),
        pytest.param(ScopeMismatchError, "names", {0: "ep4", 1: "other"}, id="names"),
        pytest.param(CleanupMismatchError, "cleanups", {0: (("destroy", "2"),), 1: ()}, id="cleanups"),
    ],
)
def test_exception_facts_are_attributes(cls: type[CollectiveScopeError], attribute: str, value: Any) -> None:
    """The facts in a message can be had without reading it."""
    assert value == getattr(cls("text", _VERDICT), attribute)


@_each_class
@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(lambda error: pickle.loads(pickle.dumps(error)), id="pickle"),
        pytest.param(lambda error: pickle.loads(pickle.dumps(error, 2)), id="pickle-protocol-2"),
        pytest.param(copy.copy, id="copy"),
        pytest.param(copy.deepcopy, id="deepcopy"),
    ],
)
def test_exception_copy_keeps_text_verdict_and_notes(
    cls: type[CollectiveScopeError], copied: Callable[[CollectiveScopeError], CollectiveScopeError]
) -> None:
    """An error survives the way between processes with all that it says."""
    error = cls("line one\nline two", _VERDICT)
    error.add_note("a note")
    error.collective_scope_errors = (PeerFailedError("another", _VERDICT),)  # type: ignore[attr-defined]  # as a scope sets it
    again = copied(error)

    assert type(error) is type(again)
    assert (str(error), error.verdict, ["a note"]) == (str(again), again.verdict, again.__notes__)
    assert ["another"] == [str(each) for each in again.collective_scope_errors]  # type: ignore[attr-defined]  # as a scope sets it
    assert repr(error) == repr(again)
