"""One subtest of a loop: a block that runs in a scope, or is left out, and whose failure is kept."""

from __future__ import annotations

import dis
import inspect
import re
import sys
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import attrs

from ._api import collective_scope
from ._failures import clear_frames
from ._scope import CollectiveScope
from ._subtest_result import SubtestResult, ends_loop, judge_subtest, told
from .agreement.clock import monotonic
from .agreement.text import message_of, type_name


if TYPE_CHECKING:
    from ._subtests import Subtests


class _NotRun(BaseException):
    """Raised in the place of a body that does not run."""


class Subtest:
    """One subtest, as `Subtests.test` returns it: a block that runs in a scope, and whose failure is kept."""

    def __init__(self, subtests: Subtests, id: str) -> None:  # noqa: A002  (as in Subtests.test)
        self.result = SubtestResult(id)
        self._subtests = subtests
        self._scope: CollectiveScope | None = None
        self._traced: tuple[Any, Any, bool] = (None, None, False)
        """The tracers of the process and of the frame with the block, before the block was left out."""

    @property
    def scope(self) -> CollectiveScope:
        """
        The scope of this subtest.

        Raises:
            RuntimeError: If it is not running.
        """
        if self._scope is None:
            msg = f"subtest {self.result.id!r} is not running"
            raise RuntimeError(msg)
        return self._scope

    def __enter__(self) -> Self:
        frame = sys._getframe(1)  # noqa: SLF001  (documented)
        self.result.began = monotonic()
        why = self._subtests._why_not()  # noqa: SLF001  (a part of it)
        if why:
            self.result.status, self.result.reason = "not run", why
        else:
            self._enter(frame.f_code)
        if self._scope is None:
            if self._note() and self.result.error is not None:
                raise self.result.error
            if not _is_at_plain_with(frame):
                msg = (
                    f"subtest {self.result.id!r} does not run ({self.result.reason}), and only the block of a 'with'"
                    " statement, of a function without yield, can be left out; use subtests.run(id, fn) here"
                )
                raise RuntimeError(msg)
            self._skip_block(frame)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        if self._scope is None:
            frame = sys._getframe(1)  # noqa: SLF001  (documented)
            tracer, frame.f_trace, frame.f_trace_opcodes = self._traced
            sys.settrace(tracer)
            return isinstance(error, _NotRun)
        raised = self._leave(kind, error, tb)
        if not self._note():
            return True
        if raised is not None and raised is not error:
            raise raised
        return False

    def _enter(self, body: CodeType) -> None:
        """Enter the scope; if that is refused, note why."""
        result = self.result
        self._subtests._running = result.id  # noqa: SLF001  (a part of it)
        scope = collective_scope(self._subtests._group, name=result.id, **self._subtests._options)  # noqa: SLF001  (a part of it)
        scope._options = attrs.evolve(scope._options, history=result.history)  # noqa: SLF001  (a scope is a part of this package)
        try:
            scope.__enter__()
            scope._body, self._scope = body, scope  # noqa: SLF001  (a scope is a part of this package)
        except BaseException as refusal:
            result.error, result.verdict = refusal, scope.verdict
            result.status, result.reason = judge_subtest(refusal, scope.verdict)
            if result.status == "failed":
                result.status, result.reason = "not run", _why_refused(result, refusal)

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> BaseException | None:
        """Leave the scope; keep what became of the subtest; return what this rank raises."""
        scope = self.scope
        try:
            scope.__exit__(kind, error, tb)
        except BaseException as raised:
            error = raised
        self._scope = None
        self.result.error, self.result.verdict = error, scope.verdict
        self.result.status, self.result.reason = judge_subtest(error, scope.verdict)
        return error

    def _note(self) -> bool:
        """
        Have the loop know the result; return whether it ends the loop.

        If the loop goes on, the error is kept, and the frames that it came through must not keep a dead group alive,
        with its connections, nor memory of a device.
        """
        result, verdict = self.result, self.result.verdict
        result.seconds = monotonic() - result.began
        result.waited = 0.0 if verdict is None or verdict.complete else verdict.timeout
        self._subtests._note(result)  # noqa: SLF001  (a part of it)
        is_end = ends_loop(result.error, verdict)
        if not is_end:
            clear_frames(result.error)
        return is_end

    def _skip_block(self, frame: FrameType) -> None:
        """Have the block of the ``with`` statement in *frame* end before it begins; there is no other way to leave it out."""

        def raise_at_once(frame: FrameType, event: str, arg: object) -> NoReturn:  # noqa: ARG001  (given to all)
            raise _NotRun

        self._traced = sys.gettrace(), frame.f_trace, frame.f_trace_opcodes
        sys.settrace(lambda *_: None)
        frame.f_trace, frame.f_trace_opcodes = raise_at_once, True


def _is_at_plain_with(frame: FrameType) -> bool:
    """
    Whether *frame* is at a ``with`` statement whose block can be left out.

    ``ExitStack.enter_context()`` and others call ``__enter__`` themselves, in a frame that has no block. A
    generator is expected to yield.
    """
    code, at = frame.f_code, frame.f_lasti
    # Up to CPython 3.13, one instruction enters; after that, the method is loaded, and called.
    names = dis.opname[code.co_code[at]], dis.opname[code.co_code[at - 2]]
    is_with = names[0] == "BEFORE_WITH" or names[1] == "LOAD_SPECIAL"
    return is_with and not code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)


def _why_refused(result: SubtestResult, refusal: BaseException) -> str:
    """Say in a line why the body does not run, the same for all subtests that follow."""
    if result.cause is not None:
        return told(*result.cause)
    head = (message_of(refusal) or type_name(refusal)).splitlines()[0]
    return re.sub(r" after [\d.]+ s", "", head.replace(f" at the entry of scope {result.id!r}", ""))
