"""
Uses of the public interface, checked by ``mypy --strict`` and never executed.

Code that must not type-check has an ignore. An ignore that is not needed is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, assert_type

import torch.distributed as dist

from collective_scope import (
    BarrierTimeoutError,
    CleanupMismatchError,
    CollectiveScope,
    CollectiveScopeError,
    Outcome,
    PeerFailedError,
    PeerLostError,
    ScopeMismatchError,
    Verdict,
    collective_scope,
    current_scope,
)


def add(a: int, b: str = "") -> float:
    """Be a function with a signature to keep."""
    return a + len(b)


class Buffer:
    """Be something to hold."""

    def destroy(self) -> None:
        """Be a collective cleanup."""


class Coordinator:
    """Look like vLLM's."""

    cpu_group: Any
    device_group: Any


class Communicator:
    """Look like mpi4py's."""

    def Get_rank(self) -> int:  # noqa: N802  (a name of mpi4py's)
        """Return the rank."""
        return 0

    def Ibcast(self, buf: Any, root: int = 0) -> Any:  # noqa: N802  (a name of mpi4py's)
        """Send to all."""

    def Get_attr(self, keyval: int) -> Any:  # noqa: N802  (a name of mpi4py's)
        """Return what is remembered."""


class Stateless:
    """Look like vLLM's StatelessProcessGroup."""

    store: Any
    rank: int
    world_size: int


def find_group() -> dist.ProcessGroup | None:
    """Be a function that returns a group."""
    return None


def groups(group: dist.ProcessGroup, mesh: dist.DeviceMesh) -> None:
    """Accept every kind of group, and nothing else."""
    collective_scope()
    collective_scope(None)
    collective_scope(group)
    collective_scope(mesh)
    collective_scope(mesh["tp"])
    collective_scope(Coordinator())
    collective_scope(Communicator())
    collective_scope(Stateless())
    collective_scope(dist.GroupMember.NON_GROUP_MEMBER)
    collective_scope(find_group)
    collective_scope(lambda: group)
    collective_scope("nccl")  # type: ignore[arg-type]  # wrong on purpose
    collective_scope(group, "s")  # type: ignore[call-arg]  # wrong on purpose


def options() -> None:
    """Take times in either form, and cleanups as any iterable."""
    collective_scope(name="s", timeout=3, failure_timeout=1.5, warn_after=0.5)
    collective_scope(timeout=timedelta(seconds=3), failure_timeout=None, name=None)
    collective_scope(cleanups=[Buffer().destroy, lambda: 3], synchronize=False, lockstep_gc=True, meet_at_entry=True)
    collective_scope(warn_after=None, kill_after=60)
    collective_scope(timeout="3")  # type: ignore[arg-type]  # wrong on purpose
    collective_scope(name=3)  # type: ignore[arg-type]  # wrong on purpose


def block() -> None:
    """Give a scope, and let errors through: what follows the block is reached only without one."""
    with collective_scope() as scope:
        assert_type(scope, CollectiveScope)
        assert_type(current_scope(), CollectiveScope)
        assert_type(current_scope(None), CollectiveScope | None)
        assert_type(current_scope(default=3), CollectiveScope | int)
        assert_type(scope.name, str)
        scope.fail(ValueError())
        scope.fail("no")  # type: ignore[arg-type]  # wrong on purpose
        value = 3
    assert_type(scope.verdict, Verdict | None)
    assert_type(value, int)


def returns() -> int:
    """Need no return after the block: the scope suppresses nothing."""
    with collective_scope():
        return 3


def registration(scope: CollectiveScope) -> None:
    """Check arguments against the function, where they can be, and return what was given."""
    assert_type(scope.cleanup(add, 1, b="x")(1), float)
    assert_type(scope.after_barrier(add, 1)(1), float)
    scope.cleanup(add)  # type: ignore[call-arg]  # wrong on purpose
    scope.cleanup(add, "x")  # type: ignore[arg-type]  # wrong on purpose
    assert_type(scope.after_barrier(add, 1, even_if_missing=True), Callable[..., float])
    scope.after_barrier(add, 1, even_if_missing="yes")  # type: ignore[arg-type]  # wrong on purpose
    assert_type(scope.collective_cleanup(Buffer().destroy), Callable[..., None])
    assert_type(scope.collective_cleanup(add, 1, name="add", fingerprint=lambda: 3), Callable[..., float])
    scope.collective_cleanup(add, 1, fingerprint=3)  # type: ignore[arg-type]  # wrong on purpose
    assert_type(scope.hold(Buffer()), Buffer)
    assert_type(scope.enter_context(nullcontext("value")), str)
    scope.enter_context(3)  # type: ignore[arg-type]  # wrong on purpose

    @scope.cleanup
    def local() -> None: ...

    @scope.collective_cleanup
    def collective() -> None: ...

    assert_type(local(), None)
    assert_type(collective(), None)


@collective_scope()
def decorated(a: int, *, b: str = "") -> float:
    """Be a function with a signature to keep."""
    return add(a, b)


class Suite:
    """Have a method to decorate."""

    @collective_scope(find_group, name="method")
    def method(self, a: int) -> str:
        """Be decorated."""
        return str(a)


def decoration() -> None:
    """Keep the signature of what is decorated."""
    assert_type(decorated(3), float)
    assert_type(decorated(3, b="x"), float)
    assert_type(Suite().method(3), str)
    decorated("3")  # type: ignore[arg-type]  # wrong on purpose
    decorated(3, "x")  # type: ignore[call-arg]  # wrong on purpose


def errors(error: CollectiveScopeError) -> None:
    """Have the facts as attributes of known types."""
    assert_type(error.verdict, Verdict)
    match error:
        case PeerFailedError():
            assert_type(error.failures, Mapping[int, Outcome])
        case BarrierTimeoutError():
            assert_type(error.missing, tuple[int, ...])
            assert_type(error.timeout, float)
        case PeerLostError():
            assert_type(error.lost, tuple[int, ...])
        case ScopeMismatchError():
            assert_type(error.names, Mapping[int, str])
        case CleanupMismatchError():
            assert_type(error.cleanups, Mapping[int, tuple[tuple[str, str], ...]])
        case _:
            pass


def verdicts(verdict: Verdict, outcome: Outcome) -> None:
    """Tell what happened in known types."""
    assert_type(verdict.outcomes, Mapping[int, Outcome])
    assert_type(verdict.failures, dict[int, Outcome])
    assert_type(verdict.missing, tuple[int, ...])
    assert_type(verdict.lost, tuple[int, ...])
    assert_type(verdict.ok, bool)
    assert_type(verdict.complete, bool)
    assert_type(outcome.ok, bool)
    assert_type((outcome.phase, outcome.type_name, outcome.message, outcome.traceback), tuple[str, str, str, str])
    assert_type(outcome.also, tuple[str, ...])
    verdict.scope = "other"  # type: ignore[misc]  # wrong on purpose
