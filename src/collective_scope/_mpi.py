"""
A store for the ranks of an mpi4py communicator: rank 0 serves it, the communicator announces its address.

From then on a communicator is like any other group. mpi4py itself is never imported here.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch.distributed as dist

from .agreement.clock import monotonic, sleep


if TYPE_CHECKING:
    from torch.distributed import Store

ANNOUNCE_S = 300.0
"""How long the ranks may need to come to their first scope on a communicator."""

_ADDRESS = 256
"""Bytes of the message that has the address."""

_keyvals: list[int] = []
"""The key of the attribute of communicators that has their membership; made at the first scope."""


@runtime_checkable
class Communicator(Protocol):
    """A group as mpi4py has it, as far as it is used here."""

    def Get_rank(self) -> int:  # noqa: N802  (mpi4py's name)
        """Return this rank."""

    def Get_attr(self, keyval: int) -> Any:  # noqa: N802  (mpi4py's name)
        """Return what is remembered with it."""

    def Ibcast(self, buf: Any, root: int = 0) -> Any:  # noqa: N802  (mpi4py's name)
        """Begin to send something to all ranks."""


def is_communicator(group: object) -> bool:
    """Whether *group* is an mpi4py communicator."""
    return isinstance(group, Communicator)


def membership_attribute(comm: Any) -> tuple[Any, Callable[[Any, Callable[[], object]], None]]:
    """
    Return what was remembered with *comm*, or None, and a function that remembers something with it.

    What is remembered ends with the communicator: the second argument of the function is called then.
    """
    mpi = sys.modules[type(comm).__module__]
    if comm == mpi.COMM_NULL:
        return None, lambda _value, _end: None
    if not _keyvals:
        _keyvals.append(mpi.Comm.Create_keyval(delete_fn=lambda _comm, _key, value: value[1]()))
    there = comm.Get_attr(_keyvals[0])
    return there[0] if there else None, lambda value, end: comm.Set_attr(_keyvals[0], (value, end))


def store_of_communicator(comm: Any) -> Store | None:
    """
    Make a store for the ranks of *comm*; None on a rank that is outside of it.

    Collective:
        Every rank of *comm* calls it.

    Raises:
        TimeoutError: If not all have come to it within `ANNOUNCE_S` seconds.
    """
    mpi = sys.modules[type(comm).__module__]
    if comm == mpi.COMM_NULL or comm.Get_size() == 1:
        return None
    buffer, server, is_local = bytearray(_ADDRESS), None, _is_on_one_host(comm)
    if comm.Get_rank() == 0:
        host = "127.0.0.1" if is_local else socket.gethostname()
        server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        address = f"{host} {server.port}".encode()
        buffer[: len(address)] = address
    _await(comm.Ibcast([buffer, mpi.BYTE], root=0))
    if server is not None:
        return server
    host, port = bytes(buffer).rstrip(b"\0").decode().split(" ")
    return dist.TCPStore(host, int(port), wait_for_workers=False)


def _is_on_one_host(comm: Any) -> bool:
    mpi = sys.modules[type(comm).__module__]
    mine, size = socket.gethostname().encode()[:_ADDRESS], comm.Get_size()
    everyone = bytearray(_ADDRESS * size)
    _await(comm.Iallgather([bytearray(mine.ljust(_ADDRESS, b"\0")), mpi.BYTE], [everyone, mpi.BYTE]))
    return len({bytes(everyone[i : i + _ADDRESS]) for i in range(0, len(everyone), _ADDRESS)}) == 1


def _await(request: Any) -> None:
    deadline, pause = monotonic() + ANNOUNCE_S, 0.0001
    while not request.Test():
        if monotonic() > deadline:
            msg = f"not all ranks of the communicator came to their first scope within {ANNOUNCE_S:.0f} s"
            raise TimeoutError(msg)
        sleep(pause)  # not Wait(): that is deaf to Ctrl-C
        pause = min(0.05, 2 * pause)
