"""A world of one behaves like `contextlib.ExitStack` where a scope promises nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import attrs
from hypothesis import event, given, settings
from hypothesis import strategies as st

from collective_scope import collective_scope


class _ProgramError(Exception):
    pass


@attrs.frozen
class _Step:
    """One registration, and what the registered thing does when its turn comes."""

    kind: Literal["callback", "context"]
    fails: bool
    registers: tuple[_Step, ...] = ()


_steps = st.recursive(
    st.builds(_Step, kind=st.sampled_from(["callback", "context"]), fails=st.booleans()),
    lambda steps: st.builds(
        _Step,
        kind=st.sampled_from(["callback", "context"]),
        fails=st.booleans(),
        registers=st.lists(steps, max_size=3).map(tuple),
    ),
    max_leaves=8,
)
_programs = st.tuples(st.lists(_steps, max_size=6), st.booleans())


@attrs.define
class _Run:
    """The events of one run of a program."""

    log: list[Any] = attrs.field(factory=list)
    raised: list[BaseException] = attrs.field(factory=list)

    def fail(self, place: str) -> None:
        error = _ProgramError(place)
        self.raised.append(error)
        raise error


@attrs.define
class _Context(contextlib.AbstractContextManager[str]):
    """A context manager that notes what it sees."""

    run: _Run
    place: str
    leave: Callable[[], None]

    def __enter__(self) -> str:
        self.run.log.append(("enter", self.place))
        return self.place

    def __exit__(self, *exc: object) -> None:
        kind, error, trace = exc
        assert (kind is None) == (error is None) == (trace is None)
        # A scope shows the first error, an ExitStack the latest one: alike only while there is no other.
        seen = str(error) if len(self.run.raised) < 2 else "may differ"
        self.run.log.append(("exit", self.place, seen))
        self.leave()


def _play(
    program: tuple[list[_Step], bool],
    stack: Any,
    register: Callable[..., Any],
) -> tuple[_Run, BaseException | None]:
    steps, body_fails = program
    run = _Run()

    def add(step: _Step, place: str) -> None:
        def called(*args: Any, **kwargs: Any) -> None:
            if step.kind == "callback":
                run.log.append(("call", place, args, kwargs))
            for i, each in enumerate(step.registers):
                add(each, f"{place}.{i}")
            if step.fails:
                run.fail(place)

        if step.kind == "context":
            assert place == stack.enter_context(_Context(run, place, called))
        else:
            assert called is register(called, place, key=place)

    caught = None
    try:
        with stack:
            for i, step in enumerate(steps):
                add(step, str(i))
            run.log.append("body")
            if body_fails:
                run.fail("body")
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        caught = error
    return run, caught


@settings(max_examples=200)
@given(_programs)
def test_scope_alone_runs_any_program_like_an_exit_stack(program: tuple[list[_Step], bool]) -> None:
    """Order, arguments, what is registered meanwhile, and what context managers see are those of an `ExitStack`."""
    stack = contextlib.ExitStack()
    reference, reference_error = _play(program, stack, stack.callback)
    scope = collective_scope(name="s")
    ours, error = _play(program, scope, scope.cleanup)
    event(f"errors: {min(3, len(ours.raised))}")

    assert reference.log == ours.log
    assert list(map(str, reference.raised)) == list(map(str, ours.raised))
    assert (reference_error is None) == (error is None)
    if len(ours.raised) == 1:
        assert error is ours.raised[0]
        assert str(reference_error) == str(error)
    elif ours.raised:
        # Here a scope differs on purpose: the body's error surfaces, or all of the cleanups'.
        told = getattr(error, "collective_scope_errors", ()) if program[1] else error.exceptions  # type: ignore[union-attr]  # a group, in that program
        assert ours.raised == [*([error] if program[1] else []), *told]
    assert scope.verdict is not None
    assert scope.verdict.ok == (not ours.raised)


def test_scope_alone_with_ten_thousand_cleanups_does_not_overflow() -> None:
    """The number of cleanups is not limited by the depth of the interpreter's stack."""
    calls: list[int] = []
    with collective_scope() as scope:
        for i in range(10_000):
            scope.cleanup(calls.append, i)

    assert list(range(9_999, -1, -1)) == calls
