"""
Which process a rank is, and what the system says of it.

What a peer on the same machine can see without anybody's help; on another
machine it sees nothing. Knows nothing of torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from pathlib import Path
from typing import Any

import attrs


_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "sleeping in the kernel",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "exited",
    "X": "exited",
}


@attrs.frozen
class Process:
    """
    A process, told apart from a later one that gets its number.

    Attributes:
        host: Name of its host.
        pid: Its number there.
        start: When it was started, in the kernel's ticks since boot.
        machine: What tells machines (and process namespaces) of equal host name apart.
    """

    host: str = ""
    pid: int = 0
    start: int = 0
    machine: str = ""

    @property
    def key(self) -> str:
        """A text that names this process in a store."""
        return f"{self.host}:{self.machine}:{self.pid}:{self.start}"

    @property
    def is_here(self) -> bool:
        """Whether this process can see it."""
        return self.machine != "" and self.machine == me().machine

    def state(self) -> str:
        """Describe what it is doing, by the system's account; empty if it cannot be seen from here."""
        if not self.is_here:
            return ""
        fields = _stat(self.pid)
        if not fields or int(fields[19]) != self.start:
            return "gone"
        state = _STATES.get(fields[0], f"in state {fields[0]}")
        return f"{state} ({_exit(int(fields[49]))})" if state == "exited" else state

    @property
    def has_ended(self) -> bool:
        """Whether it is known to run no more."""
        return self.state().startswith(("gone", "exited"))

    def __str__(self) -> str:
        return f"{self.host} pid {self.pid}"


NOBODY = Process()


@attrs.frozen
class Place:
    """
    Where a process is.

    Attributes:
        process: Which process.
        state: What the system says of it, if it can be seen from the asking one.
        phase: ``"in the body of scope 'x'"``, ...; empty if it did not answer.
        seconds: For how long it has been in that phase.
        frames: The innermost frames of its main thread, without this library's.
        stacks: The stacks of all its threads.
        silence: Seconds without an answer or a heartbeat; 0 if it answered.
    """

    process: Process
    state: str = ""
    phase: str = ""
    seconds: float = 0.0
    frames: str = ""
    stacks: str = ""
    silence: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to run no more."""
        return self.state.startswith(("gone", "exited"))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Place:
        """Make one of what JSON has made of it."""
        return cls(**{**fields, "process": Process(**fields["process"])})


def me() -> Process:
    """Return the process that this is."""
    return _of(os.getpid())  # by number: a forked child is another one


@functools.lru_cache(maxsize=1)
def _of(pid: int) -> Process:
    fields = _stat(pid)
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()[:8] + str(os.stat("/proc/self/ns/pid").st_ino)  # noqa: PTH116
    except OSError:  # not Linux: peers see nothing, and say so
        machine = ""
    return Process(socket.gethostname(), pid, int(fields[19]) if fields else 0, machine)


def serves_store(port: int) -> bool:
    """Whether the server of a ``TCPStore`` at *port* runs in this process."""
    # A forked child has its parent's sockets, but nobody who serves them; torch names that thread.
    names = []
    for task in Path("/proc/self").glob("task/*/comm"):
        with contextlib.suppress(OSError):  # ended meanwhile
            names.append(task.read_text())
    if not any(name.startswith("pt_tcpstore") for name in names):
        return False
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    links = []
    for fd in Path("/proc/self/fd").iterdir() if inodes else ():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(os.readlink(fd))  # noqa: PTH115
    return any(f"socket:[{inode}]" in links for inode in inodes)


def _stat(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` from the third on; none if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    # The second field is the command in parentheses, and may hold anything, these included.
    return text.rpartition(")")[2].split()


def _exit(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.WEXITSTATUS(status)}"
