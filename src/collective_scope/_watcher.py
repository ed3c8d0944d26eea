"""
The thread that answers for this process while its main thread cannot.

One per process and store, with a client connection of its own. It shows a
heartbeat, and when a peer asks, it tells where this process is: in which
scope, in which phase and for how long, and all Python stacks. It works while
the main thread is blocked in native code that has released the GIL.

Keys, under ``collective_scope/watch`` at the root of the store:

``{process}/beat``: a number that grows; ``{process}/asked``: how often peers
have asked; ``{process}/answer``: the latest `Place` as JSON, with that number;
``server``, ``closing``: set by the process that hosts the store, when it comes
and before it goes; ``news``: counted up when anybody is asked, or the store
closes, so that an idle watcher reads this only; ``started``, ``stopped``: how
many watchers there are.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import attrs
from torch.distributed import PrefixStore, Store

from ._process import NOBODY, Place, Process, me
from ._store_thread import ABSENT, base_of, peek, start_thread


logger = logging.getLogger("collective_scope")

POLL_S = 0.25
"""How often a watcher looks whether it is asked."""

BEAT_S = 1.0

HURRY_S = 1.0
"""How long a new watcher looks more often, to learn which process hosts the store."""

CLOSING_S = 0.5
"""How long the process that hosts the store waits for the watchers of others to stop."""

MOST_FRAMES = 3
"""Frames of the main thread that a message shows."""

_HERE = str(Path(__file__).parent)
_STDLIB = str(Path(os.__file__).parent)


@attrs.define(eq=False)
class Mark:
    """What a scope keeps up to date for the watcher: where its rank is."""

    scope: str
    phase: str = ""
    since: float = 0.0

    def set(self, phase: str) -> None:
        """Note that the rank goes into *phase* now."""
        self.phase, self.since = phase, time.monotonic()


marks: list[Mark] = []
"""The scopes of this process that have been entered and not left, outermost first."""

_left: list[Mark] = []
"""The scope that was left last."""


def enter(mark: Mark) -> None:
    """Note that a scope is entered."""
    marks.append(mark)


def leave(mark: Mark) -> None:
    """Note that a scope has been left."""
    marks.remove(mark)
    _left[:] = [mark]
    mark.set("after")


def here() -> Place:
    """Describe where this process is."""
    mark = marks[-1] if marks else _left[0] if _left else None
    current = sys._current_frames()  # noqa: SLF001  (documented, for this purpose)
    # Under load, CPython 3.11 was seen to give a float for the main thread's frame.
    frames = {ident: frame for ident, frame in current.items() if isinstance(frame, FrameType)}
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    stacks = [
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sorted(frames.items(), key=lambda item: item[0] != main)
        if not names.get(ident, "").startswith("collective_scope-")
    ]
    return Place(
        process=me(),
        phase=f"{mark.phase} scope {mark.scope!r}" if mark else "outside of any scope",
        seconds=time.monotonic() - mark.since if mark else 0.0,
        frames=_innermost(frames[main]) if main in frames else "",
        stacks="\n".join(stacks),
    )


def _innermost(frame: FrameType) -> str:
    summary = [each for each in traceback.extract_stack(frame) if not each.filename.startswith(_HERE)]
    # The wrappers of torch and of the standard library say less than the line that called them.
    users = [
        each
        for each in summary
        if f"{os.sep}torch{os.sep}" not in each.filename
        and not each.filename.startswith("<")
        and (not each.filename.startswith(_STDLIB) or "site-packages" in each.filename)
    ]
    return "".join(traceback.format_list((users or summary)[-MOST_FRAMES:]))


class Watcher:
    """
    Answers for this process over one store.

    Args:
        connect: Returns a client of the store, without prefix, for use on one thread.
        hosted: The store object, if this process hosts its server: it must outlast the watchers of others.
        is_first: Whether this process is the one that hosts the store, if any rank's does.
    """

    def __init__(self, connect: Callable[[], Store], hosted: object = None, *, is_first: bool = False) -> None:
        self._stop = threading.Event()
        self.server: list[Process] = []
        """The process that hosts the store, or `NOBODY` if none of the ranks' does; empty as long as that is unknown."""
        start_thread(
            "collective_scope-watcher", _watch, connect, hosted, self._stop, is_first, self.server, stop=self._stop.set
        )

    def __del__(self) -> None:
        self._stop.set()


def _watch(
    connect: Callable[[], Store],
    hosted: object,
    stop: threading.Event,
    is_first: bool,  # noqa: FBT001  (passed on by position)
    server: list[Process],
) -> None:
    try:
        store = view(connect())
        if is_first:
            server.append(NOBODY if hosted is None else me())
            store.set("server", json.dumps(attrs.astuple(server[0])))
        _answer(store, stop, server, is_server=hosted is not None)
    except RuntimeError as error:  # torch's store errors: the store is gone
        logger.debug("the watcher ends: %s", error)


def _answer(store: Store, stop: threading.Event, server: list[Process], *, is_server: bool) -> None:
    closing = peek(store, "closing")
    store.add("started", 1)
    key, news, asked, beats, next_beat = me().key, "", ABSENT, 0, 0.0
    hurried = time.monotonic() + HURRY_S
    # Once the process that hosts the store has ended, a call would fail, and torch would print a page about it.
    while not (server and server[0].has_ended):
        if stop.wait(POLL_S if server or time.monotonic() > hurried else POLL_S / 10):
            break
        if time.monotonic() >= next_beat:
            beats, next_beat = beats + 1, time.monotonic() + BEAT_S
            store.set(f"{key}/beat", str(beats))
        if not server and (text := peek(store, "server")) != ABSENT:
            server.append(Process(*json.loads(text)))
        now_news = peek(store, "news")
        if now_news == news:
            continue
        news, now_asked = now_news, peek(store, f"{key}/asked")
        if now_asked != asked:
            asked = now_asked
            store.set(f"{key}/answer", json.dumps([int(asked), attrs.asdict(here())]))
        if peek(store, "closing") != closing:
            break
    if not (server and server[0].has_ended):
        _leave_store(store, key, is_server=is_server)


def _leave_store(store: Store, key: str, *, is_server: bool) -> None:
    for name in ("beat", "asked", "answer"):
        store.delete_key(f"{key}/{name}")
    stopped = store.add("stopped", 1)
    if is_server:
        # The watchers of others stop before the store goes.
        store.set("closing", f"{key} {time.monotonic()}")
        store.add("news", 1)
        deadline = time.monotonic() + CLOSING_S
        while stopped < store.add("started", 0) and time.monotonic() < deadline:
            time.sleep(POLL_S / 10)
            stopped = store.add("stopped", 0)


def ask(store: Store, process: Process) -> int:
    """Ask the watcher of *process* where that is, over a `view` of the store; return which answer to wait for."""
    number = store.add(f"{process.key}/asked", 1)
    store.add("news", 1)
    return number


def view(store: Store) -> Store:
    """Return the watchers' part of a store, which is the same for all groups."""
    return PrefixStore("collective_scope/watch", base_of(store))
