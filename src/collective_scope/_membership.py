"""The membership of this rank in a group: its barrier, and the control thread that all groups of a store share."""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch.distributed as dist

from ._environment import launcher_serves_store
from ._torch import default_group, store_of
from .agreement.barrier import Barrier
from .agreement.control import Control
from .agreement.part import Part
from .agreement.process import me
from .agreement.revocation import Renewal
from .agreement.sockets import serves_store
from .agreement.store_thread import base_of, knock


if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger("collective_scope")


@attrs.define(eq=False)
class Membership:
    """
    What the scopes of one rank share about a group.

    Attributes:
        barrier: The rank's barrier; None if it has no peers.
        renewal: The group itself, if it can be revoked and made again.
        open: The scopes on this group that have been entered and not left, outermost first.
        dead_since: Name of the scope since which the group does not work, as gloo opens no connection again; for one
            that can be renewed, the latest scope after which it has to be. Empty if there is none.
        store: The group's store: this object has to stay as long as the group, also where only C++ knows it.
    """

    barrier: Barrier | None = None
    store: Store | None = None
    renewal: Renewal | None = None
    dead_since: str = attrs.field(default="", init=False)
    open: list[Any] = attrs.field(factory=list, init=False)


memberships: dict[int, Membership] = {}
"""By the identity of what each belongs to, which may be equal to another, or have no hash."""

_controls: dict[tuple[object, ...], Control] = {}
_making = threading.Lock()


def _forget() -> None:
    """Start afresh in a forked child: it has its parent's objects, but none of the threads."""
    global _making  # noqa: PLW0603  (another thread of the parent may have held it)
    _making = threading.Lock()
    memberships.clear()
    _controls.clear()


os.register_at_fork(after_in_child=_forget)


def of_store(owner: object, store: Any, rank: int, world_size: int, ranks: list[int] | None = None) -> Membership:
    """Return the membership that belongs to *owner*, the group; it ends with that."""
    if world_size == 1 and not isinstance(owner, Renewal):
        return Membership()
    membership = memberships.get(id(owner))
    if membership is None:
        try:
            weakref.ref(owner)
        except TypeError as error:
            msg = f"group must be an object that can be weakly referenced (got {owner!r})"
            raise TypeError(msg) from error
        membership = Membership() if world_size == 1 else make(owner, store, rank, world_size, ranks)
        membership.renewal = owner if isinstance(owner, Renewal) else None
        memberships[id(owner)] = membership
        weakref.finalize(owner, end, membership, id(owner))
    return membership


def make(owner: object, store: Any, rank: int, world_size: int, ranks: list[int] | None) -> Membership:
    if not isinstance(store, dist.Store) or not _can_be_cloned(store):
        msg = f"group {owner!r} has {world_size} ranks and no store that can be cloned (got {store!r})"
        raise TypeError(msg)
    ranks = ranks or list(range(world_size))
    connect = functools.partial(_clone, weakref.ref(store))
    control = _control(store, connect)
    process = attrs.evolve(me(), serves=control.serves)
    server = rank if control.serves else _guess_server(store, ranks, rank)
    part = Part(connect, rank, world_size, control.heard, control.items, process, server)
    control.groups[id(part)] = part
    global_ranks = () if ranks == list(range(world_size)) else tuple(ranks)
    barrier = Barrier(part, control, global_ranks)
    return Membership(barrier, store)


def _can_be_cloned(store: Store) -> bool:
    base = base_of(store)
    if isinstance(base, dist.TCPStore | dist.FileStore | dist.HashStore):
        return True
    try:
        return isinstance(base.clone(), dist.Store)  # type: ignore[attr-defined]  # torch's stub lacks it
    except (RuntimeError, AttributeError):
        return False


def _control(store: Store, connect: Callable[[], Store]) -> Control:
    """Return the control thread over the store that *store* is a view of; all groups share it."""
    base: Any = base_of(store)
    is_tcp = isinstance(base, dist.TCPStore)
    key = (base.host, base.port) if is_tcp else (id(base),)
    with _making:
        control = _controls.get(key)
        if control is None or control.broken is not None:
            serves = is_tcp and serves_store(base.port)
            # A store that has no address is known by its identity, so it has to stay.
            control = _controls[key] = Control(connect, store if serves or not is_tcp else None, serves=serves)
            world = default_group()
            theirs = None if world is None else store_of(world)
            if world is not None and theirs is not None and base_of(theirs) is base:
                # Groups come and go: as long as there is a default group on this store, the thread stays.
                control.groups[id(world)] = None
                weakref.finalize(world, _release, control, id(world))
    return control


def end(membership: Membership, owner: int = 0) -> None:
    """Leave a group that has been destroyed here; *owner* is the identity of what the membership belonged to."""
    if memberships.get(owner) is membership:
        del memberships[owner]
    barrier = membership.barrier
    if barrier is not None and barrier.control.pid == os.getpid():
        after = f" after scope {barrier.control.left!r}" if barrier.control.left else ""
        barrier.leave(f"has destroyed its group{after}")
        _release(barrier.control, id(barrier.part))
    membership.store = None


def _release(control: Control, user: int) -> None:
    """End a control thread that no group needs any more."""
    control.groups.pop(user, None)
    if not control.groups and control.pid == os.getpid():
        for key in [key for key, each in list(_controls.items()) if each is control]:
            _controls.pop(key, None)
        control.close()


def _clone(ref: weakref.ref[Store]) -> Store:
    store = ref()
    if store is None:
        msg = "the group's store is gone: the group was destroyed"
        raise RuntimeError(msg)
    try:
        knock(store)
    except ConnectionRefusedError as error:
        base: Any = base_of(store)
        msg = f"the group's store at {base.host}, port {base.port}, is gone: {error}"
        raise RuntimeError(msg) from error
    except OSError as error:  # cut off, perhaps for a while only: clone() goes on trying
        logger.debug("the group's store cannot be reached: %s", error)
    # A client of its own: one connection has one lock, which a waiting thread holds.
    return cast("Store", store.clone())  # type: ignore[attr-defined]  # torch's stub lacks it


def _guess_server(store: Store, ranks: list[int], rank: int) -> int | None:
    """Return the rank, within the group, whose process serves the store, if not *rank*; None if none does. A guess."""
    if not isinstance(base_of(store), dist.TCPStore):
        return None
    # Global rank 0 does (torch/distributed/rendezvous.py), unless a launcher does, or the store was made by hand.
    return None if launcher_serves_store() or 0 not in ranks or ranks.index(0) == rank else ranks.index(0)
