"""The connections of this process: which were opened meanwhile, and to cut them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path


def connected_sockets(but_to_port: int | None = None) -> dict[int, str]:
    """Return the connected TCP sockets of this process, but those to a port: what tells each apart, by descriptor."""
    found = {}
    for fd in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            link = os.readlink(fd)  # noqa: PTH115  (a Path would be made of each)
            if link.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(fd.name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getpeername()[1] != but_to_port:
                        found[int(fd.name)] = link
    return found


def opened_since(before: dict[int, str], but_to_port: int | None = None) -> dict[int, str]:
    return {fd: link for fd, link in connected_sockets(but_to_port).items() if before.get(fd) != link}


def cut(sockets: dict[int, str]) -> None:
    """
    Cut connections, on this side and the other: whoever waits for them gets an error.

    gloo has no abort that frees a rank which waits, and keeps its connections as long as anything refers to a group.
    """
    for fd, link in sockets.items():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/self/fd/{fd}") == link:  # noqa: PTH115  (as above)
                with socket.socket(fileno=os.dup(fd)) as copy:
                    copy.shutdown(socket.SHUT_RDWR)
