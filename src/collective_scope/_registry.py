"""What the body of a scope registers: cleanups, contexts, objects to keep. Local to a rank."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, ParamSpec, TypeVar

import attrs

from ._cleanups import Cleanup, CleanupStack, describe
from ._failures import Failures
from ._groups import AnyBarrier
from ._plain_barrier import PlainBarrier


P = ParamSpec("P")
T = TypeVar("T")


@attrs.define(eq=False, repr=False, kw_only=True, on_setattr=attrs.setters.NO_OP)
class Registry:
    """
    The part of a scope that its body talks to.

    Attributes:
        name: What the scope is called in messages.
    """

    name: str
    _where: str
    """File and line of the call that made the scope."""
    _state: Literal["new", "in the body", "in the teardown", "left"] = attrs.field(default="new", init=False)
    _cleanups: CleanupStack = attrs.field(factory=CleanupStack, init=False)
    _after: CleanupStack = attrs.field(factory=CleanupStack, init=False)
    _held: list[object] = attrs.field(factory=list, init=False)
    _barrier: AnyBarrier | None = attrs.field(default=None, init=False)
    _failures: Failures = attrs.field(
        default=attrs.Factory(lambda self: Failures(self.name), takes_self=True), init=False
    )

    def cleanup(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[P, T]:
        """
        Run ``fn(*args, **kwargs)`` on this rank in the teardown, whatever its peers do.

        Registered from a cleanup, it still runs in the same teardown.

        Returns:
            *fn*, so that it can be used as a decorator.

        Raises:
            TypeError: If *fn* is not callable, or a coroutine function.
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
            TypeError: If *fn* or *fingerprint* is not callable, *fn* is a coroutine function,
                or the group has no store to agree over.
            RuntimeError: If the scope has been left.
        """
        if fingerprint is not None and not callable(fingerprint):
            msg = f"fingerprint must be callable (got {fingerprint!r})"
            raise TypeError(msg)
        refuse_without_store(self._barrier)
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
            TypeError: If *fn* is not callable, or a coroutine function.
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
        if inspect.iscoroutinefunction(call):
            msg = f"a cleanup cannot be a coroutine function (got {describe(call)}): nobody would await it"
            raise TypeError(msg)
        self._refuse_if_left()
        stack.push(Cleanup(call, name or describe(call), where, collective, fingerprint))

    def _refuse_if_left(self) -> None:
        if self._state == "left":
            msg = f"scope {self.name!r} has been left; nothing can be registered any more"
            raise RuntimeError(msg)


def refuse_without_store(barrier: AnyBarrier | None) -> None:
    """Raise `TypeError` if the ranks cannot agree on anything."""
    if isinstance(barrier, PlainBarrier):
        msg = "a group that has no store cannot agree on a collective cleanup; use cleanup()"
        raise TypeError(msg)


def _caller() -> str:
    """Return file and line of the code that called into this module."""
    frame = sys._getframe(2)  # noqa: SLF001  (documented; what warnings and logging use)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
