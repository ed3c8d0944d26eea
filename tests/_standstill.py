"""
Stop a process and all below it for a moment, again and again, until the standard input is closed.

Usage: ``python _standstill.py PID SECONDS``. That is how a virtual machine behaves whose host is busy: clocks go on,
and no process does. What a test stops itself, it stops for good: processes that are stopped already stay so.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import sys
import time
from pathlib import Path


PAUSE_S = (1.5, 3.5)
"""How long the processes run between two standstills, at least and at most."""


def running_below(root: int) -> list[int]:
    """Return *root* and all its descendants, without this process and those that are stopped or have ended."""
    states: dict[int, str] = {}
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            states[int(stat.parent.name)] = state
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return [pid for pid in found if pid != os.getpid() and states.get(pid, "Z") not in "TZ"]


def main(root: int, seconds: float) -> None:
    """Stop them for up to *seconds* at a time."""
    while not select.select([sys.stdin], [], [], random.uniform(*PAUSE_S))[0]:  # noqa: S311  (no secret)
        stopped = running_below(root)
        _send(signal.SIGSTOP, stopped)
        time.sleep(random.uniform(seconds / 2, seconds))  # noqa: S311  (no secret)
        _send(signal.SIGCONT, stopped)


def _send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, number)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
