"""The scope: its life cycle, its teardown, and its use as a decorator."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Never, ParamSpec, Self, TypeVar

import attrs

from . import _report
from ._cleanups import Cleanup, describe
from ._deadline import Deadline
from ._failures import errors_of
from ._groups import (
    alone,
    find_barrier,
    group_barrier,
    is_destroyed,
    place_in_world,
    synchronize_accelerator,
)
from ._outcome import Record, Verdict, shorten, type_name
from ._registry import Registry, refuse_without_store
from ._watcher import Mark, enter, here, leave


P = ParamSpec("P")
T = TypeVar("T")

_NO_FUNCTION: Any = None

logger = logging.getLogger("collective_scope")

__tracebackhide__ = True
"""Where pytest leaves frames out: between the line with the scope and the line that failed, these tell nothing."""

_current: ContextVar[CollectiveScope | None] = ContextVar("collective_scope", default=None)


def current_scope() -> CollectiveScope:
    """
    Return the innermost scope whose body is running here.

    Raises:
        RuntimeError: If there is none.
    """
    scope = _current.get()
    if scope is None:
        msg = "current_scope() was called outside of the body of a scope"
        raise RuntimeError(msg)
    return scope


@attrs.define(eq=False, repr=False, kw_only=True, on_setattr=attrs.setters.NO_OP)
class CollectiveScope(Registry):
    """
    What `collective_scope` returns. Guards one ``with`` block, or any number of calls of a function.

    Attributes:
        verdict:
            After the exit: what every rank did, the same on every rank. None
            before it, and if this rank was interrupted at the barrier.
    """

    _group: Any
    _is_named: bool
    """Whether the name was given, so that a decorated function does not give its own."""
    _given: tuple[Callable[[], object], ...]
    _timeout: float
    _failure_timeout: float
    _heartbeat_timeout: float
    _warn_after: float
    _deadline: float | None
    _synchronize: bool
    _lockstep_gc: bool
    _group_barrier: bool

    verdict: Verdict | None = attrs.field(default=None, init=False)
    _kept: Any = attrs.field(default=None, init=False)
    _sequence: int = attrs.field(default=0, init=False)
    _parent: CollectiveScope | None = attrs.field(default=None, init=False)
    _told: BaseException | None = attrs.field(default=None, init=False)
    """What an inner scope raised; it is logged already."""
    _mark: Mark = attrs.field(default=attrs.Factory(lambda self: Mark(self.name), takes_self=True), init=False)
    _timer: Deadline | None = attrs.field(default=None, init=False)
    _gc_was_enabled: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        for fn in self._given:
            self._register(self._cleanups, fn, self._where)

    def __repr__(self) -> str:
        return f"<CollectiveScope {self.name!r}, {self._state}, cleanups={len(self._cleanups)}>"

    # The decorator.

    def __call__(self, fn: Callable[P, T] = _NO_FUNCTION, /, *others: Never, **named: Never) -> Callable[P, T]:
        """
        Wrap *fn* so that each call runs in a fresh scope like this one.

        Raises:
            TypeError: If *fn* is a class, a coroutine function, a generator function, or no function.
        """
        # Of @collective_scope without parentheses, the calls of the function arrive here, whatever its arguments.
        if not callable(fn) or others or named:
            msg = f"collective_scope() decorates functions (got {fn!r}); did you forget the parentheses?"
            raise TypeError(msg)
        if isinstance(fn, type):
            msg = f"collective_scope() decorates functions (got the class {describe(fn)}); decorate its methods"
            raise TypeError(msg)
        if inspect.iscoroutinefunction(fn) or inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            is_async = "" if inspect.isgeneratorfunction(fn) else "async "
            kind = "coroutine" if inspect.iscoroutinefunction(fn) else f"{is_async}generator"
            msg = (
                f"collective_scope() cannot decorate the {kind} function {describe(fn)}: calling it returns"
                " before its body runs; use a 'with' block inside it"
            )
            raise TypeError(msg)
        name = self.name if self._is_named else describe(fn)

        @functools.wraps(fn)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            with attrs.evolve(self, name=name):
                return fn(*args, **kwargs)

        return wrapper

    # Life cycle.

    def __enter__(self) -> Self:
        if self._state != "new":
            msg = "a scope guards one 'with' block; make a new one, or use it as a decorator"
            raise RuntimeError(msg)
        self._find_barrier()
        self._parent = _current.get()
        self._sequence = self._count()
        if self._barrier is not None:
            self._barrier.scopes = self._sequence + 1
        self._state = "in the body"
        enter(self._mark)
        if self._deadline is not None:
            self._timer = Deadline(self._deadline, self._is_waiting, self._explain)
        if self._barrier is not None and not self._barrier.in_step:
            self._check_entry()
        self._mark.set("in the body of")
        _current.set(self)
        if self._lockstep_gc:
            self._gc_was_enabled = gc.isenabled()
            gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, body_error: BaseException | None, tb: TracebackType | None
    ) -> None:
        _current.set(self._parent)
        self._state = "in the teardown"
        error_of_scope: BaseException | None = None
        try:
            if body_error is not None:
                self._fail("body", body_error)
                if self._barrier is not None:
                    self._guard("telling the peers", functools.partial(self._barrier.publish, self._record("exit")))
            self._tear_down()
            error_of_scope = self._failures.surface(self.verdict, self._barrier.rank if self._barrier else 0)
        finally:
            if self._gc_was_enabled:
                gc.enable()
            if self._parent is not None:
                self._parent._told = error_of_scope  # noqa: SLF001  (a scope too)
            self._end()
        if error_of_scope is not None and error_of_scope is not body_error:
            try:
                raise error_of_scope
            finally:
                del error_of_scope  # this frame is in its traceback: no cycle

    def _end(self) -> None:
        self._state = "left"
        leave(self._mark)
        if self._timer is not None:
            self._timer.cancel()
        # Last of all: freeing these may run destructors that the peers take part in.
        for each in (self._cleanups, self._after):
            each.release()
        self._held.clear()
        self._failures.clear()
        if self._barrier is not None:  # pragma: no branch  (None only if an interrupt comes between two lines)
            # A rank that failed has not entered the scopes within this one that its peers have: they do not count.
            self._barrier.scopes = self._sequence + 1
        self._told = self._parent = self._barrier = self._kept = None

    def _find_barrier(self) -> None:
        found = find_barrier(self._group)
        if found is None:
            return
        barrier, kept = found
        if self._group_barrier or self._cleanups.collective():
            refuse_without_store(barrier)
        self._barrier, self._kept = barrier, kept
        barrier.greet()
        if self._group_barrier and barrier.world_size > 1:
            # At the bottom of the stack: the last collective thing that the ranks agree on.
            bottom = Cleanup(self._wait_for_group, "dist.barrier of the group", self._where, collective=True)
            self._cleanups.push_under(bottom)

    def _check_entry(self) -> None:
        """After a round that somebody missed, no body may start before all have left the earlier one."""
        assert self._barrier is not None  # noqa: S101  (for the type checker)
        refusal: BaseException
        try:
            self.verdict = self._arrive("entry")
            if self.verdict.complete:
                return
            refusal = errors_of(self.verdict, self._barrier.rank)[0]
            if self.verdict.stage != "entry":
                refusal.add_note(_report.not_entered(self.name))
        except BaseException as interrupt:
            refusal = interrupt
        # The body never starts, but what was given to the scope is cleaned up.
        self._state = "in the teardown"
        self._run_rest()
        self._failures.attach(refusal)
        self._end()
        try:
            raise refusal
        finally:
            del refusal  # this frame is in its traceback: no cycle

    # The teardown, in the order in which things happen.

    def _tear_down(self) -> None:
        if self._synchronize:
            self._guard("synchronize", synchronize_accelerator)
        if self._lockstep_gc:
            self._guard("garbage collection", self._collect)
        if self._barrier is None:
            self._guard("lookup of the group", self._find_barrier)
        self._barrier = self._barrier or alone()
        if self._kept is not None and is_destroyed(self._kept[0] if isinstance(self._kept, tuple) else None):
            logger.warning(
                "scope %r: the process group was destroyed in the body; the barrier goes over its store", self.name
            )
        try:
            self._leave_together()
        except BaseException as error:
            self._fail("barrier", error)
            self.verdict = None
        self._run_rest()
        while self._after:
            self._run(self._after.take(), "after_barrier")

    def _leave_together(self) -> None:
        mismatch: Verdict | None = None
        number = 1
        while True:
            self.verdict = verdict = self._meet("exit" if number == 1 else f"exit {number}")
            mismatch = mismatch or (verdict if verdict.cleanups else None)
            if not verdict.complete or not verdict.pending:
                break
            self._run_agreed(verdict)
            number += 1
        if mismatch is not None:
            self.verdict = attrs.evolve(verdict, cleanups=mismatch.cleanups, agreed=mismatch.agreed)

    def _meet(self, stage: str) -> Verdict:
        """Clean up down to the first collective cleanup, and arrive, also if an interrupt comes before this rank has."""
        assert self._barrier is not None  # noqa: S101  (for the type checker)
        rounds = self._barrier.rounds
        while True:
            try:
                for cleanup in self._cleanups.local():
                    self._run(cleanup)
                verdict = self._arrive(stage)
                if (self._sequence, self.name) not in verdict.enclosing or verdict.names:
                    return verdict
                # It is of a scope within this one, to which this rank did not come. Its peers are yet to come to this one.
                rounds = self._barrier.rounds
            except BaseException as error:
                if isinstance(error, Exception) or self._barrier.rounds > rounds:
                    raise  # no interrupt, or one that the barrier has told the peers of
                self._fail("barrier", error)

    def _run_agreed(self, verdict: Verdict) -> None:
        """Run the stack down to the first collective cleanup that all ranks share, and that one."""
        keys = {cleanup: key for key, cleanup in self._cleanups.collective().items()}
        while self._cleanups:
            cleanup = self._cleanups.take()
            if keys.get(cleanup) in verdict.agreed:
                self._run(cleanup)
                return
            self._run_or_skip(cleanup)

    def _run_rest(self) -> None:
        """Without an agreement: what is local runs, what is collective does not."""
        while self._cleanups:
            self._run_or_skip(self._cleanups.take())

    def _run_or_skip(self, cleanup: Cleanup) -> None:
        if cleanup.collective:
            self._failures.skipped.append(cleanup)
        else:
            self._run(cleanup)

    def _run(self, cleanup: Cleanup, kind: str = "cleanup") -> None:
        self._guard(f"{kind} {cleanup.name!r}", cleanup.call, f" (registered at {cleanup.where})")

    def _guard(self, phase: str, call: Callable[[], object], place: str = "") -> None:
        """Call; keep what it raises, a KeyboardInterrupt included, so that what comes next is reached."""
        self._mark.set(f"in {phase}{place} of")
        try:
            call()
        except BaseException as error:
            self._fail(phase, error)

    def _fail(self, phase: str, error: BaseException) -> None:
        # A body that has made the group, and failed, has no barrier yet.
        rank, world_size = (self._barrier.rank, self._barrier.world_size) if self._barrier else place_in_world()
        # What an inner scope raised is in the log already.
        self._failures.add(phase, error, rank=rank, world_size=world_size, log=error is not self._told)

    def _arrive(self, stage: str) -> Verdict:
        assert self._barrier is not None  # noqa: S101  (for the type checker)
        is_entry = stage == "entry"
        left = {} if is_entry else self._cleanups.collective()
        marks = tuple((key, self._fingerprint(key, cleanup)) for key, cleanup in left.items())
        self._mark.set(f"at the {'entry' if is_entry else 'barrier'} of")
        # Who is stuck in an earlier scope must not cost each further one a whole timeout.
        timeout = min(self._timeout, self._failure_timeout) if is_entry else self._timeout
        if self._timer is not None:
            timeout = min(timeout, max(0.0, self._timer.at - time.monotonic()))
        return self._barrier.arrive(
            self._record(stage, marks),
            timeout=timeout,
            failure_timeout=self._failure_timeout,
            heartbeat_timeout=self._heartbeat_timeout,
            warn_after=self._warn_after,
        )

    def _record(self, stage: str, cleanups: tuple[tuple[str, str], ...] = ()) -> Record:
        record = Record(0, stage, self.name, self._sequence, self._failures.outcome, cleanups)
        if self._parent is not None:
            record.enclosing = self._enclosing()
        return record

    def _count(self) -> int:
        """Return how many scopes this rank has entered before on the group; 0 as long as there is none."""
        count = 0 if self._barrier is None else self._barrier.scopes
        around = () if self._parent is None else self._enclosing()
        # A function that makes the group, or calls itself before it does, is in scopes that only this tells apart.
        while (count, self.name) in around:
            count += 1
        return count

    def _enclosing(self) -> tuple[tuple[int, str], ...]:
        """Return what peers know the scopes around this one by, those included that will have found the group at exit."""
        scope, found = self._parent, []
        while scope is not None:
            if scope._barrier is None or scope._barrier is self._barrier:  # noqa: SLF001  (a scope too)
                found.append((scope._sequence, scope.name))  # noqa: SLF001
            scope = scope._parent  # noqa: SLF001  (a scope too)
        return tuple(found)

    def _fingerprint(self, key: str, cleanup: Cleanup) -> str:
        if cleanup.fingerprint is None:
            return ""
        try:
            return shorten(repr(cleanup.fingerprint()), 1000)
        except BaseException as error:
            self._fail(f"fingerprint of cleanup {key!r}", error)
            return f"raised {type_name(error)}"

    def _collect(self) -> None:
        # While __exit__ runs, the exception in flight keeps the locals of the failed
        # frames alive, on the failing rank only.
        chain, seen = [self._failures.body], set()
        while chain:
            error = chain.pop()
            if error is not None and id(error) not in seen:
                seen.add(id(error))
                traceback.clear_frames(error.__traceback__)
                chain += [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]
        gc.collect()

    def _wait_for_group(self) -> None:
        """Run as the last collective cleanup, hence on all ranks or none."""
        if self.verdict is None or not self.verdict.ok:
            return
        opened = group_barrier(self._kept[0])
        start, pause = time.monotonic(), 0.00005
        while not opened():
            if time.monotonic() - start > self._timeout:
                msg = f"the group's own barrier did not open within {self._timeout:.1f} s"
                raise TimeoutError(msg)
            # Polled: a blocking wait that times out closes gloo's pairs, and is deaf to Ctrl-C.
            time.sleep(pause)
            pause = min(0.05, 2 * pause)

    # For the thread that watches the deadline.

    def _is_waiting(self) -> bool:
        return self._mark.phase.startswith("at the ")

    def _explain(self) -> str:
        places = self._barrier.survey(self._record("exit")) if self._barrier else {}
        return _report.deadline(self.name, self._deadline or 0.0, here(), places)
