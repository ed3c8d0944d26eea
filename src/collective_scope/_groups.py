"""
What may be passed as ``group``, and the barrier that belongs to it.

The only module that knows torch's groups, stores and meshes.
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
import torch.distributed as dist

from ._barrier import Barrier
from ._plain_barrier import PlainBarrier
from ._process import serves_store
from ._store_thread import base_of, knock
from ._watcher import Watcher


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store


@runtime_checkable
class GroupCoordinator(Protocol):
    """What vLLM and SGLang call a group: one process group for CPU tensors and one for the device's."""

    cpu_group: Any
    device_group: Any


@runtime_checkable
class Communicator(Protocol):
    """What mpi4py calls a group, as far as it is used here."""

    def Barrier(self) -> object:  # noqa: N802  (mpi4py's name)
        """Wait for all ranks."""


Group: TypeAlias = dist.ProcessGroup | dist.DeviceMesh | GroupCoordinator | Communicator | int | None
GroupLike: TypeAlias = Group | Callable[[], Group]
AnyBarrier: TypeAlias = Barrier | PlainBarrier

ACCEPTED = (
    "group must be None, a ProcessGroup, a DeviceMesh of one dimension, an object with cpu_group and device_group"
    " (vLLM, SGLang), an object with Barrier (mpi4py), or a function without arguments that returns one of these"
)

logger = logging.getLogger("collective_scope")

_barriers: weakref.WeakKeyDictionary[ProcessGroup, Barrier] = weakref.WeakKeyDictionary()
_watchers: weakref.WeakValueDictionary[tuple[object, ...], Watcher] = weakref.WeakValueDictionary()
_plain_barriers: dict[int, PlainBarrier] = {}


def _forget() -> None:
    """Start afresh in a forked child: it has its parent's objects, but none of the threads."""
    _barriers.clear()
    _watchers.clear()


os.register_at_fork(after_in_child=_forget)


def alone() -> Barrier:
    """Return the barrier of a rank that has no peers."""
    return Barrier(connect=dist.HashStore, rank=0, world_size=1)


def find_barrier(group: GroupLike) -> tuple[AnyBarrier, object] | None:
    """
    Return the barrier of *group*, and what has to stay alive while it is used.

    None if *group* is None and there is no default group (yet).

    Raises:
        TypeError: If *group* is none of what is accepted.
        ValueError: If *group* is a mesh of several dimensions, or was destroyed.
    """
    if callable(group):
        group = group()
    if group is None:
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        return None if world is None else _of_process_group(world)
    if isinstance(group, int):
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            msg = f"{ACCEPTED} (got {group!r})"
            raise TypeError(msg)
        return alone(), None
    if isinstance(group, dist.ProcessGroup):
        return _of_process_group(group)
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            msg = (
                f"a DeviceMesh must have one dimension (got {group.ndim}: {group.mesh_dim_names});"
                " pass mesh['name'] for one of them or mesh._flatten() for all"
            )
            raise ValueError(msg)
        return (alone(), None) if group.get_coordinate() is None else _of_process_group(group.get_group())
    if isinstance(group, GroupCoordinator):
        # The CPU group: its collectives cannot be stuck behind a kernel.
        return find_barrier(group.cpu_group)
    if isinstance(group, Communicator):
        return _plain_barriers.setdefault(id(group), PlainBarrier(group)), group
    hint = f"; did you mean name={group!r}?" if isinstance(group, str) else ""
    msg = f"{ACCEPTED} (got {group!r}, a {type(group).__qualname__}){hint}"
    raise TypeError(msg)


def place_in_world() -> tuple[int, int]:
    """Return this process's rank in the default group, and that group's size; 0 of 1 without one."""
    is_there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_there else (0, 1)


def is_destroyed(group: object) -> bool:
    """Whether *group* is a process group that torch no longer knows."""
    if not isinstance(group, dist.ProcessGroup):
        return False
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return True
    return False


def group_barrier(group: ProcessGroup) -> Callable[[], bool]:
    """Start the communicator's own barrier; the returned function tells whether it has opened."""
    work = dist.barrier(group, async_op=True)

    def opened() -> bool:
        if work is None or not work.is_completed():
            return work is None
        work.wait()  # raises what the backend has to say
        return True

    return opened


def synchronize_accelerator() -> None:
    """Wait for the work that this process has given its accelerator, if it uses one."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return
    # A process that has not touched its accelerator shall not create a context on it now.
    is_initialized = getattr(torch.get_device_module(device), "is_initialized", None)
    if is_initialized is None or is_initialized():
        torch.accelerator.synchronize()


def _of_process_group(group: ProcessGroup) -> tuple[Barrier, object]:
    if is_destroyed(group):
        msg = "group was destroyed, or belongs to an earlier init_process_group"
        raise ValueError(msg)
    store = group.get_group_store()
    barrier = _barriers.get(group)
    if barrier is None:
        ranks = dist.get_process_group_ranks(group)
        connect = functools.partial(_clone, weakref.ref(store))
        server = _server(store, ranks, group.rank())
        barrier = Barrier(
            connect=connect,
            rank=group.rank(),
            world_size=group.size(),
            server=server,
            global_ranks=() if ranks == list(range(len(ranks))) else tuple(ranks),
            watcher=_watcher(store, connect) if group.size() > 1 else None,
            hosted=store if server == group.rank() else None,
        )
        _barriers[group] = barrier
    # Where this process hosts the store, the server lives as long as the store object:
    # the scope keeps it, so that its barrier outlives a group that the body destroys.
    return barrier, (group, store)


def _watcher(store: Store, connect: Callable[[], Store]) -> Watcher:
    """Return the watcher over the store that *store* is a view of; all groups share it."""
    base = base_of(store)
    key = (os.getpid(), base.host, base.port) if isinstance(base, dist.TCPStore) else (os.getpid(), id(base))
    watcher = _watchers.get(key)
    if watcher is None:
        hosts = isinstance(base, dist.TCPStore) and serves_store(base.port)
        watcher = _watchers[key] = Watcher(connect, store if hosts else None, is_first=dist.get_rank() == 0)
    return watcher


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
    """Return the rank, within the group, whose process hosts the store; None if none does. A guess, except for *rank*."""
    base = base_of(store)
    if not isinstance(base, dist.TCPStore):
        return None
    if serves_store(base.port):
        return rank
    # torchrun hosts the store in its agent and says so; otherwise it is global rank 0
    # (torch/distributed/rendezvous.py), unless it was made by hand.
    is_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return None if is_by_agent or 0 not in ranks or ranks.index(0) == rank else ranks.index(0)
