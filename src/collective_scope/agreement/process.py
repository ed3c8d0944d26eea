"""
The process that a rank is: its machine and number, and the system's word on it.

A process sees others on the same machine without anybody's help. Of those on another machine it
sees nothing. Knows nothing of torch.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
from pathlib import Path

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
        machine: Tells machines, and process namespaces, of equal host name apart.
        serves: Whether the group's store is served by it.
    """

    host: str = ""
    pid: int = 0
    start: int = 0
    machine: str = ""
    serves: bool = False

    @property
    def key(self) -> str:
        """A text that names this process in a store."""
        return f"{self.host}:{self.machine}:{self.pid}:{self.start}"

    @property
    def is_here(self) -> bool:
        """Whether this process can see it."""
        return self.machine != "" and self.machine == me().machine

    def state(self) -> str:
        """Return what it is doing, by the system's account; empty if that cannot be seen from here."""
        if not self.is_here:
            return ""
        try:
            fields = _stat(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return "gone"
        except OSError:  # such as too many open files: that says nothing of the other process
            return "" if _exists(self.pid) else "gone"
        if int(fields[19]) != self.start:
            return "gone"
        state = _STATES.get(fields[0], f"in state {fields[0]}")
        return f"{state} ({_exit(int(fields[49]))})" if state == "exited" else state

    @property
    def has_ended(self) -> bool:
        """Whether it is known to run no more."""
        return has_ended(self.state())

    def __str__(self) -> str:
        return f"{self.host} pid {self.pid}"


NOBODY = Process()


@attrs.frozen
class Place:
    """
    Where a rank is.

    Attributes:
        process: Its process.
        state: What the system says of that, if it can be seen from the asking one.
        scope: Path of the scope that it is in; empty if it is in none.
        phase: ``"in the body of scope 'x'"``, ...; empty if it did not answer.
        seconds: For how long it has been in that phase.
        frames: Where it is in the program, as lines of a traceback, innermost last.
        silence: Seconds without an answer; 0 if it answered.
    """

    process: Process
    state: str = ""
    scope: str = ""
    phase: str = ""
    seconds: float = 0.0
    frames: str = ""
    silence: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to run no more."""
        return has_ended(self.state)


def has_ended(state: str) -> bool:
    """Whether `Process.state` says that the process runs no more."""
    return state.startswith(("gone", "exited"))


def me() -> Process:
    """Return the process that this is."""
    return _of(os.getpid())  # by number: a forked child is another one


@functools.lru_cache(maxsize=1)
def _of(pid: int) -> Process:
    try:
        start = int(_stat(pid)[19])
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()[:8] + str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:  # not Linux: peers see nothing, and say so
        start, machine = 0, ""
    return Process(socket.gethostname(), pid, start, machine)


def _stat(pid: int) -> list[str]:
    """
    Return the fields of ``/proc/PID/stat`` from the third on.

    Raises:
        OSError: If there is no such process, or it cannot be looked at.
    """
    # The second field is the command in parentheses, and may hold anything, these included.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _exists(pid: int) -> bool:
    """Whether there is a process *pid*, asked in a way that needs no file descriptor."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exit(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"exit code {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    # Real-time signals have no name.
    names = {each.value: each.name for each in signal.Signals}
    return f"killed by {names.get(number, f'signal {number}')}"
