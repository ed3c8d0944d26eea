"""How an exception travels: as text, whatever its methods do."""

from __future__ import annotations

import os
import re
import traceback
from types import TracebackType


OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # noqa: PTH100, PTH120  (compared with the names of files, as text)
"""Where the frames of this library are."""

MESSAGE_LIMIT = 16_384
"""Characters of an exception's message that travel."""

TRACEBACK_LIMIT = 65_536
"""Characters of a traceback that travel."""


def type_name(exc: BaseException) -> str:
    """Name the class of *exc* as a traceback does."""
    cls = type(exc)
    module = "" if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}."
    return f"{module}{cls.__qualname__}"


def message_of(exc: BaseException) -> str:
    """Return ``str(exc)``, or why there is none."""
    try:
        return str(exc)
    except KeyboardInterrupt:
        raise
    except BaseException as broken:  # such as pytest's, of an assertion that failed in it
        return f"<its str() raised {type_name(broken)}>"


def without_frames_of_ours(tb: TracebackType | None) -> TracebackType | None:
    """Return *tb* without the frames of this library, which tell a user nothing; all of it if there are no others."""
    steps: list[TracebackType] = []
    step = tb
    while step is not None:
        if not step.tb_frame.f_code.co_filename.startswith(OURS):
            steps.append(step)
        step = step.tb_next
    kept: TracebackType | None = None
    for step in reversed(steps):
        kept = TracebackType(kept, step.tb_frame, step.tb_lasti, step.tb_lineno)
    return kept or tb


def traceback_of(exc: BaseException) -> str:
    """Return the formatted traceback of *exc*, or what can be said without it."""
    tb = object.__getattribute__(exc, "__traceback__")  # whatever its class does when it is asked
    try:
        text = "".join(traceback.format_exception(type(exc), exc, without_frames_of_ours(tb)))
    except KeyboardInterrupt:
        raise
    except BaseException as broken:
        # An exception may bring notes, causes or members of its own making.
        lines = "".join(traceback.format_tb(tb))
        text = f"{lines}{type_name(exc)}: <it cannot be formatted: that raised {type_name(broken)}>\n"
    return shorten(text, TRACEBACK_LIMIT)


_BOILERPLATE = re.compile(r"^\[\S*/gloo/\S+\] |( \[\S+\]:\d+)?\. This is typically caused by a remote worker .*")
"""Gloo's place in its own source, the peer's port, and a guess which is wrong where a group was revoked."""


def one_line(kind: str, message: str) -> str:
    """Return ``kind: message`` on one line of readable length."""
    text = _BOILERPLATE.sub("", " ".join(message.split()))
    return shorten(f"{kind}: {text}" if text else kind, 200)


def shorten(text: str, limit: int) -> str:
    """Cut the middle out of a *text* of more than *limit* characters, and say so."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... ({len(text)} characters in all) ... {text[-half:]}"
