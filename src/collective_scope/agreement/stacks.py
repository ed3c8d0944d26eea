"""Where a thread of this process is in the program, in a few lines."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from types import CodeType, FrameType, TracebackType
from typing import Any

from .text import OURS, message_of, one_line, type_name


_STDLIB = os.path.dirname(os.__file__) + os.sep  # noqa: PTH120  (compared as text)
_DISTRIBUTED = f"{os.sep}torch{os.sep}distributed{os.sep}"

_Step = tuple[FrameType, int]


def where_is(thread: int, body: CodeType | None = None) -> str:
    """
    Show where *thread* is, and where other threads wait for a collective, as lines of a traceback.

    An exception that the thread is handling is named, because it may be the cause: of a rank that waits in
    ``finally``, for peers that wait for it elsewhere.

    Args:
        thread: Its identifier.
        body: The code in which the scope was entered: its line is shown, and the two innermost within it.
    """
    with no_collection():
        frames = sys._current_frames()  # noqa: SLF001  (documented, for this purpose)
        stacks = {ident: _stack(frame) for ident, frame in frames.items()}
        is_ours = thread in frames and _is_ours(frames[thread])
    names = {each.ident: each.name for each in threading.enumerate()}
    if is_ours:  # it waits here; of what has called the library, only a program of the user's own tells something
        files = [(step, step[0].f_code.co_filename) for step in stacks[thread]]
        stacks[thread] = [step for step, file in files if not _is_installed(file) and not _is_wrapper(file)]
    text = _show(stacks[thread], body) + _handled(thread) if thread in stacks else ""
    for ident, stack in stacks.items():
        name = names.get(ident, str(ident))
        if ident != thread and not name.startswith("collective_scope-") and any(map(_is_collective, stack)):
            text += f"  in thread {name}:\n{_show(stack, None)}"
    return text


def innermost(tb: TracebackType | None) -> str:
    """Return file, line and function of the innermost step of *tb* that is the user's; empty if there is none."""
    steps = [step for step in traceback.walk_tb(tb) if not _is_ours(step[0])]
    users = [step for step in steps if not _is_wrapper(step[0].f_code.co_filename)] or steps
    return f"{users[-1][0].f_code.co_filename}:{users[-1][1]}, in {users[-1][0].f_code.co_name}" if users else ""


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """
    Hold up the garbage collector while the frames of other threads are looked at.

    Up to CPython 3.11, the collector may run while a frame object is being made. If a finalizer lets the
    thread go on meanwhile, the object is made of what is no frame any more, and the interpreter crashes.
    Asking a frame for the one outside of it makes such an object, too.
    """
    with _looking:
        threshold = gc.get_threshold()
        gc.set_threshold(0)  # not disable(): a thread that asks isenabled() meanwhile would leave it so
        try:
            yield
        finally:
            gc.set_threshold(*threshold)


_looking = threading.Lock()
"""Held by the thread that holds up the collector. A fork waits for it, so that no child is without a collector."""

os.register_at_fork(before=_looking.acquire, after_in_parent=_looking.release, after_in_child=_looking.release)


def _stack(frame: FrameType) -> list[_Step]:
    """Return the steps that lead to *frame*, innermost last, without those of this library."""
    steps = reversed(list(traceback.walk_stack(frame)))
    return [step for step in steps if not _is_ours(step[0])]


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(OURS)


def _is_installed(file: str) -> bool:
    return f"{os.sep}site-packages{os.sep}" in file


def is_runner(file: str) -> bool:
    """Whether *file* is of pytest, whose frames are many and tell nothing of a test."""
    return any(f"{os.sep}{package}{os.sep}" in file for package in ("_pytest", "pytest", "pluggy"))


def _show(stack: list[_Step], body: CodeType | None) -> str:
    # The wrappers of torch, pytest and the standard library say less than the line that called them.
    users = [step for step in stack if not _is_wrapper(step[0].f_code.co_filename)] or stack
    entered = max((number for number, step in enumerate(users) if step[0].f_code is body), default=0)
    last = [entered] if users and users[entered][0].f_code is body else []
    chosen = [users[number] for number in sorted({*last, *range(max(entered, len(users) - 2), len(users))})]
    # Not extract_stack(): the steps between are left out.
    return "".join(traceback.format_list(traceback.StackSummary.extract(iter(chosen))))


def _handled(thread: int) -> str:
    """Name the exception that *thread* is handling, in ``except``, ``finally`` or ``__exit__``."""
    handled: Any = sys._current_exceptions().get(thread)  # noqa: SLF001  (documented, for this purpose)
    error = handled[1] if isinstance(handled, tuple) else handled  # as up to Python 3.11
    return "" if error is None else f"  while it handles {one_line(type_name(error), message_of(error))}\n"


def _is_wrapper(file: str) -> bool:
    is_of_python = file.startswith("<") or (file.startswith(_STDLIB) and not _is_installed(file))
    return is_of_python or f"{os.sep}torch{os.sep}" in file or is_runner(file)


def _is_collective(step: _Step) -> bool:
    return _DISTRIBUTED in step[0].f_code.co_filename
