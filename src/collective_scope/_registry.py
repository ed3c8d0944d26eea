"""The things that the body of a scope registers: cleanups, contexts, objects to keep. Local to a rank."""

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
from .agreement.rounds import cap


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
    _is_past_barrier: bool = attrs.field(default=False, init=False)
    """Whether the last barrier is over, so that no collective cleanup can be agreed on any more."""
    _failures: Failures = attrs.field(factory=Failures, init=False)

    def cleanup(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[P, T]:
        """
        Run ``fn(*args, **kwargs)`` on this rank in the teardown, whatever its peers do.

        Registered from a cleanup, it still runs in the same teardown.

        Returns:
            *fn*, so that it can be used as a decorator.

        Raises:
            TypeError: If *fn* is not callable, or a coroutine or generator function.
            RuntimeError: If the scope has been left.
        """
        self._register(self._cleanups, fn, args, kwargs)
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
        One that is skipped is named, and what it refers to is kept alive until
        the process ends: its destructor may be the collective.

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
            TypeError: If *fn* or *fingerprint* is not callable, *fn* is a coroutine or generator function, or *name* is no text.
            RuntimeError: If the scope has been left, or its last barrier is over.
        """
        if name is not None and not isinstance(name, str):
            msg = f"name must be a text (got {name!r})"
            raise TypeError(msg)
        if fingerprint is not None and not callable(fingerprint):
            msg = f"fingerprint must be callable (got {fingerprint!r})"
            raise TypeError(msg)
        if self._is_past_barrier:
            msg = f"the ranks have left the barrier of scope {self.name!r}; a collective cleanup comes too late"
            raise RuntimeError(msg)
        self._register(self._cleanups, fn, args, kwargs, name=name, collective=True, fingerprint=fingerprint)
        return fn

    def after_barrier(
        self, fn: Callable[..., T], /, *args: Any, even_if_missing: bool = False, **kwargs: Any
    ) -> Callable[..., T]:
        """
        Run ``fn(*args, **kwargs)`` on this rank after the barrier, last registered first.

        For what a peer may use until it has arrived: a shared folder, memory
        that it has mapped, the process group. If a rank is missing, it may use
        it still: then *fn* is skipped, which is reported, and what it refers to
        is kept alive until the process ends.

        Args:
            fn: What to run. The peers do not learn of what it raises.

            args: Its arguments.

            even_if_missing: Whether to run it also if a rank is missing.

            kwargs: Its keyword arguments, except *even_if_missing*.

        Returns:
            *fn*, so that it can be used as a decorator.

        Raises:
            TypeError: If *fn* is not callable, or a coroutine or generator function.
            RuntimeError: If the scope has been left.
        """
        self._register(self._after, fn, args, kwargs, even_if_missing=even_if_missing)
        return fn

    def enter_context(self, cm: AbstractContextManager[T]) -> T:
        """
        Enter *cm* now and leave it in the teardown, like a local cleanup.

        Its ``__exit__`` gets the first error of this scope: of the body, given to `CollectiveScope.fail`,
        or of a cleanup before. It cannot suppress it: the peers have been told.

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
            error = self._failures.first
            cm.__exit__(*((None, None, None) if error is None else (type(error), error, error.__traceback__)))

        self._register(self._cleanups, leave, (), {}, name=f"{type(cm).__qualname__}.__exit__")
        return value

    def hold(self, obj: T) -> T:
        """
        Keep *obj* alive until after the barrier, and return it.

        The cure for destructors that are collectives: on no rank does it go
        before all have arrived. If a rank is missing, it stays until the
        process ends. A registered bound method holds its object too.

        The traceback of a failure also keeps what the body refers to, on that
        rank, for a time that no other rank knows. If the object's destructor is
        a collective, use ``lockstep_gc=True``, which clears those frames.

        Raises:
            RuntimeError: If the scope has been left.
        """
        self._refuse_if_left()
        self._held.append(obj)
        return obj

    def _register(
        self,
        stack: CleanupStack,
        fn: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        name: str | None = None,
        collective: bool = False,
        fingerprint: Callable[[], object] | None = None,
        even_if_missing: bool = False,
    ) -> None:
        if not callable(fn):
            msg = f"a cleanup must be callable (got {fn!r})"
            raise TypeError(msg)
        if kind := kind_of_function(fn):
            msg = f"a cleanup cannot be a {kind} function (got {describe(fn)}): calling it would not run it"
            raise TypeError(msg)
        self._refuse_if_left()
        self._look_around()
        frame = sys._getframe(2)  # noqa: SLF001  (documented; what warnings and logging use)
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        call = functools.partial(fn, *args, **kwargs) if args or kwargs else fn
        stack.push(Cleanup(call, cap(name or describe(fn)), where, collective, fingerprint, even_if_missing))

    def _look_around(self) -> None:
        """Find the group, if the body has made it in the meantime."""

    def _refuse_if_left(self) -> None:
        if self._state == "left":
            msg = f"scope {self.name!r} has been left; nothing can be registered any more"
            raise RuntimeError(msg)


def kind_of_function(fn: Callable[..., object]) -> str:
    """Return what kind of function *fn* is if calling it returns before its body runs; empty for an ordinary one."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "coroutine": inspect.iscoroutinefunction,
        "async generator": inspect.isasyncgenfunction,
        "generator": inspect.isgeneratorfunction,
    }
    call = getattr(fn, "__call__", None)  # noqa: B004  (of an object that is called like a function)
    return next((kind for kind, is_one in kinds.items() if is_one(fn) or is_one(call)), "")
