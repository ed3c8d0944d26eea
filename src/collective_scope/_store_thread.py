"""
Store calls that can be bounded and interrupted.

A call to a store blocks in C++ for as long as the server likes, whatever time
limit it was given, and no signal handler of Python's runs meanwhile. So the
calls are made on a thread of their own, with a client connection of its own,
and the caller waits for the thread: with a real bound, open to Ctrl-C. A
thread that does not come back is left behind; it is a daemon.
"""

from __future__ import annotations

import atexit
import logging
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Literal, cast

import attrs
from torch.distributed import PrefixStore, Store, TCPStore


logger = logging.getLogger("collective_scope")

Job = Callable[[Store], Any]
"""Given the thread's store."""

Item = tuple[Job, SimpleQueue[Any]] | list[Job] | Literal["stop"]
"""What a thread gets: a job and where to reply; or to end, having done these and removed what is stale, or at once."""

IDLE_S = 0.02
"""Without a job for this long, the thread removes stale keys, until the next job comes."""

MOST_STALE = 10_000
"""More stale keys than this, about 2 MB in the store, do not wait for such a pause."""

FAREWELL_S = 0.5
"""How long whoever drops the last reference to a thread waits for what it does at last; a frozen store takes no longer."""

SIGNALS_S = 0.5
"""How long a signal may have to wait for its handler while the main thread waits for a reply."""

CONNECT_S = 1.0
"""How long it takes to see that nobody listens."""

EXIT_S = 5.0
"""How long the end of the process waits for threads that are in a store call; over a pulled cable, a clone() takes three."""


@attrs.frozen
class Done:
    """The last message of a job: what it returned."""

    value: Any


@attrs.frozen
class Later:
    """What a job may return instead: its value, and keys to remove when there is nothing else to do."""

    value: Any
    stale: list[str]


@attrs.frozen
class Failed:
    """The last message of a job: what it raised."""

    error: BaseException


class StoreThread:
    """
    A thread that makes store calls, one job after the other.

    Args:
        connect: Called on the thread before its first job; returns the store it uses.

    Attributes:
        farewell: Jobs to run at last, when nobody can ask the thread any more.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._jobs: SimpleQueue[Item] = SimpleQueue()
        jobs = self._jobs
        thread = start_thread("collective_scope-store", _serve, jobs, connect, stop=lambda: jobs.put("stop"))
        # The thread holds the queue, not this object, so it ends when nobody can ask it any more.
        self.farewell: list[Job] = []
        weakref.finalize(self, _dismiss, thread, jobs, self.farewell).atexit = False

    def submit(self, job: Job) -> SimpleQueue[Any]:
        """Start *job*; `Done` or `Failed` appears in the returned queue."""
        replies: SimpleQueue[Any] = SimpleQueue()
        self._jobs.put((job, replies))
        return replies

    def call(self, job: Job, timeout: float) -> Any:
        """
        Run *job* and return its value.

        Raises:
            TimeoutError: If it did not finish within *timeout* seconds. It may still do so later.
        """
        last = next_reply(self.submit(job), time.monotonic() + timeout)
        if last is None:
            msg = f"the store did not answer within {timeout:.1f} s"
            raise TimeoutError(msg)
        if isinstance(last, Failed):
            raise last.error
        return last.value


def next_reply(replies: SimpleQueue[Any], until: float) -> Any:
    """
    Return the next reply, or None if there is none until then, on the monotonic clock.

    Looks up now and then: a signal that comes a moment before the wait begins,
    or to another thread, does not end it, and its handler runs when it ends.
    """
    while True:
        left = until - time.monotonic()
        try:
            return replies.get(timeout=max(0.0, min(left, SIGNALS_S)))
        except Empty:
            if left <= SIGNALS_S:
                return None


def _dismiss(thread: threading.Thread, jobs: SimpleQueue[Item], farewell: list[Job]) -> None:
    jobs.put(farewell)
    if farewell and thread is not threading.current_thread():
        # What this process does next may rely on it: a group made again, which peers know of from elsewhere.
        thread.join(FAREWELL_S)


def _serve(jobs: SimpleQueue[Item], connect: Callable[[], Store]) -> None:
    store: Store | None = None
    stale: deque[str] = deque()  # of texts, which the garbage collector does not look at
    pause = IDLE_S
    while True:
        try:
            item = jobs.get(timeout=pause if stale else None)
        except Empty:
            _remove(stale, store, 1)
            pause = 0.0
            continue
        pause = IDLE_S
        if isinstance(item, list):
            _say_farewell(item, store)
            _remove(stale, store, len(stale))
        if not isinstance(item, tuple):
            return
        job, replies = item
        try:
            if store is None:
                store = connect()
            value = job(store)
        except BaseException as error:
            replies.put(Failed(error))
        else:
            replies.put(Done(value.value if isinstance(value, Later) else value))
            if isinstance(value, Later):
                stale.extend(value.stale)
                if len(stale) > MOST_STALE:
                    # A few more than came, not all at once: a peer may be waiting for the next job.
                    _remove(stale, store, 2 * len(value.stale))
            del value
        # Until the next job comes, this frame must keep nothing of the last one alive.
        del item, job, replies


def _remove(stale: deque[str], store: Store | None, number: int) -> None:
    try:
        for _ in range(min(number, len(stale))):
            cast(Store, store).delete_key(stale.popleft())  # a job has left them there
    except RuntimeError as error:
        # torch's store errors are RuntimeErrors. The store is gone, and the keys with it.
        logger.debug("stale keys cannot be removed: %s", error)
        stale.clear()


def _say_farewell(jobs: list[Job], store: Store | None) -> None:
    try:
        for job in jobs if store is not None else ():
            job(cast(Store, store))
    except RuntimeError as error:
        logger.debug("the store was gone before it was left: %s", error)


_stops: weakref.WeakKeyDictionary[threading.Thread, Callable[[], object]] = weakref.WeakKeyDictionary()
"""How to end each thread that makes store calls, for as long as it runs."""


def start_thread(name: str, target: Callable[..., object], *args: Any, stop: Callable[[], object]) -> threading.Thread:
    """Start a daemon thread that the end of the process waits for, a short time, having called *stop*; return it."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    _stops[thread] = stop
    thread.start()
    return thread


@atexit.register
def _stop_all() -> None:
    """
    End the threads before the interpreter ends.

    A daemon thread that comes back from C++ while the interpreter is going
    away is ended inside of a C++ frame, and that aborts the process ("terminate
    called without an active exception").
    """
    deadline = time.monotonic() + EXIT_S
    threads = list(_stops.items())
    for _, stop in threads:
        stop()
    for thread, _ in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def base_of(store: Store) -> Store:
    """Return the store that *store* is a view of."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def knock(store: Store) -> None:
    """
    See whether anybody serves *store*, a view or the store itself.

    A call of torch's to a server that is gone prints a page, and its
    ``clone()`` asks for minutes, which nothing ends.

    Raises:
        OSError: If it is a TCPStore and its server does not listen, or did not answer within `CONNECT_S`.
    """
    base = base_of(store)
    if isinstance(base, TCPStore):
        socket.create_connection((base.host, base.port), CONNECT_S).close()


ABSENT = "?"
"""What `peek` gets for a key that is not there; no key has this value."""


def set_first(store: Store, key: str, value: str) -> str:
    """Write *value* unless *key* is there; return what is there."""
    return store.compare_set(key, "", value).decode()


def peek(store: Store, key: str) -> str:
    """
    Read *key* without waiting for it, in one call; `ABSENT` if it is not there.

    Not for keys that are waited for: a TCPStore wakes who waits for a key at
    every ``compare_set`` of it, whether or not that writes it (torch 2.13).
    """
    # A compare_set that cannot match returns the present value, or what was expected.
    return store.compare_set(key, ABSENT, ABSENT).decode()
