"""
The things that the body of a scope registers: the stack of its cleanups, and objects that must not be freed.

Local to a rank; knows nothing of torch.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable
from typing import Any

import attrs


__tracebackhide__ = True
"""pytest leaves frames of this file out: between a scope and the cleanup that failed, they tell nothing."""


@attrs.define(eq=False)
class Cleanup:
    """
    One registered function.

    Attributes:
        call: The function, its arguments included.
        name: What messages and other ranks call it.
        where: File and line that registered it.
        collective: Whether it runs on all ranks or on none.
        fingerprint: What ranks compare, if it is collective.
        even_if_missing: Whether it runs after a barrier to which not all came, if it is for after the barrier.
        begun: Whether it has been called.
    """

    call: Callable[[], object]
    name: str
    where: str
    collective: bool = False
    fingerprint: Callable[[], object] | None = None
    even_if_missing: bool = False
    begun: bool = False

    def run(self) -> None:
        """Call it."""
        # One line: an interrupt comes either before both or in the call. Once only, on every path.
        self.begun = True; self.call()  # noqa: E702  # fmt: skip

    def __str__(self) -> str:
        return f"cleanup {self.name!r} (registered at {self.where})"


@attrs.define(eq=False)
class CleanupStack:
    """
    Cleanups, last registered first.

    One that has run stays referenced until `clear`: what it holds must not be
    freed before the barrier (a destructor may be collective).
    """

    _waiting: list[Cleanup] = attrs.field(factory=list)
    _begun: list[Cleanup] = attrs.field(factory=list)

    def __len__(self) -> int:
        return len(self._waiting) - bool(self._waiting and self._waiting[-1].begun)

    def push(self, cleanup: Cleanup) -> None:
        self._waiting.append(cleanup)

    def top(self) -> Cleanup | None:
        """Return the next cleanup to run."""
        # Not removed before it has begun: an interrupt between two lines must not lose it.
        while self._waiting and self._waiting[-1].begun:
            self._begun.append(self._waiting.pop())
        return self._waiting[-1] if self._waiting else None

    def collective(self) -> dict[str, Cleanup]:
        """
        Return the collective cleanups that are left, in the order they would run.

        Ranks compare the keys, so equal names are told apart by how often they
        occur, counted from the one registered first.
        """
        named: dict[str, Cleanup] = {}
        counts: dict[str, int] = {}
        for cleanup in self._waiting:
            if cleanup.collective and not cleanup.begun:
                count = counts.get(cleanup.name, 0) + 1
                key = cleanup.name if count == 1 else f"{cleanup.name} #{count}"
                while key in named:  # one may be called "free #2"
                    count += 1
                    key = f"{cleanup.name} #{count}"
                counts[cleanup.name], named[key] = count, cleanup
        return dict(reversed(named.items()))

    def clear(self) -> None:
        """Drop every reference."""
        self._waiting.clear()
        self._begun.clear()


def keep_for_ever(*objects: object) -> None:
    """
    Keep *objects* alive until the process ends, and through its end.

    Their destructors may be collectives, which nobody would answer.
    """
    for each in objects:
        # A reference that nothing drops: at the end of the process, even modules lose what they hold.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


def describe(fn: Callable[..., object]) -> str:
    """Name a callable the way its owner would: ``Manager.destroy``, not its repr."""
    inner = inspect.unwrap(fn)
    while isinstance(inner, functools.partial):
        inner = inner.func
    name: Any = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return str(name).replace("<locals>.", "")
