"""
The stack of cleanups of one scope: what to run, in which order, and what became of it.

Knows nothing of torch or of other ranks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import attrs


@attrs.frozen(eq=False)
class Cleanup:
    """One registered callable."""

    call: Callable[[], object]
    name: str
    where: str
    """File and line that registered it."""
    collective: bool = False
    fingerprint: Callable[[], object] | None = None

    def __str__(self) -> str:
        return f"cleanup {self.name!r} (registered at {self.where})"


@attrs.define(eq=False)
class CleanupStack:
    """
    Cleanups, last registered first.

    A cleanup that has been taken stays referenced until `release`: what it
    holds must not be freed before the barrier (a destructor may be collective).
    """

    _waiting: list[Cleanup] = attrs.field(factory=list)
    _taken: list[Cleanup] = attrs.field(factory=list)

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, cleanup: Cleanup) -> None:
        self._waiting.append(cleanup)

    def push_under(self, cleanup: Cleanup) -> None:
        """Register *cleanup* as if it had been the first."""
        self._waiting.insert(0, cleanup)

    def take(self) -> Cleanup:
        """Return the next cleanup to run; from now on it counts as run."""
        cleanup = self._waiting.pop()
        self._taken.append(cleanup)
        return cleanup

    def local(self) -> Iterator[Cleanup]:
        """Take local cleanups until a collective one, or nothing, is on top."""
        # Not a snapshot: a cleanup may register further ones while it runs.
        while self._waiting and not self._waiting[-1].collective:
            yield self.take()

    def collective(self) -> dict[str, Cleanup]:
        """
        Return the collective cleanups that are left, in the order they would run.

        Ranks compare the keys, so equal names are told apart by how often they
        occur, counted from the one registered first.
        """
        named: dict[str, Cleanup] = {}
        for cleanup in self._waiting:
            if cleanup.collective:
                key, count = cleanup.name, 1
                while key in named:
                    count += 1
                    key = f"{cleanup.name} #{count}"
                named[key] = cleanup
        return dict(reversed(named.items()))

    def release(self) -> None:
        """Drop every reference to what was run."""
        self._taken.clear()


def describe(fn: Callable[..., object]) -> str:
    """Name a callable the way its owner would: ``Manager.destroy``, not its repr."""
    inner = inspect.unwrap(fn)
    while isinstance(inner, functools.partial):
        inner = inner.func
    name: Any = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return str(name).replace("<locals>.", "")
