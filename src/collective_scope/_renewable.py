"""
A group that can be revoked when a rank fails, and made again for the next scope.

A rank that fails before its collectives leaves its peers stuck in theirs. No timeout of a collective
gives the group back. So the communicators are made to fail on every rank, which frees the peers
within a second, and are made again, by all ranks together, when the next scope is entered.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from . import _notes
from ._environment import Seconds, check_arguments, make_default_group, seconds_of, store_of_launcher
from ._torch import (
    abort_nccl,
    all_groups,
    connect_nccl,
    destroy_group,
    forget_unfinished_groups,
    groups_so_far,
    is_nccl,
    synchronize_accelerator,
    within,
)
from .agreement.sockets import Connections
from .agreement.store_thread import base_of


Make = Callable[[dist.Store], Any]

DESTROY_S = 30.0
"""How long destroying the group may take; torch itself has no bound."""


class RenewableGroup:
    """
    A group of scopes whose communicators are made by *make*, and made again after a failure.

    Use it as ``collective_scope(world)``. The ranks agree over *store*, which is never revoked.

    * The first scope that is entered makes the group, on all ranks together; it is kept as long as
      scopes succeed, and also after a failure if all ranks come to the exit within *grace*: then no
      rank is stuck. It is not kept if it cannot work any more: after a time limit of its own, for example.
    * Otherwise the group is revoked: a rank that is stuck in a collective comes back within a
      second, with an error or with wrong values. Its body is interrupted if it goes on, and the
      scope fails on every rank. The same becomes of ranks that do not come within the scope's *timeout*.
    * The next scope destroys the old group and makes a new one, on all ranks together.

    Collective:
        Every rank makes one, and enters the same scopes on it.

    Args:
        make:
            Called with a fresh store, on every rank; builds everything that a failed scope may
            leave unusable: ``dist.init_process_group(..., store=store, ...)``, sub-groups, a
            mesh, model-parallel state. Its result is `value`. NCCL communicators of its groups
            are connected before the first body, because a rank that waits for its peers in the first
            collective of a communicator cannot be freed. Groups that a body makes are revoked, too,
            and are gone after that. Default: the default group, with NCCL where there is a GPU for
            each local rank, and gloo otherwise.
        store:
            A store for the ranks to meet at. It must outlive every group, and no group may own it.
            Default: the TCPStore of torchrun's environment; outside of torchrun, rank 0 serves it.
        rank: This rank. Default: the environment's ``RANK``.
        world_size: Number of ranks. Default: the environment's ``WORLD_SIZE``.
        destroy:
            Takes down what *make* has built. Default: ``dist.destroy_process_group`` of all groups;
            of the one that *make* returned, if it did not make the default group.
        grace: Seconds, or a ``timedelta``, from a failure until the group is revoked, if not all have come to the exit.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is not given and not in the environment, or makes no sense.

    Attributes:
        value: What *make* returned last; None before.
        made: How many times the group has been made.
    """

    def __init__(
        self,
        make: Make | None = None,
        *,
        store: dist.Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        destroy: Callable[[], object] | None = None,
        grace: Seconds = 0.5,
    ) -> None:
        check_arguments(make=make, store=store, rank=rank, world_size=world_size, destroy=destroy)
        self.grace = seconds_of("grace", grace, may_be_zero=True)
        self.rank = int(os.environ["RANK"]) if rank is None else int(rank)
        self.world_size = int(os.environ["WORLD_SIZE"]) if world_size is None else int(world_size)
        if not 0 <= self.rank < self.world_size:
            msg = f"rank must be at least 0 and less than world_size (got {self.rank} of {self.world_size})"
            raise ValueError(msg)
        self.store = store_of_launcher(self.rank) if store is None else store
        self.value: Any = None
        self.made = 0
        self.is_due = True
        """Whether the next scope has to make the group."""
        self._make = make or functools.partial(make_default_group, rank=self.rank, world_size=self.world_size)
        self._destroy = destroy or self._destroy_default
        self._attempts = 0
        self._connections = Connections(self._port)
        self._named = 0
        """How many groups torch had named when make() was done."""
        self._known: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
        """Groups that were there before the latest make."""
        self._of_make: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
        self._callbacks: list[Callable[[], object]] = []
        self._exists = self._is_revoked = False
        self._lock = threading.Lock()
        """Nothing is made or destroyed while the group is being revoked: torch hangs if it is."""

    def __repr__(self) -> str:
        return f"<RenewableGroup, rank {self.rank} of {self.world_size}, made {self.made} times>"

    def on_revoke(self, fn: Callable[[], object]) -> None:
        """
        Have *fn* called when the group is revoked: for communicators that torch does not know.

        To be called by *make*, each time. *fn* is called on a thread of its own, on every rank, while
        the rank's own thread may be stuck in that communicator. If *fn* raises, or does not return
        within 20 s, the rank may stay stuck: its process is ended, with exit code 124.

        Raises:
            TypeError: If *fn* is not callable.
        """
        if not callable(fn):
            msg = f"fn must be callable (got {fn!r})"
            raise TypeError(msg)
        self._callbacks.append(fn)

    def destroy(self) -> None:
        """
        Take down what there is, when no scope needs it any more; there may be nothing.

        Collective:
            Every rank does so at the same time.

        Raises:
            TimeoutError: If it takes longer than `DESTROY_S` seconds, or an abort of it does.
            Exception: The error of *destroy*, unless the group was revoked before.
        """
        with self._left_alone():
            self._take_down()
        self.is_due = True

    # Called by the scope, on the rank's thread.

    def renew(self, life: str) -> None:
        """
        Destroy what there is, and make it anew; all ranks do so at the same time.

        Args:
            life: What no other group on this store was ever called; the same on all ranks.
        """
        with self._left_alone():
            earlier = self._take_down()
            self._attempts += 1
            self._is_revoked = False
            synchronize_accelerator()  # raises if the device is not usable any more
            self._known = weakref.WeakSet(all_groups())
            self._connections = Connections(self._port)
            client = self._connections.open_client(self.store.clone)  # type: ignore[attr-defined]  # missing in torch's stubs
            store = dist.PrefixStore(f"collective_scope/{life}/made {self._attempts}", client)
            self._exists = True
            try:
                self.value = self._make(store)
            except BaseException as error:
                if earlier is not None:
                    error.add_note(_notes.destroy_had_failed(earlier))
                raise
            finally:
                self._connections.note()
                self._of_make = weakref.WeakSet(self._groups)
                self._named = groups_so_far()
            self.made += 1

    def abandon(self) -> None:
        """
        Begin to revoke what a peer has revoked, and to abort NCCL, which takes a second; the next scope waits for it.

        When all ranks have come to the exit: no kernel of a peer reads the memory any more that an abort
        frees. A rank that its peers have freed may have come there before it revoked its own end.
        """
        if (self.interrupts_first or not self._is_revoked) and self._lock.acquire(blocking=False):

            def revoke() -> None:
                try:
                    self._revoke(is_at_work=True)
                finally:
                    self._lock.release()

            threading.Thread(target=revoke, name="collective_scope-revoke", daemon=True).start()

    def connect(self) -> None:
        """
        Have the NCCL communicators made; all ranks do so at the same time, when all have made the group.

        Not in `renew`: the peers of a rank whose *make* fails would wait there, and could not be freed. Nor can
        those of a rank whose device fails just here; ``kill_after`` ends them.
        """
        connect_nccl(self._groups)

    # Called by the control thread; `revoke` on a thread of its own.

    @property
    def interrupts_first(self) -> bool:
        """Whether a body is interrupted before the group is revoked: where that frees what kernels work on."""
        return any(is_nccl(group) for group in self._groups)

    def revoke(self, *, is_at_work: bool) -> None:
        """
        Make every communicator of the group fail, for this rank and for its peers.

        Args:
            is_at_work: Whether this rank may have work in flight. Only such a rank aborts its NCCL
                communicators now: an abort frees memory that a peer's kernel may still be reading.
        """
        if not self._lock.acquire(blocking=False):
            # The rank is making the group, and a peer failed to: let it stop waiting for that one.
            self._connections.cut_unfinished()
            return
        try:
            if not self._is_revoked:
                self._revoke(is_at_work=is_at_work)
        finally:
            self._lock.release()

    def _revoke(self, *, is_at_work: bool) -> None:
        """Do it, with the lock held; what was done already, again only if it does no harm."""
        if not self._exists:
            return
        groups, is_first = self._groups, not self._is_revoked
        self._is_revoked = self.is_due = True
        with contextlib.ExitStack() as steps:  # the last one first; each is taken, whatever another one raises
            if is_first:
                # A body has made groups; one that it has destroyed may still be connected, if anything refers to it.
                if groups_so_far() > self._named or any(group not in self._of_make for group in groups):
                    steps.callback(self._connections.cut_accepted)
                # NCCL's monitor says at length that it has lost the store.
                steps.callback(self._connections.cut, with_client=not self.interrupts_first)
            if is_at_work:
                steps.callback(abort_nccl, groups)
            for callback in reversed(self._callbacks if is_first else ()):
                steps.callback(callback)

    @contextlib.contextmanager
    def _left_alone(self) -> Iterator[None]:
        """Wait until nothing is being aborted, and keep it so."""
        if not self._lock.acquire(timeout=DESTROY_S):
            msg = f"aborting the group took longer than {DESTROY_S:.0f} s"
            raise TimeoutError(msg)
        try:
            yield
        finally:
            self._lock.release()

    @property
    def _groups(self) -> list[dist.ProcessGroup]:
        """The groups that make() has made, and the bodies since."""
        return [group for group in all_groups() if group not in self._known]

    @property
    def _port(self) -> int | None:
        """Where the store is served, which is never cut off."""
        return getattr(base_of(self.store), "port", None)

    def _take_down(self) -> BaseException | None:
        """Destroy what there is; return the error of that if the group was revoked: it may be gone already."""
        if not self._exists:
            return None

        def destroy() -> None:
            if self._is_revoked:
                abort_nccl(self._groups)
            self._destroy()

        error = within(DESTROY_S, "destroying the group", destroy)
        self.value, self._exists = None, False
        self._callbacks = []
        forget_unfinished_groups()
        if error is not None and not self._is_revoked:
            raise error
        return error

    def _destroy_default(self) -> None:
        value, self.value = self.value, None
        destroy_group(value, self._groups)
