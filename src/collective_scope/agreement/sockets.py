"""The sockets of this process: whether it serves a store, which connections were opened meanwhile, and to cut them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar


T = TypeVar("T")


def connected_sockets(*, to: Collection[int] | None = None, but_to: int | None = None) -> dict[int, str]:
    """
    Return the connected TCP sockets of this process: what tells each apart, by descriptor.

    Args:
        to: Ports of peers; only connections to them are returned.
        but_to: Port of peers; connections to it are left out.
    """
    found = {}
    for fd, link, copy in _sockets():
        with contextlib.suppress(OSError):  # not connected
            port = copy.getpeername()[1]
            if port != but_to and (to is None or port in to):
                found[fd] = link
    return found


def accepted_since(before: dict[int, str], but_at_port: int | None = None) -> dict[int, str]:
    """
    Return the connections that others have opened to this process since *before*, but those to a port of it.

    gloo connects each pair of ranks once, so one of the two has accepted it. Connections that this
    process has opened itself, to servers of whatever kind, are not among them.
    """
    listening, accepted = set(), {}
    for fd, link, copy in _sockets():
        port = copy.getsockname()[1]
        if _is_listening(copy):
            listening.add(port)
        elif before.get(fd) != link and port != but_at_port:
            accepted[fd] = link, port
    return {fd: link for fd, (link, port) in accepted.items() if port in listening}


def serves_store(port: int) -> bool:
    """Whether the server of a ``TCPStore`` at *port* runs in this process."""
    # A forked child has its parent's sockets, but not the thread that serves them; torch names that one.
    names = []
    for task in Path("/proc/self").glob("task/*/comm"):
        with contextlib.suppress(OSError):  # ended meanwhile
            names.append(task.read_text())
    if not any(name.startswith("pt_tcpstore") for name in names):
        return False
    return any(copy.getsockname()[1] == port and _is_listening(copy) for _, _, copy in _sockets())


def _is_listening(copy: socket.socket) -> bool:
    return copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0


def _sockets() -> Iterator[tuple[int, str, socket.socket]]:
    """Yield each internet socket of this process: its descriptor, what tells it from a later one, and a copy."""
    for fd in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # closed meanwhile
            link = os.readlink(fd)  # noqa: PTH115  (a Path would be made of each)
            if link.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(fd.name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6):
                        yield int(fd.name), link, copy


def cut(sockets: dict[int, str]) -> None:
    """
    Cut connections, on this side and the other: a thread that waits for one gets an error.

    gloo has no abort that frees a rank which waits, and keeps its connections as long as anything refers to a group.
    """
    for fd, link in sockets.items():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/self/fd/{fd}") == link:  # noqa: PTH115  (as above)
                with socket.socket(fileno=os.dup(fd)) as copy:
                    copy.shutdown(socket.SHUT_RDWR)


class Connections:
    """
    The connections of a group that is about to be made; those with a store's server, at *port*, are not among them.

    Args:
        port: Where the store is served; None if it has no server.
    """

    def __init__(self, port: int | None) -> None:
        self._port, self._before = port, connected_sockets()
        self._of_make: dict[int, str] = {}
        self._client: dict[int, str] = {}

    def open_client(self, clone: Callable[[], T]) -> T:
        """Return the client of the store that *clone* opens for the group alone; note its connection, which can be cut."""
        while True:
            before = connected_sockets(to={self._port or 0})
            client = clone()
            now = connected_sockets(to={self._port or 0})
            self._client = {fd: link for fd, link in now.items() if before.get(fd) != link}
            if len(self._client) <= 1:  # otherwise another thread has connected just now: which is whose?
                return client

    def note(self) -> None:
        """Note those that were opened until now: the group is made."""
        self._of_make = self._opened(but_to=self._port)

    def cut(self, *, with_client: bool) -> None:
        """Cut those that were noted; that of the client, too, which a rank waits for that makes a group in its body."""
        cut(self._of_make | (self._client if with_client else {}))

    def cut_unfinished(self) -> None:
        """Cut all that were opened until now, also those to the store: the group is not made yet."""
        cut(self._opened())

    def cut_accepted(self) -> None:
        """Cut those that peers have opened to this process, until now."""
        cut(accepted_since(self._before, but_at_port=self._port))

    def _opened(self, but_to: int | None = None) -> dict[int, str]:
        return {fd: link for fd, link in connected_sockets(but_to=but_to).items() if self._before.get(fd) != link}
