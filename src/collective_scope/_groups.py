"""
The kinds of ``group`` that may be passed, and this rank's membership in it.

The only module that knows all kinds of group; torch's private names are in ``_torch``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch.distributed as dist

from ._membership import Membership, end, make, memberships, of_store
from ._mpi import Communicator, is_communicator, membership_attribute, store_of_communicator
from ._torch import default_group, is_destroyed, is_known, store_of
from .agreement.text import shorten


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@runtime_checkable
class GroupCoordinator(Protocol):
    """A group as vLLM and SGLang have it: one process group for CPU tensors and one for the device's."""

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


def find(group: GroupLike) -> tuple[Membership, object] | None:
    """
    Return this rank's membership in *group*, and what has to stay alive while that is used.

    None if *group* is None and there is no default group (yet).

    Raises:
        TypeError: If *group* is none of what is accepted, or has peers and no store that can be used.
        ValueError: If *group* is a mesh of several dimensions, or was destroyed.
    """
    if group is None:
        world = default_group()
        return None if world is None else (_of_process_group(world), world)
    if isinstance(group, dist.ProcessGroup):
        return _of_process_group(group), group
    known = memberships.get(id(group))
    return (known, group) if known is not None else _find_other(group)


def _find_other(group: GroupLike) -> tuple[Membership, object] | None:
    """Return the same for what is no process group, and was not met before: it takes a while to see what it is."""
    if callable(group) and not isinstance(group, StoreGroup):
        group = group()
        if not callable(group) or isinstance(group, StoreGroup):
            return find(group)
    if is_communicator(group):
        return _of_communicator(group), group
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        return Membership(), None
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            msg = (
                f"a DeviceMesh must have one dimension (got {group.ndim}: {group.mesh_dim_names});"
                " pass mesh['name'] for one of them or mesh._flatten() for all"
            )
            raise ValueError(msg)
        return (Membership(), None) if group.get_coordinate() is None else find(group.get_group())
    if isinstance(group, GroupCoordinator):
        # The CPU group: its collectives cannot be stuck behind a kernel.
        return find(group.cpu_group)
    if isinstance(group, StoreGroup):
        return of_store(group, group.store, int(group.rank), int(group.world_size)), group
    hint = f"; did you mean name={group!r}?" if isinstance(group, str) else ""
    msg = f"{ACCEPTED} (got {shorten(repr(group), 100)}, a {type(group).__qualname__}){hint}"
    raise TypeError(msg)


def _of_process_group(group: ProcessGroup) -> Membership:
    membership = memberships.get(id(group))
    if is_destroyed(group):
        msg = "group was destroyed, or belongs to an earlier init_process_group"
        raise ValueError(msg)
    if membership is not None:
        return membership
    is_in_books = is_known(group)
    if group.size() == 1 or (is_in_books and dist.get_backend(group) == "fake"):
        return Membership()
    ranks = dist.get_process_group_ranks(group) if is_in_books else None
    return of_store(group, store_of(group), group.rank(), group.size(), ranks)


def _of_communicator(comm: Any) -> Membership:
    there, remember = membership_attribute(comm)
    membership: Membership | None = there
    if membership is None:
        found = store_of_communicator(comm)
        membership = Membership() if found is None else make(comm, found, comm.Get_rank(), comm.Get_size(), None)
        remember(membership, lambda: end(membership))
    return membership
