"""The last rung: end this process, with exit code 124, when a scope lasts for too long."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import operator
import os
import sys
import threading
import traceback
from collections.abc import Callable

from .agreement.clock import monotonic
from .agreement.stacks import is_runner, no_collection


KILL_PHASE = "kill_after"
"""The phase in which a rank failed whose process is ended; peers are told of it."""

EXIT_CODE = 124
"""A parent sees this one; ``timeout(1)`` uses the same."""

HELD_S = 3.0
"""How long after its time a process ends whose interpreter is held by native code."""

LEAVE_S = 2.0
"""How long a rank that was at the barrier when the time was up has to leave the scope."""

STACKS_S = 0.5
"""How long before that its stacks are written."""

LONGEST_S = 1e9
"""Seconds that any timer takes: thirty years."""

_SIGEV_THREAD = 2
_CLOCK_MONOTONIC = 1

stderr_fd: int | None = None
"""Where to write at last, if not to file descriptor 2: pytest's plugin sets it to what pytest captures."""


last_words: list[Callable[[], object]] = []
"""Functions that are called before the process is ended, such as to print the results so far."""


class Killer:
    """
    Ends the process when a scope has not been left in time.

    A rank that is at the barrier is not stuck, its wait has a bound of its
    own: it is left alone.

    Args:
        seconds: From now.
        is_waiting: Whether this rank is at the barrier.
        explain: Returns where every rank is, as text, and tells the peers.

    Attributes:
        at: When the time is up, on the monotonic clock.
    """

    def __init__(self, seconds: float, is_waiting: Callable[[], bool], explain: Callable[[], str]) -> None:
        self.at = monotonic() + seconds
        self._stop = threading.Event()
        args = (self._stop, seconds, is_waiting, explain)
        self._timer = _Timer(seconds + HELD_S)
        threading.Thread(target=_expire, args=args, name="collective_scope-kill", daemon=True).start()

    def cancel(self) -> None:
        """Let the process live: the scope has been left."""
        self._stop.set()
        self._timer.cancel()


class _Timer:
    """
    A timer that ends the process with `EXIT_CODE`, for which it needs no interpreter.

    There may be many. A POSIX timer whose function is libc's ``_exit``, where
    there is such a thing; elsewhere faulthandler's, whose exit code is 1.
    """

    def __init__(self, seconds: float) -> None:
        self._id = ctypes.c_void_p()
        event = (ctypes.c_byte * 64)()
        libc = ctypes.CDLL(None, use_errno=True)
        exit_address = ctypes.cast(libc._exit, ctypes.c_void_p).value  # noqa: SLF001  (it is called so)
        # struct sigevent of glibc on 64 bits: value, signo, notify, function, attributes.
        ctypes.c_uint64.from_buffer(event, 0).value = EXIT_CODE
        ctypes.c_int32.from_buffer(event, 12).value = _SIGEV_THREAD
        ctypes.c_uint64.from_buffer(event, 16).value = exit_address or 0
        self._set = getattr(libc, "timer_settime", None)
        self._delete = getattr(libc, "timer_delete", None)
        create = getattr(libc, "timer_create", None)
        self._is_posix = create is not None and create(_CLOCK_MONOTONIC, event, ctypes.byref(self._id)) == 0
        if not self._is_posix:
            faulthandler.dump_traceback_later(seconds, exit=True, file=_stderr())
            return
        _stacks_at.append(monotonic() + seconds - STACKS_S)
        self._stacks_at = _stacks_at[-1]
        _arm_stacks()
        seconds = min(seconds, LONGEST_S)
        spec = (ctypes.c_int64 * 4)(0, 0, int(seconds), int(seconds % 1 * 1e9))
        self._set(self._id, 0, spec, None)  # type: ignore[misc]  # there, if timer_create is

    def cancel(self) -> None:
        if self._is_posix:
            self._delete(self._id)  # type: ignore[misc]  # there, if timer_create is
            _stacks_at.remove(self._stacks_at)
            _arm_stacks()
        else:
            faulthandler.cancel_dump_traceback_later()


_stacks_at: list[float] = []
"""When native code that holds the interpreter would have its stacks written, for each timer that runs."""


def _arm_stacks() -> None:
    """Have the stacks written when the first of the timers is about to end the process; faulthandler has one timer."""
    faulthandler.cancel_dump_traceback_later()
    if _stacks_at:
        seconds = max(0.1, min(min(_stacks_at) - monotonic(), LONGEST_S))
        faulthandler.dump_traceback_later(seconds, file=_stderr())


def _expire(stop: threading.Event, seconds: float, is_waiting: Callable[[], bool], explain: Callable[[], str]) -> None:
    if stop.wait(min(seconds, LONGEST_S)):
        return
    was_waiting = is_waiting()
    while is_waiting():
        if stop.wait(0.1):
            return
    # The wait at the barrier ends at the same moment; what follows it is still to be done.
    if stop.wait(LEAVE_S if was_waiting else 0.0):
        return
    text = explain()
    if stop.is_set():  # left meanwhile, with an error that says it all
        return
    end(text)


def end(text: str) -> None:
    """End the process with `EXIT_CODE`, after *text* and the stacks of all threads on the real stderr."""
    with contextlib.ExitStack() as calls:  # from the last one to the first, each whatever those before it have raised
        calls.callback(os._exit, EXIT_CODE)
        calls.callback(logging.shutdown)
        for words in last_words:
            calls.callback(words)
        calls.callback(lambda: os.write(_stderr(), f"\n{text}\n{stacks()}".encode(errors="replace")))
        for stream in (sys.stderr, sys.stdout):
            calls.callback(operator.methodcaller("flush"), stream)  # there may be none, or one that is closed


def stacks() -> str:
    """Return the stacks of all threads but this library's, without the frames of pytest."""
    names = {each.ident: each.name for each in threading.enumerate()}
    with no_collection():
        frames = sys._current_frames().items()  # noqa: SLF001  (documented, for this purpose)
        walked = {names.get(ident, str(ident)): [*traceback.walk_stack(frame)] for ident, frame in frames}
    steps = {
        name: [step for step in stack if not is_runner(step[0].f_code.co_filename)] for name, stack in walked.items()
    }
    return "".join(
        f"Thread {name}:\n{''.join(traceback.StackSummary.extract(reversed(stack)).format())}"
        for name, stack in steps.items()
        if not name.startswith("collective_scope-")
    )


def _stderr() -> int:
    return 2 if stderr_fd is None else stderr_fd
