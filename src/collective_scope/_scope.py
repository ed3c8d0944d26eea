"""The scope: its life cycle, and its use as a decorator."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Never, ParamSpec, Self, TypeVar, overload

import attrs

from . import _notes, _torch
from ._cleanups import describe
from ._entry import Entry
from ._registry import kind_of_function
from ._teardown import current
from .agreement.rounds import cap


P = ParamSpec("P")
T = TypeVar("T")

_NO_FUNCTION: Any = None
_RAISE: Any = object()

__tracebackhide__ = True
"""Where pytest leaves frames out: between the line with the scope and the line that failed, these tell nothing."""


@attrs.define(eq=False, repr=False, kw_only=True, on_setattr=attrs.setters.NO_OP)
class CollectiveScope(Entry):
    """
    What `collective_scope` returns. Guards one ``with`` block, or any number of calls of a function.

    Attributes:
        name: What the scope is called in messages.

        verdict:
            After the exit: each rank's part, the same on every rank. None
            before it, and if this rank was interrupted at the barrier.
    """

    _is_named: bool
    """Whether the name was given, so that a decorated function does not give its own."""

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
            raise RuntimeError(_notes.left_by_another_thread(self.name))
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

    @property
    def group(self) -> Any:
        """
        The process group of this scope, or what was given as ``group``.

        Of a `RenewableGroup`, what its ``make`` returned, or else the default group of the moment.
        """
        if self._renewal is None:
            return self._kept if self._group is None or callable(self._group) else self._group
        return self._renewal.value if self._renewal.value is not None else _torch.default_group()

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
        scope = current.get()
        while scope is not None and scope is not self:
            inner.append(scope)
            scope = scope._parent  # noqa: SLF001  (a scope too)
        if self._is_orphan:
            self._fail("exit", RuntimeError(_notes.left_out_of_order(self.name, "after a scope around it")))
        if scope is None:
            inner = []  # of another context, such as that of a task
        elif not inner:
            current.set(self._parent)
        opened = [] if self._membership is None else self._membership.open
        later = opened[: opened.index(self) : -1] if self in opened else []  # another task may have entered one
        inner += [each for each in later if each not in inner]
        if not inner:
            return
        inner[-1]._parent = self._parent  # noqa: SLF001  (a scope too)
        for each in inner:
            each._is_orphan = True  # noqa: SLF001  (a scope too)
            if each in opened:
                opened.remove(each)
        text = f"before scope {inner[-1].name!r}, which was entered within it"
        self._fail("exit", RuntimeError(_notes.left_out_of_order(self.name, text)))


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
    scope = current.get()
    if scope is not None:
        return scope
    if default is _RAISE:
        msg = "current_scope() was called outside of the body of a scope"
        raise RuntimeError(msg)
    return default
