"""All that is asked of torch, its private names included; nothing else in the package knows those."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

    from .agreement.records import Outcome


def default_group() -> ProcessGroup | None:
    """Return the default group; None if there is none."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def place_in_world() -> tuple[int, int]:
    """Return this process's rank in the default group, and that group's size; 0 of 1 without one."""
    world = default_group()
    return (0, 1) if world is None else (world.rank(), world.size())


def is_known(group: ProcessGroup) -> bool:
    """Whether torch has *group* in its books."""
    return group in dist.distributed_c10d._world.pg_map  # noqa: SLF001  (torch has no public name for it)


def is_destroyed(group: object) -> bool:
    """Whether *group* is a process group that torch knew and knows no more."""
    if not isinstance(group, dist.ProcessGroup) or is_known(group):
        return False
    try:
        name = group.group_name
    except RuntimeError:  # made by hand, and never known to torch
        return False
    try:
        torch._C._distributed_c10d._resolve_process_group(name)  # noqa: SLF001  (torch has no public name for it)
    except RuntimeError:
        return True
    return False


def trace_of_a_default_group() -> object:
    """Return something that changes when a default group is made: torch puts its rank into ``sys.excepthook``."""
    return sys.excepthook


def has_appeared(trace: object) -> bool:
    """Whether a default group has been made since `trace_of_a_default_group` returned *trace*."""
    return sys.excepthook is not trace and getattr(sys.excepthook, "__name__", "") == "_distributed_excepthook"


@functools.cache
def accelerator() -> Any:
    """Return torch's module of this machine's accelerator, such as ``torch.cuda``; None if torch can use none."""
    device = torch.accelerator.current_accelerator()
    return None if device is None else torch.get_device_module(device)


def synchronize_accelerator() -> None:
    """Wait for the work that this process has given its accelerator, if it uses one."""
    module = accelerator()
    # A process that has not touched its accelerator shall not create a context on it now.
    is_initialized = getattr(module, "is_initialized", lambda: module is not None)
    if is_initialized():
        torch.accelerator.synchronize()


def store_of(group: ProcessGroup) -> Store | None:
    try:
        store = group.get_group_store()
    except RuntimeError:  # a group that is written in Python has none in C++
        store = None
    if store is None and is_known(group):
        store = dist.distributed_c10d._world.pg_map[group][1]  # noqa: SLF001  (torch has no public name for it)
    return store


def all_groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map) if dist.is_available() else []  # noqa: SLF001  (torch has no public name for it)


def is_end_of_gloo(message: str) -> bool:
    """
    Whether *message* is of an error after which a gloo group is dead.

    After a timeout, or when a peer is gone, gloo closes its connections for good. Every later collective fails.
    """
    return "gloo/transport" in message or has_closed(message)


def has_ended(failures: Iterable[Outcome]) -> bool:
    """Whether one of *failures* is an error after which no collective of the group works, such as its own time limit."""
    return any(is_end_of_group(each.message) or each.type_name.endswith("DistBackendError") for each in failures)


def is_end_of_group(message: str) -> bool:
    """Whether *message* is of an error of a group that is dead, or is not in torch's books any more."""
    unknown = (
        "in the world group map",
        "Could not resolve the process group",
        "Invalid process group specified",
        "Default process group has not been initialized",
    )
    return any(words in message for words in unknown) or is_end_of_gloo(message)


def is_made_twice(message: str) -> bool:
    """Whether *message* is of ``init_process_group``, where there is a default group."""
    return "initialize the default process group twice" in message


def has_closed(message: str) -> bool:
    """Whether *message* is of a gloo collective that found a connection closed."""
    return "caused pair closure" in message or ("gloo/transport" in message and "closed by peer" in message)


def is_nccl(group: dist.ProcessGroup) -> bool:
    if not dist.is_nccl_available() or not torch.cuda.is_available():
        return False
    try:
        return "nccl" in group._get_backend(torch.device("cuda")).name().lower()  # noqa: SLF001  (torch has no public name for it)
    except RuntimeError:
        return False


def connect_nccl(groups: list[dist.ProcessGroup]) -> None:
    """
    Have the NCCL communicators of *groups* made now, by all their ranks together.

    torch makes one at the first collective. A rank that waits for its peers there cannot be freed:
    there is nothing to abort yet. A process that has not touched its GPU has none to connect.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # missing in torch's annotations
        return
    for group in groups:
        if is_nccl(group) and group.size() > 1:
            device = group.bound_device_id or torch.device("cuda", torch.cuda.current_device())
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            torch.cuda.synchronize(device)


def abort_nccl(groups: list[dist.ProcessGroup]) -> None:
    """Abort the NCCL communicators of *groups*, as far as torch still knows them."""
    known = [group for group in groups if group in all_groups() and is_nccl(group)]
    abort = dist.distributed_c10d._abort_process_group  # noqa: SLF001  (torch has no public name for it)
    if dist.group.WORLD in known:
        abort()  # of all groups at once: one after the other, they may wait for each other
    else:
        for group in known:
            abort(group)


def groups_so_far() -> int:
    """Return how many groups torch has named in this process, those that are gone included."""
    count: int = dist.distributed_c10d._world.group_count  # noqa: SLF001  (torch has no public name for it)
    return count


def forget_unfinished_groups() -> None:
    """Let torch name the next group like the first: it counts one that was not made to the end."""
    if not dist.is_initialized():
        dist.distributed_c10d._world.group_count = 0  # noqa: SLF001  (torch has no public name for it)


def destroy_group(value: object, made: list[dist.ProcessGroup]) -> None:
    """Destroy the default group if it is among those that were *made*, and all others with it; else the group *value*."""
    if not dist.is_initialized():
        return  # an abort has taken it out of torch's books
    if not isinstance(value, dist.ProcessGroup) or dist.group.WORLD in made:
        dist.destroy_process_group()
    elif value in all_groups():
        dist.destroy_process_group(value)


def within(seconds: float, doing: str, fn: Callable[[], object]) -> BaseException | None:
    """
    Call *fn* on a thread of its own, because torch bounds by nothing how long it waits for work in flight.

    Returns:
        The error that *fn* raised, if it did.

    Raises:
        TimeoutError: If it takes longer than *seconds*; it goes on then, and *doing* says with which.
    """
    done = threading.Event()
    failed: list[BaseException] = []

    def call() -> None:
        try:
            fn()
        except BaseException as error:  # handed on
            failed.append(error)
        done.set()

    threading.Thread(target=call, name="collective_scope-destroy", daemon=True).start()
    if not done.wait(seconds):
        msg = f"{doing} took longer than {seconds:.0f} s"
        raise TimeoutError(msg)
    return failed[0] if failed else None
