"""The scope: its life cycle, its teardown, and its use as a decorator."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, ParamSpec, Self, TypeVar

import attrs

from . import _report
from ._barrier import HEARTBEAT_TIMEOUT_S
from ._cleanups import Cleanup, CleanupStack, describe
from ._deadline import Deadline
from ._failures import Failures, errors_of
from ._groups import (
    AnyBarrier,
    GroupLike,
    alone,
    find_barrier,
    group_barrier,
    is_destroyed,
    place_in_world,
    synchronize_accelerator,
)
from ._outcome import Record, Verdict, shorten, type_name
from ._plain_barrier import PlainBarrier
from ._watcher import Mark, enter, here, leave


P = ParamSpec("P")
T = TypeVar("T")
Seconds = float | timedelta

logger = logging.getLogger("collective_scope")

TIMEOUT_S = 300.0
FAILURE_TIMEOUT_S = 30.0

_current: ContextVar[CollectiveScope | None] = ContextVar("collective_scope", default=None)


def collective_scope(
    group: GroupLike = None,
    *,
    name: str | None = None,
    cleanups: Iterable[Callable[[], object]] = (),
    timeout: Seconds | None = None,
    failure_timeout: Seconds | None = None,
    heartbeat_timeout: Seconds | None = None,
    deadline: Seconds | None = None,
    synchronize: bool = True,
    lockstep_gc: bool = False,
    group_barrier: bool = False,
) -> CollectiveScope:
    """
    Run a body on every rank of *group*, clean up, and leave together.

    On exit, whether or not the body raised, each rank

    1. tells its peers at once if it failed, and logs its traceback,
    2. waits for its accelerator, and runs its cleanups, last registered first, down to the first collective one,
    3. arrives at the barrier and waits, at most *timeout*, for the verdict of all ranks,
    4. runs the rest of its cleanups, last registered first, the collective ones in lockstep and only if
       all ranks agreed on them, and arrives again; without a collective cleanup, 3 was the end of it,
    5. runs what was registered with `CollectiveScope.after_barrier`,
    6. returns if every rank arrived and none failed; otherwise raises, like every other rank.

    Collective:
        Every rank of *group* must go through the same scopes in the same order.

    Args:
        group:
            ``None`` (the default group, looked up at entry, or at exit if the
            body creates it), a ``ProcessGroup``, a ``DeviceMesh`` of one
            dimension, a ``GroupCoordinator`` as in vLLM and SGLang, an mpi4py
            communicator, or a function without arguments that returns one of
            these and is called at entry. On a rank outside of the group, and
            without torch.distributed, cleanups run and there is no barrier.

        name:
            What the scope is called in messages; must be the same on all
            ranks. Default: file and line of the call, or the qualified name of
            the decorated function.

        cleanups: Local cleanups to begin with, registered in this order.

        timeout:
            Longest wait at the barrier, in seconds or as ``timedelta``, counted
            from this rank's arrival. Cleanups are not counted. Default: the
            environment's ``COLLECTIVE_SCOPE_TIMEOUT``, or 300.

        failure_timeout:
            Longest wait from the moment at which this rank knows that a rank
            failed, itself included; and at the entry of a scope, for ranks that
            missed the barrier of the one before. Default: ``COLLECTIVE_SCOPE_FAILURE_TIMEOUT``, or 30.

        heartbeat_timeout:
            A rank on another machine counts as lost when nothing was heard of
            it for this long, in seconds; on this machine, the system tells.
            Default: ``COLLECTIVE_SCOPE_HEARTBEAT_TIMEOUT``, or 30.

        deadline:
            Longest time from entry to exit, in seconds. When it runs out, each
            rank that is still inside logs where everybody is; one that is not
            at the barrier then writes its stacks to stderr and ends its process
            with exit code 124. Default: none.

        synchronize: Whether to wait for the accelerator before the cleanups.

        lockstep_gc:
            Keep the cyclic garbage collector off in the body and collect once
            in the teardown, before any cleanup, at the same point on every
            rank. The frames of a failed body lose their locals. A collection
            takes about 50 ms in a process that has imported torch.

        group_barrier:
            After a verdict without failures, also wait for the group's own
            ``dist.barrier``, at most *timeout*, to prove its communicator in step.

    Returns:
        A scope to use once, as ``with collective_scope(): ...``, or as a decorator.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a time is not positive and finite.

    Entering or leaving the scope raises:

    * the body's own exception, unchanged, on the rank that raised it;
    * otherwise the cleanups' error, or an ``ExceptionGroup`` of several;
    * otherwise `PeerFailedError`, `BarrierTimeoutError`, `PeerLostError`,
      `ScopeMismatchError` or `CleanupMismatchError`.

    Whatever else went wrong is attached to it, as notes and as the attribute
    ``collective_scope_errors``. A ``KeyboardInterrupt`` or ``SystemExit`` that
    arrives during the teardown surfaces before ordinary errors.

    Example:
        >>> import shutil, tempfile
        >>> with collective_scope(name="copy") as scope:
        ...     folder = tempfile.mkdtemp()
        ...     _ = scope.cleanup(shutil.rmtree, folder)
        >>> scope.verdict.ok
        True
    """
    caller = sys._getframe(1)  # noqa: SLF001  (documented; what warnings and logging use)
    return CollectiveScope(
        group,
        name=name,
        where=f"{caller.f_code.co_filename}:{caller.f_lineno}",
        given=tuple(cleanups),
        timeout=_seconds("timeout", timeout, TIMEOUT_S),
        failure_timeout=_seconds("failure_timeout", failure_timeout, FAILURE_TIMEOUT_S),
        heartbeat_timeout=_seconds("heartbeat_timeout", heartbeat_timeout, HEARTBEAT_TIMEOUT_S),
        deadline=None if deadline is None else _seconds("deadline", deadline, math.inf),
        synchronize=synchronize,
        lockstep_gc=lockstep_gc,
        group_barrier=group_barrier,
    )


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


@attrs.define(eq=False, repr=False, on_setattr=attrs.setters.NO_OP)
class CollectiveScope:
    """
    What `collective_scope` returns. Guards one ``with`` block, or any number of calls of a function.

    Attributes:
        verdict:
            After the exit: what every rank did, the same on every rank. None
            before it, and if this rank was interrupted at the barrier.
    """

    _group: Any
    _name: str | None = attrs.field(
        kw_only=True, validator=attrs.validators.optional(attrs.validators.instance_of(str))
    )
    _where: str = attrs.field(kw_only=True)
    _given: tuple[Callable[[], object], ...] = attrs.field(kw_only=True)
    _timeout: float = attrs.field(kw_only=True)
    _failure_timeout: float = attrs.field(kw_only=True)
    _heartbeat_timeout: float = attrs.field(kw_only=True)
    _deadline: float | None = attrs.field(kw_only=True)
    _synchronize: bool = attrs.field(kw_only=True)
    _lockstep_gc: bool = attrs.field(kw_only=True)
    _group_barrier: bool = attrs.field(kw_only=True)

    verdict: Verdict | None = attrs.field(default=None, init=False)
    _state: Literal["new", "in the body", "in the teardown", "left"] = attrs.field(default="new", init=False)
    _cleanups: CleanupStack = attrs.field(factory=CleanupStack, init=False)
    _after: CleanupStack = attrs.field(factory=CleanupStack, init=False)
    _held: list[object] = attrs.field(factory=list, init=False)
    _barrier: AnyBarrier | None = attrs.field(default=None, init=False)
    _kept: Any = attrs.field(default=None, init=False)
    _sequence: int = attrs.field(default=0, init=False)
    _parent: CollectiveScope | None = attrs.field(default=None, init=False)
    _told: BaseException | None = attrs.field(default=None, init=False)
    """What an inner scope raised; it is logged already."""
    _failures: Failures = attrs.field(init=False)
    _mark: Mark = attrs.field(init=False)
    _timer: Deadline | None = attrs.field(default=None, init=False)
    _gc_was_enabled: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._failures, self._mark = Failures(self.name), Mark(self.name)
        for fn in self._given:
            self._register(self._cleanups, fn, self._where)

    def __repr__(self) -> str:
        return f"<CollectiveScope {self.name!r}, {self._state}, cleanups={len(self._cleanups)}>"

    @property
    def name(self) -> str:
        """What the scope is called in messages."""
        return self._name or os.path.basename(self._where)  # noqa: PTH119  (cheap; there is no path to handle)

    # Registration. Local to this rank.

    def cleanup(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[P, T]:
        """
        Run ``fn(*args, **kwargs)`` on this rank in the teardown, whatever its peers do.

        Registered from a cleanup, it still runs in the same teardown.

        Returns:
            *fn*, so that it can be used as a decorator.

        Raises:
            TypeError: If *fn* is not callable.
            RuntimeError: If the scope has been left.
        """
        self._register(self._cleanups, functools.partial(fn, *args, **kwargs) if args or kwargs else fn, _caller())
        return fn

    def collective_cleanup(
        self,
        fn: Callable[..., T],
        /,
        *args: Any,
        name: str | None = None,
        fingerprint: Callable[[], object] | None = None,
        **kwargs: Any,
    ) -> Callable[..., T]:
        """
        Run ``fn(*args, **kwargs)`` in the teardown, on all ranks in lockstep or on none.

        It runs after all ranks have arrived and agreed which collective
        cleanups they have left. One that a rank lacks, or whose fingerprint
        differs, is skipped on all ranks, which then raise `CleanupMismatchError`.

        Collective:
            Every rank of the group registers it, in the same order.

        Args:
            fn: What to run.

            args: Its arguments.

            name: What the ranks compare. Default: the qualified name of *fn*.

            fingerprint:
                Called when this rank arrives; ranks compare the ``repr`` of
                what it returns, for example the number of handles to free.

            kwargs: Its keyword arguments, except *name* and *fingerprint*.

        Returns:
            *fn*, so that it can be used as a decorator.

        Raises:
            TypeError: If *fn* or *fingerprint* is not callable, or the group has no store to agree over.
            RuntimeError: If the scope has been left.
        """
        if fingerprint is not None and not callable(fingerprint):
            msg = f"fingerprint must be callable (got {fingerprint!r})"
            raise TypeError(msg)
        self._refuse_without_store(self._barrier)
        call = functools.partial(fn, *args, **kwargs) if args or kwargs else fn
        self._register(self._cleanups, call, _caller(), name=name, collective=True, fingerprint=fingerprint)
        return fn

    def after_barrier(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[P, T]:
        """
        Run ``fn(*args, **kwargs)`` on this rank after the barrier, last registered first.

        For what a peer may use until it has arrived: a shared folder, the
        process group. Runs once on every path. If the barrier did not open,
        peers may not be through: ask ``scope.verdict.complete``. The peers do
        not learn of errors raised here.

        Returns:
            *fn*, so that it can be used as a decorator.

        Raises:
            TypeError: If *fn* is not callable.
            RuntimeError: If the scope has been left.
        """
        self._register(self._after, functools.partial(fn, *args, **kwargs) if args or kwargs else fn, _caller())
        return fn

    def enter_context(self, cm: AbstractContextManager[T]) -> T:
        """
        Enter *cm* now and leave it in the teardown, like a local cleanup.

        Its ``__exit__`` gets the body's exception. It cannot suppress it: the
        peers have been told.

        Returns:
            What ``cm.__enter__()`` returns.

        Raises:
            TypeError: If *cm* is not a context manager.
            RuntimeError: If the scope has been left.
        """
        if not isinstance(cm, AbstractContextManager):
            msg = f"enter_context() takes a context manager (got {cm!r})"
            raise TypeError(msg)
        self._refuse_if_left()
        value = cm.__enter__()

        def leave() -> None:
            error = self._failures.body
            cm.__exit__(*((None, None, None) if error is None else (type(error), error, error.__traceback__)))

        self._register(self._cleanups, leave, _caller(), name=f"{type(cm).__qualname__}.__exit__")
        return value

    def hold(self, obj: T) -> T:
        """
        Keep *obj* alive until after the barrier, and return it.

        The cure for destructors that are collectives: on no rank does it go
        before all have arrived. A registered bound method holds its object too.

        Raises:
            RuntimeError: If the scope has been left.
        """
        self._refuse_if_left()
        self._held.append(obj)
        return obj

    def _register(
        self,
        stack: CleanupStack,
        call: Callable[[], object],
        where: str,
        *,
        name: str | None = None,
        collective: bool = False,
        fingerprint: Callable[[], object] | None = None,
    ) -> None:
        if not callable(call):
            msg = f"a cleanup must be callable (got {call!r})"
            raise TypeError(msg)
        self._refuse_if_left()
        stack.push(Cleanup(call, name or describe(call), where, collective, fingerprint))

    def _refuse_if_left(self) -> None:
        if self._state == "left":
            msg = f"scope {self.name!r} has been left; nothing can be registered any more"
            raise RuntimeError(msg)

    # The decorator.

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """
        Wrap *fn* so that each call runs in a fresh scope like this one.

        Raises:
            TypeError: If *fn* is a coroutine function, a generator function, or no function.
        """
        if not callable(fn):
            msg = f"collective_scope() decorates functions (got {fn!r}); did you forget the parentheses?"
            raise TypeError(msg)
        if inspect.iscoroutinefunction(fn) or inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            is_async = "" if inspect.isgeneratorfunction(fn) else "async "
            kind = "coroutine" if inspect.iscoroutinefunction(fn) else f"{is_async}generator"
            msg = (
                f"collective_scope() cannot decorate the {kind} function {describe(fn)}: calling it returns"
                " before its body runs; use a 'with' block inside it"
            )
            raise TypeError(msg)
        name = self._name or describe(fn)

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
        self._state = "in the body"
        enter(self._mark)
        if self._deadline is not None:
            self._timer = Deadline(self._deadline, self._is_waiting, self._explain)
        if self._barrier is not None and not self._barrier.in_step:
            self._check_entry()
        self._mark.set("in the body of")
        self._parent = _current.get()
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
                # Both are scopes.
                self._parent._told = error_of_scope  # noqa: SLF001
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
        self._told = self._parent = self._barrier = self._kept = None

    def _find_barrier(self) -> None:
        found = find_barrier(self._group)
        if found is None:
            return
        barrier, kept = found
        if self._group_barrier or self._cleanups.collective():
            self._refuse_without_store(barrier)
        self._barrier, self._kept = barrier, kept
        self._sequence = barrier.scopes
        barrier.scopes += 1
        barrier.greet()
        if self._group_barrier and barrier.world_size > 1:
            # At the bottom of the stack: the last collective thing that the ranks agree on.
            bottom = Cleanup(self._wait_for_group, "dist.barrier of the group", self._where, collective=True)
            self._cleanups.push_under(bottom)

    @staticmethod
    def _refuse_without_store(barrier: AnyBarrier | None) -> None:
        if isinstance(barrier, PlainBarrier):
            msg = "a group that has no store cannot agree on a collective cleanup; use cleanup()"
            raise TypeError(msg)

    def _check_entry(self) -> None:
        """After a round that somebody missed, no body may start before all have left the earlier one."""
        assert self._barrier is not None  # noqa: S101  (for the type checker)
        refusal: BaseException | None
        try:
            self.verdict = self._arrive("entry")
            refusal = None if self.verdict.complete else errors_of(self.verdict, self._barrier.rank)[0]
        except BaseException as interrupt:
            refusal = interrupt
        if refusal is not None:
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
            for cleanup in self._cleanups.local():
                self._run(cleanup)
            self.verdict = verdict = self._arrive("exit" if number == 1 else f"exit {number}")
            mismatch = mismatch or (verdict if verdict.cleanups else None)
            if not verdict.complete or not verdict.pending:
                break
            self._run_agreed(verdict)
            number += 1
        if mismatch is not None:
            self.verdict = attrs.evolve(verdict, cleanups=mismatch.cleanups, agreed=mismatch.agreed)

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
        )

    def _record(self, stage: str, cleanups: tuple[tuple[str, str], ...] = ()) -> Record:
        return Record(0, stage, self.name, self._sequence, self._failures.outcome, cleanups)

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


def _caller() -> str:
    """Return file and line of the code that called into this module."""
    frame = sys._getframe(2)  # noqa: SLF001
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _seconds(parameter: str, value: Seconds | None, default: float) -> float:
    """Return a time in seconds: the argument, or the environment's, or the default."""
    source = parameter
    given: object = value
    if value is None:
        source = f"COLLECTIVE_SCOPE_{parameter.upper()}"
        given = os.environ.get(source)
        if given is None:
            return default
    try:
        seconds = given.total_seconds() if isinstance(given, timedelta) else float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        msg = f"{source} must be seconds as a number, or a timedelta (got {given!r})"
        raise (TypeError if value is not None else ValueError)(msg) from None
    if not 0 < seconds < math.inf:
        msg = f"{source} must be positive and finite (got {given!r})"
        raise ValueError(msg)
    return seconds
