"""The function that users call, and what it accepts."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ._arrival import Options
from ._environment import Seconds, seconds_of
from ._groups import GroupLike
from ._scope import CollectiveScope
from .agreement.rounds import cap


TIMEOUT_S = 300.0
FAILURE_TIMEOUT_S = 30.0
WARN_AFTER_S = 10.0
HEARTBEAT_TIMEOUT_S = 30.0

_UNSET: Any = object()


def collective_scope(
    group: GroupLike = None,
    *,
    name: str | None = None,
    cleanups: Iterable[Callable[[], object]] = (),
    timeout: Seconds | None = None,
    failure_timeout: Seconds | None = None,
    warn_after: Seconds | None = _UNSET,
    kill_after: Seconds | None = None,
    meet_at_entry: bool = False,
    synchronize: bool = True,
    lockstep_gc: bool = False,
) -> CollectiveScope:
    """
    Run a body on every rank of *group*, clean up, and leave together.

    On exit, whether or not the body raised, each rank

    1. tells its peers at once if it failed, and logs its traceback,
    2. waits for its accelerator, and runs its cleanups, last registered first, down to the first collective one,
    3. arrives at the barrier and waits, at most *timeout*, for the verdict of all ranks,
    4. runs the rest of its cleanups, last registered first, the collective ones in lockstep and only if
       all ranks agreed on them, and arrives again; without a collective cleanup, 3 was the end of it,
    5. runs what was registered with `CollectiveScope.after_barrier`, if no rank is missing; its errors are this rank's alone,
    6. returns if every rank arrived and none failed; otherwise raises, like every other rank.

    Collective:
        Every rank of *group* must go through the same scopes in the same order.

    Args:
        group:
            ``None`` (the default group), a ``ProcessGroup``, a ``DeviceMesh`` of
            one dimension, a ``GroupCoordinator`` as in vLLM and SGLang, an object
            with ``store``, ``rank`` and ``world_size``, an mpi4py communicator, or
            a function without arguments that returns one of these. ``None``, and a
            function that returns it, are looked up at the entry and, if there is
            no group yet, again at the exit. On a rank outside of the group, and
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
            failed, itself included; and at an entry, where *timeout* is the
            limit if it is shorter, but not while a `RenewableGroup` is made. Default: ``COLLECTIVE_SCOPE_FAILURE_TIMEOUT``, or 30.

        warn_after:
            When the log first says which ranks are late and where they are, in
            seconds; then at 3, 6, 12, 24, 36, ... times that.
            At the barrier, each rank that waits says it; while all ranks are in
            their bodies or cleanups, the lowest one says it for all. None
            switches it off. Default: ``COLLECTIVE_SCOPE_WARN_AFTER``, or 10.

        kill_after:
            Longest time from entry to exit, in seconds. When it has passed, a
            rank that is not at the barrier says on stderr where every rank is,
            tells its peers, and ends its process with exit code 124. Until then it needs the one
            timer of ``faulthandler``, so pytest's ``faulthandler_timeout`` does not count. Default: none.

        meet_at_entry:
            Whether the ranks also meet before the body, so that bodies of
            different scopes never overlap. Costs a second barrier. After a
            barrier to which not all ranks came, they meet in any case.

        synchronize: Whether to wait for the accelerator before the cleanups.

        lockstep_gc:
            Keep the cyclic garbage collector off in the body and collect once
            in the teardown, before any cleanup, at the same point on every
            rank. The frames of a failed body lose their locals. A collection
            takes about 50 ms in a process that has imported torch, and half a
            second in one that has imported vLLM; after one ``gc.freeze()``
            before the first scope, next to nothing.

    Returns:
        A scope to use once, as ``with collective_scope(): ...``, or as a decorator.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a time is not positive and finite, or the environment's is no number.

    Entering or leaving the scope raises:

    * the body's own exception, unchanged, on the rank that raised it;
    * otherwise the cleanups' error, or an ``ExceptionGroup`` of several;
    * otherwise `PeerFailedError`, `BarrierTimeoutError`, `PeerLostError`,
      `ScopeMismatchError` or `CleanupMismatchError`;
    * ``RuntimeError`` if the scope is used against the rules: entered twice, or
      while another thread of the process is in a scope of the same group, or
      left out of order or by another thread, or entered by *make* on the group that this makes;
    * ``TypeError`` if *group* is none of what is accepted, or has peers and no store that can be
      cloned; ``ValueError`` if it is a mesh of several dimensions, or was destroyed;
    * the error of *make* of a `RenewableGroup`, on the rank on which it was raised.

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
    if name is not None and not isinstance(name, str):
        msg = f"name must be a text (got {name!r})"
        raise TypeError(msg)
    if callable(cleanups):
        msg = f"cleanups must be a list of functions (got {cleanups!r})"
        raise TypeError(msg)
    caller = sys._getframe(1)  # noqa: SLF001  (documented; what warnings and logging use)
    where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
    return CollectiveScope(
        group=group,
        name=cap(name) if name else os.path.basename(where),  # noqa: PTH119  (cheap; there is no path to handle)
        is_named=bool(name),
        where=where,
        given=tuple(cleanups),
        options=Options(
            timeout=_seconds("timeout", timeout, TIMEOUT_S),
            failure_timeout=_seconds("failure_timeout", failure_timeout, FAILURE_TIMEOUT_S),
            warn_after=(
                None
                if warn_after is None
                else _seconds("warn_after", None if warn_after is _UNSET else warn_after, WARN_AFTER_S)
            ),
            heartbeat_timeout=_seconds("heartbeat_timeout", None, HEARTBEAT_TIMEOUT_S),
            kill_after=None if kill_after is None else _seconds("kill_after", kill_after, math.inf),
            synchronize=synchronize,
            lockstep_gc=lockstep_gc,
            meet_at_entry=meet_at_entry,
        ),
    )


def _seconds(parameter: str, value: Seconds | None, default: float) -> float:
    """Return a time in seconds: the argument, or the environment's, or the default."""
    if value is None:
        source = f"COLLECTIVE_SCOPE_{parameter.upper()}"
        text = os.environ.get(source)
        if text is None:
            return default
        try:
            given = float(text)
        except ValueError:
            msg = f"{source} must be seconds as a number (got {text!r})"
            raise ValueError(msg) from None
        return seconds_of(source, given)
    return seconds_of(parameter, value)
