"""The scope: its life cycle, and its use as a decorator."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from types import CodeType, TracebackType
from typing import Any, Never, ParamSpec, Self, TypeVar, overload

import attrs

from . import _groups, _report
from ._cleanups import describe
from ._failures import errors_of
from ._kill import Killer, end
from ._registry import kind_of_function
from ._speaker import Speaker
from ._teardown import Teardown
from .agreement.process import Place, me
from .agreement.records import Outcome
from .agreement.revocation import Revocation
from .agreement.rounds import cap, path_of
from .agreement.watch import Span
from .exceptions import RevokedInterrupt


P = ParamSpec("P")
T = TypeVar("T")

_NO_FUNCTION: Any = None
_RAISE: Any = object()

__tracebackhide__ = True
"""Where pytest leaves frames out: between the line with the scope and the line that failed, these tell nothing."""

_current: ContextVar[CollectiveScope | None] = ContextVar("collective_scope", default=None)


@overload
def current_scope() -> CollectiveScope: ...


@overload
def current_scope(default: T) -> CollectiveScope | T: ...


def current_scope(default: Any = _RAISE) -> Any:
    """
    Return the innermost scope whose body is running here.

    Args:
        default: What to return if there is none.

    Raises:
        RuntimeError: If there is none, and no *default*.
    """
    scope = _current.get()
    if scope is not None:
        return scope
    if default is _RAISE:
        msg = "current_scope() was called outside of the body of a scope"
        raise RuntimeError(msg)
    return default


@attrs.define(eq=False, repr=False, kw_only=True, on_setattr=attrs.setters.NO_OP)
class CollectiveScope(Teardown):
    """
    What `collective_scope` returns. Guards one ``with`` block, or any number of calls of a function.

    Attributes:
        name: What the scope is called in messages.

        verdict:
            After the exit: what every rank did, the same on every rank. None
            before it, and if this rank was interrupted at the barrier.
    """

    _is_named: bool
    """Whether the name was given, so that a decorated function does not give its own."""
    _body: CodeType | None = None
    """The code that the body is; that of the caller of ``__enter__`` if not given."""
    _pid: int = attrs.field(default=0, init=False)
    _thread: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        for fn in self._given:
            self._register(self._cleanups, fn, (), {})

    def __repr__(self) -> str:
        return f"<CollectiveScope {self.name!r}, {self._state}, cleanups={len(self._cleanups)}>"

    def __del__(self) -> None:
        # Not if the constructor refused an argument.
        if getattr(self, "_state", "") == "new" and len(self._cleanups) + len(self._after) > len(self._given):
            text = f"scope {self.name!r} ({self._where}) was never entered; its cleanups did not run"
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)

    # The decorator.

    def __call__(self, fn: Callable[P, T] = _NO_FUNCTION, /, *others: Never, **named: Never) -> Callable[P, T]:
        """
        Wrap *fn* so that each call runs in a fresh scope like this one.

        Raises:
            TypeError: If *fn* is a class, a coroutine function, a generator function, or no function.
            RuntimeError: If cleanups were registered on this scope: they would run for no call.
        """
        # Of @collective_scope without parentheses, the calls of the function arrive here, whatever its arguments.
        if not callable(fn) or others or named:
            msg = f"collective_scope() decorates functions (got {fn!r}); did you forget the parentheses?"
            raise TypeError(msg)
        if isinstance(fn, type):
            msg = f"collective_scope() decorates functions (got the class {describe(fn)}); decorate its methods"
            raise TypeError(msg)
        if kind := kind_of_function(fn):
            msg = (
                f"collective_scope() cannot decorate the {kind} function {describe(fn)}: calling it returns"
                " before its body runs; use a 'with' block inside it"
            )
            raise TypeError(msg)
        if len(self._cleanups) + len(self._after) + len(self._held) > len(self._given):
            msg = f"scope {self.name!r} has cleanups of its own and decorates {describe(fn)}: give them as cleanups="
            raise RuntimeError(msg)
        fresh = functools.partial(
            CollectiveScope,
            group=self._group,
            name=self.name if self._is_named else cap(describe(fn)),
            is_named=True,
            where=self._where,
            given=self._given,
            options=self._options,
            body=getattr(inspect.unwrap(fn), "__code__", None),
        )

        @functools.wraps(fn)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            with fresh():
                return fn(*args, **kwargs)

        return wrapper

    # Life cycle.

    def __enter__(self) -> Self:
        if self._state != "new":
            msg = "a scope guards one 'with' block; make a new one, or use it as a decorator"
            raise RuntimeError(msg)
        try:
            self._enter(sys._getframe(1).f_code)  # noqa: SLF001  (documented; no reference to the frame)
            return self  # noqa: TRY300  (an interrupt may come here)
        except BaseException as refusal:
            try:
                self._refuse(refusal)
            except BaseException as interrupt:  # one that came between two lines of the loop itself
                self._failures.raised.append(("teardown", interrupt))
                self._refuse(refusal)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, body_error: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if not self._is_of_this_thread():
                return
            self._begin_exit(body_error)
            self._tear_down()
        except BaseException as interrupt:  # one that came between two lines of the loop itself
            if self._thread != threading.get_ident() or self._state == "left":
                raise
            self._failures.raised.append(("teardown", interrupt))
            self._begin_exit(body_error)
            self._tear_down()
        surfaced, self._surfaced = self._surfaced, None
        if surfaced is not None and surfaced is not body_error:
            try:
                raise surfaced
            finally:
                del surfaced  # this frame is in its traceback: no cycle

    def _is_of_this_thread(self) -> bool:
        """Whether this process and thread entered the scope; a forked child has copies of its parent's scopes."""
        if self._thread != threading.get_ident() and self._pid == os.getpid():
            raise RuntimeError(_report.left_out_of_order(self.name, "by another thread than the one that entered it"))
        return self._pid == os.getpid()

    def fail(self, error: BaseException) -> None:
        """
        Have this scope fail with *error*, as if the body had raised it: for bodies that catch what they raise.

        The peers are told at once. The scope raises *error* at its exit, unless the body raises.

        Args:
            error: What went wrong.

        Raises:
            TypeError: If *error* is not an exception.
            RuntimeError: If the scope's body is not running.
        """
        if not isinstance(error, BaseException):
            msg = f"error must be an exception (got {error!r})"
            raise TypeError(msg)
        if self._state != "in the body":
            msg = f"scope {self.name!r} can fail in its body only; it is {self._state!r}"
            raise RuntimeError(msg)
        self._failures.body = error
        self._fail("body", error)

    def _enter(self, caller: CodeType) -> None:
        self._body = self._body or caller
        self._pid, self._thread = os.getpid(), threading.get_ident()
        self._parent = _current.get()
        self._find()
        if self._membership is None:
            self._is_late, self._trace = True, _groups.trace_of_a_default_group()
        else:
            self._take_place(self._membership)
            self._appear()
        _current.set(self)
        if self._options.kill_after is not None:
            self._killer = Killer(self._options.kill_after, self._is_waiting, self._explain)
        if (barrier := self._barrier) is not None:
            barrier.join()
            if self._options.meet_at_entry or not barrier.in_step or self._is_renewal_due():
                self._meet_at_entry(barrier.rank, "entry")
        if self._is_renewal_due():
            self._renew()
        if self._span is not None:
            self._span.stage = "exit"
            self._span.enter("in the body of")
        if self._options.lockstep_gc:
            self._gc_was_enabled = gc.isenabled()
            gc.disable()
        if self._span is not None and self._span.revocation is not None:
            self._span.revocation.enter_body()
        self._state = "in the body"

    def _is_renewal_due(self) -> bool:
        return self._membership is not None and self._membership.renewal is not None and self._membership.renewal.is_due

    def _renew(self) -> None:
        """Make the group, on all ranks; refuse the body on all if one of them cannot."""
        membership = self._membership
        assert membership is not None  # noqa: S101  (for the type checker)
        renewal = membership.renewal
        assert renewal is not None  # noqa: S101  (for the type checker)
        self._stage = "entry 2"
        if self._span is not None:
            self._span.stage = "entry 2"
        self._guard("making the group", renewal.renew)
        renewal.is_due = bool(self._failures.raised)
        if membership.barrier is not None:
            self._meet_at_entry(membership.barrier.rank, "entry 2")
        elif self._failures.first is not None:
            raise self._failures.first
        self._stage = "exit"

    def _take_place(self, membership: _groups.Membership) -> None:
        """Find the path of this scope among those on its group."""
        around = membership.open[-1] if membership.open else None
        if around is not None and around._thread != self._thread:  # noqa: SLF001  (a scope too)
            self._membership = self._barrier = None
            msg = (
                f"scope {self.name!r} cannot be entered: another thread of this process is in scope {around.name!r}"
                " of the same group; a rank is one thread at a time"
            )
            raise RuntimeError(msg)
        barrier = membership.barrier
        if around is None and barrier is not None:
            self._path = path_of("", barrier.entered, self.name, barrier.late)
            barrier.entered += 1
        elif around is not None:
            self._path = path_of(around._path, around._inner, self.name)  # noqa: SLF001  (a scope too)
            around._inner += 1  # noqa: SLF001  (a scope too)
        membership.open.append(self)

    def _appear(self) -> None:
        barrier, options = self._barrier, self._options
        if barrier is not None and self._span is None:
            span = Span(
                barrier.control,
                barrier.part,
                self.name,
                self._thread,
                self._body,
                options.warn_after,
                options.heartbeat_timeout,
                Speaker(self.name, barrier.rank),
                self._make_revocation(),
                self._path,
            )
            span.history = options.history
            self._span = barrier.control.spans[id(span)] = span

    def _make_revocation(self) -> Revocation | None:
        if self._membership is None or self._membership.renewal is None:
            return None
        return Revocation(self._membership.renewal, self._thread, RevokedInterrupt, self._give_up)

    @property
    def group(self) -> Any:
        """
        The process group of this scope, or what was given as ``group``.

        Of a `RenewableGroup`, what its ``make`` returned, or else the default group of the moment.
        """
        renewal = None if self._membership is None else self._membership.renewal
        if renewal is None:
            return self._kept if self._group is None or callable(self._group) else self._group
        return renewal.value if renewal.value is not None else _groups.default_group()

    def _give_up(self, reason: str) -> None:
        """End this process: what the group has of it cannot be taken back."""
        end(_report.cannot_be_freed(self.name, reason))

    def _find(self) -> None:
        if self._membership is None and (found := _groups.find(self._group)) is not None:
            self._membership, self._kept = found
            self._barrier = self._membership.barrier

    def _look_around(self) -> None:
        if self._state == "in the body" and self._membership is None and self._group is None:
            self._find()

    def _meet_at_entry(self, rank: int, stage: str) -> None:
        """Wait until all ranks have come to the entry; refuse the body on all ranks if one has not, or has failed."""
        self.verdict = verdict = self._arrive(stage)
        if not verdict.complete or verdict.failures:
            refusal = self._failures.first or errors_of(verdict, rank)[0]
            if not verdict.stage.startswith("entry"):
                refusal.add_note(_report.not_entered(self.name))
            try:
                raise refusal
            finally:
                del refusal  # this frame is in its traceback: no cycle

    def _refuse(self, refusal: BaseException) -> None:
        """Leave a scope whose body does not start: clean up what it was given, and attach what that raises."""
        if self._state in ("new", "in the body"):
            self._in_flight = refusal
            self._plan()
            if (
                not self._path or self._arrived_at == "entry"
            ):  # otherwise the peers are in their bodies, and wait for it
                self._surfaced = refusal
                self._steps = [self._release, self._end, self._attach, self._run_rest]
            self._state = "in the teardown"
        self._tear_down()
        self._surfaced = None

    def _attach(self) -> None:
        if self._surfaced is not None:  # it is what refuses the body
            self._failures.attach(self.name, self._surfaced)

    def _begin_exit(self, body_error: BaseException | None) -> None:
        if self._state == "in the body":
            if self._span is not None and self._span.revocation is not None:
                self._span.revocation.leave_body()
            self._in_flight = body_error
            self._plan()
            self._state = "in the teardown"
            self._leave_current()

    def _leave_current(self) -> None:
        """Make the scope around this one the current one; note a failure if the order was broken."""
        inner: list[CollectiveScope] = []
        scope = _current.get()
        while scope is not None and scope is not self:
            inner.append(scope)
            scope = scope._parent  # noqa: SLF001  (a scope too)
        if self._is_orphan:
            self._fail("exit", RuntimeError(_report.left_out_of_order(self.name, "after a scope around it")))
        if scope is None:
            return  # another context, such as that of a task
        if not inner:
            _current.set(self._parent)
            return
        inner[-1]._parent = self._parent  # noqa: SLF001  (a scope too)
        for each in inner:
            each._is_orphan = True  # noqa: SLF001  (a scope too)
            if self._membership is not None and each in self._membership.open:
                self._membership.open.remove(each)
        text = f"before scope {inner[-1].name!r}, which was entered within it"
        self._fail("exit", RuntimeError(_report.left_out_of_order(self.name, text)))

    def _end(self) -> None:
        """Take this scope out of everything that knows it."""
        if self._gc_was_enabled:
            gc.enable()
        if _current.get() is self:  # it was refused at its entry
            _current.set(self._parent)
        if self._parent is not None:
            self._parent._told = self._surfaced  # noqa: SLF001  (a scope too)
        if self._killer is not None:
            self._killer.cancel()
        if self._membership is not None and self._membership.open[-1:] == [self]:
            self._membership.open.pop()
        if self._membership is not None and self._membership.renewal is not None:
            verdict = self.verdict
            is_whole = verdict is not None and verdict.complete and not verdict.revoked
            self._membership.renewal.is_due |= not is_whole
        if (span := self._span) is not None:
            span.part.revoked.discard(self._path)
            span.control.left, span.is_left = self.name, True
            if span.is_idle:
                span.control.spans.pop(id(span), None)
        self._state = "left"

    # For the thread that ends the process.

    def _is_waiting(self) -> bool:
        return self._span is not None and not self._span.is_idle

    def _explain(self) -> str:
        """Tell the peers that this process is ended, and say where every rank is."""
        seconds = self._options.kill_after or 0.0
        barrier, span = self._barrier, self._span
        if barrier is None or span is None:
            here = Place(me(), phase=f"in scope {self.name!r}", seconds=seconds)
            return _report.out_of_patience(self.name, seconds, {0: here}, 0)
        outcome = Outcome("kill_after", "TimeoutError", f"not left within {seconds:.1f} s; its process was ended")
        barrier.publish(attrs.evolve(self._record(self._stage), outcome=outcome))
        return _report.out_of_patience(self.name, seconds, barrier.control.survey(span), barrier.rank)
