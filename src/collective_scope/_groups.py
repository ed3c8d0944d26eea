"""
What may be passed as ``group``, and this rank's membership in it.

The only module that knows torch's groups, stores and meshes, and torch's private names.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast, runtime_checkable

import attrs
import torch
import torch.distributed as dist

from ._mpi import Communicator, is_communicator, membership_attribute, store_of
from .agreement.barrier import Barrier
from .agreement.control import Control
from .agreement.part import Part
from .agreement.process import serves_store
from .agreement.revocation import Renewal
from .agreement.store_thread import base_of, knock
from .agreement.text import shorten


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

logger = logging.getLogger("collective_scope")


@runtime_checkable
class GroupCoordinator(Protocol):
    """What vLLM and SGLang call a group: one process group for CPU tensors and one for the device's."""

    cpu_group: Any
    device_group: Any


@runtime_checkable
class StoreGroup(Protocol):
    """Ranks that share a store, such as vLLM's ``StatelessProcessGroup``."""

    store: Any
    rank: Any
    world_size: Any


Group: TypeAlias = dist.ProcessGroup | dist.DeviceMesh | GroupCoordinator | StoreGroup | Communicator | int | None

GroupLike: TypeAlias = Group | Callable[[], Group]

ACCEPTED = (
    "group must be None, a ProcessGroup, a DeviceMesh of one dimension, an object with cpu_group and device_group"
    " (vLLM, SGLang), an object with store, rank and world_size, an mpi4py communicator,"
    " or a function without arguments that returns one of these"
)


@attrs.define(eq=False)
class Membership:
    """
    What the scopes of one rank share about a group.

    Attributes:
        barrier: The rank's barrier; None if it has no peers.
        renewal: The group itself, if it can be revoked and made again.
        open: The scopes on this group that have been entered and not left, outermost first.
        store: The group's store, if only this keeps it: it has to outlive a group that the body destroys.
    """

    barrier: Barrier | None = None
    store: Store | None = None
    renewal: Renewal | None = None
    open: list[Any] = attrs.field(factory=list, init=False)


_memberships: weakref.WeakKeyDictionary[Any, Membership] = weakref.WeakKeyDictionary()
_controls: dict[tuple[object, ...], Control] = {}
_making = threading.Lock()


def _forget() -> None:
    """Start afresh in a forked child: it has its parent's objects, but none of the threads."""
    global _making  # noqa: PLW0603  (another thread of the parent may have held it)
    _making = threading.Lock()
    _memberships.clear()
    _controls.clear()


os.register_at_fork(after_in_child=_forget)


def outside() -> Membership:
    """Return the membership of a rank that has no peers."""
    return Membership()


def find(group: GroupLike) -> tuple[Membership, object] | None:  # noqa: PLR0911  (a return for each kind)
    """
    Return this rank's membership in *group*, and what has to stay alive while that is used.

    None if *group* is None and there is no default group (yet).

    Raises:
        TypeError: If *group* is none of what is accepted, or has peers and no store that can be used.
        ValueError: If *group* is a mesh of several dimensions, or was destroyed.
    """
    if callable(group) and not isinstance(group, StoreGroup):
        group = group()
    if is_communicator(group):
        return _of_communicator(group), group
    if group is None:
        world = default_group()
        return None if world is None else (_of_process_group(world), world)
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        return outside(), None
    if isinstance(group, dist.ProcessGroup):
        return _of_process_group(group), group
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            msg = (
                f"a DeviceMesh must have one dimension (got {group.ndim}: {group.mesh_dim_names});"
                " pass mesh['name'] for one of them or mesh._flatten() for all"
            )
            raise ValueError(msg)
        return (outside(), None) if group.get_coordinate() is None else find(group.get_group())
    if isinstance(group, GroupCoordinator):
        # The CPU group: its collectives cannot be stuck behind a kernel.
        return find(group.cpu_group)
    if isinstance(group, StoreGroup):
        return _of_store(group, group.store, int(group.rank), int(group.world_size)), group
    hint = f"; did you mean name={group!r}?" if isinstance(group, str) else ""
    msg = f"{ACCEPTED} (got {shorten(repr(group), 100)}, a {type(group).__qualname__}){hint}"
    raise TypeError(msg)


def default_group() -> ProcessGroup | None:
    """Return the default group; None if there is none."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def place_in_world() -> tuple[int, int]:
    """Return this process's rank in the default group, and that group's size; 0 of 1 without one."""
    is_there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_there else (0, 1)


def is_destroyed(group: object) -> bool:
    """Whether *group* is a process group that torch knew and knows no more."""
    if not isinstance(group, dist.ProcessGroup) or group in dist.distributed_c10d._world.pg_map:  # noqa: SLF001
        return False
    try:
        name = group.group_name
    except RuntimeError:  # made by hand, and never known to torch
        return False
    try:
        torch._C._distributed_c10d._resolve_process_group(name)  # noqa: SLF001
    except RuntimeError:
        return True
    return False


def trace_of_a_default_group() -> object:
    """Return something that changes when a default group is made: torch puts its rank into ``sys.excepthook``."""
    return sys.excepthook


def has_appeared(trace: object) -> bool:
    """Whether a default group has been made since `trace_of_a_default_group` returned *trace*."""
    return sys.excepthook is not trace and getattr(sys.excepthook, "__name__", "") == "_distributed_excepthook"


def has_accelerator() -> bool:
    """Whether this machine has an accelerator that torch can use."""
    return torch.accelerator.current_accelerator() is not None


def synchronize_accelerator() -> None:
    """Wait for the work that this process has given its accelerator, if it uses one."""
    device = torch.accelerator.current_accelerator()
    # A process that has not touched its accelerator shall not create a context on it now.
    is_initialized = getattr(torch.get_device_module(device), "is_initialized", None)
    if is_initialized is None or is_initialized():
        torch.accelerator.synchronize()


def _of_process_group(group: ProcessGroup) -> Membership:
    membership = _memberships.get(group)
    if is_destroyed(group):
        msg = "group was destroyed, or belongs to an earlier init_process_group"
        raise ValueError(msg)
    if membership is not None:
        return membership
    is_known = group in dist.distributed_c10d._world.pg_map  # noqa: SLF001
    if group.size() == 1 or (is_known and dist.get_backend(group) == "fake"):
        return outside()
    ranks = dist.get_process_group_ranks(group) if is_known else None
    return _of_store(group, _store(group), group.rank(), group.size(), ranks)


def _store(group: ProcessGroup) -> Store | None:
    try:
        store = group.get_group_store()
    except RuntimeError:  # a group that is written in Python has none in C++
        store = None
    if store is None and group in dist.distributed_c10d._world.pg_map:  # noqa: SLF001
        store = dist.distributed_c10d._world.pg_map[group][1]  # noqa: SLF001
    return store


def _of_communicator(comm: Any) -> Membership:
    there, remember = membership_attribute(comm)
    membership: Membership | None = there
    if membership is None:
        found = store_of(comm)
        membership = outside() if found is None else _make(comm, found, comm.Get_rank(), comm.Get_size(), None)
        membership.store = found
        remember(membership, lambda: _end(membership))
    return membership


def _of_store(owner: object, store: Any, rank: int, world_size: int, ranks: list[int] | None = None) -> Membership:
    """Return the membership that belongs to *owner*, the group; it ends with that."""
    if world_size == 1 and not isinstance(owner, Renewal):
        return outside()
    try:
        membership = _memberships.get(owner)
    except TypeError as error:
        msg = f"group must be an object that can be weakly referenced (got {owner!r})"
        raise TypeError(msg) from error
    if membership is None:
        membership = outside() if world_size == 1 else _make(owner, store, rank, world_size, ranks)
        membership.renewal = owner if isinstance(owner, Renewal) else None
        _memberships[owner] = membership
        weakref.finalize(owner, _end, membership)
    return membership


def _make(owner: object, store: Any, rank: int, world_size: int, ranks: list[int] | None) -> Membership:
    if not isinstance(store, dist.Store) or not _can_be_cloned(store):
        msg = f"group {owner!r} has {world_size} ranks and no store that can be cloned (got {store!r})"
        raise TypeError(msg)
    ranks = ranks or list(range(world_size))
    connect = functools.partial(_clone, weakref.ref(store))
    control = _control(store, connect)
    part = Part(connect, rank, world_size, control.heard)
    control.groups[id(part)] = part
    global_ranks = () if ranks == list(range(world_size)) else tuple(ranks)
    barrier = Barrier(part, control, _server(store, ranks, rank), global_ranks)
    return Membership(barrier, store if control.serves else None)


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
    key = (os.getpid(), base.host, base.port) if is_tcp else (os.getpid(), id(base))
    with _making:
        control = _controls.get(key)
        if control is None or control.broken is not None:
            serves = is_tcp and serves_store(base.port)
            # A store that has no address is known by its identity, so it has to stay.
            control = _controls[key] = Control(connect, store if serves or not is_tcp else None, serves=serves)
            world = default_group()
            theirs = None if world is None else _store(world)
            if world is not None and theirs is not None and base_of(theirs) is base:
                # Groups come and go: as long as there is a default group on this store, the thread stays.
                control.groups[id(world)] = None
                weakref.finalize(world, _release, control, id(world))
    return control


def _end(membership: Membership) -> None:
    """Leave a group that has been destroyed here."""
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


def _server(store: Store, ranks: list[int], rank: int) -> int | None:
    """Return the rank, within the group, whose process serves the store; None if none does. A guess, except for *rank*."""
    base = base_of(store)
    if not isinstance(base, dist.TCPStore):
        return None
    if serves_store(base.port):
        return rank
    # torchrun serves the store in its agent and says so; otherwise it is global rank 0
    # (torch/distributed/rendezvous.py), unless it was made by hand.
    is_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return None if is_by_agent or 0 not in ranks or ranks.index(0) == rank else ranks.index(0)
