"""
Store calls that can be bounded and left behind.

A call to a store blocks in C++ for as long as the server likes, whatever time limit it was given,
and no signal handler of Python's runs meanwhile. So the calls are made on a thread of their own,
with a connection of its own. The caller waits for the thread with a real bound, open to Ctrl-C. A
thread that does not come back is left behind; it is a daemon.
"""

from __future__ import annotations

import atexit
import socket
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import attrs
from torch.distributed import PrefixStore, Store, TCPStore

from .clock import monotonic
from .sockets import connected_sockets, cut


__tracebackhide__ = True
"""Where pytest leaves frames out: they tell nothing of a test."""

Job = Callable[[Store], Any]
"""Given the thread's store."""

FOREVER = timedelta(days=1)
"""Longer than anything waits; what bounds a wait is the caller, or the verdict that it waits for."""

SIGNALS_S = 0.5
"""How long a signal may have to wait for its handler while the main thread waits for a reply."""

CONNECT_S = 1.0
"""How long it takes to see that no process listens."""

EXIT_S = 5.0
"""How long the end of the process waits for threads that are in a store call; over a pulled cable, a clone() takes three."""

CUT_S = 1.0
"""How long it waits once their connections are cut."""

ABSENT = b"?"
"""The reply of `peek` for a key that is not there; no key has this value."""


@attrs.frozen
class Failed:
    """The reply of a job that raised."""

    error: BaseException


class StoreThread:
    """
    A thread that makes store calls, one job after the other.

    If the system has no thread to give, the caller makes the calls itself.

    Args:
        connect: Called on the thread before its first job; returns the store it uses.

    Attributes:
        replies: `Failed` for a job that raised; a job that has a reply puts it here itself, or returns it.
        is_running: Whether there is a thread.
        ident: The thread that makes the calls.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.replies: SimpleQueue[Any] = SimpleQueue()
        self._args = (self._jobs, self.replies, connect)
        try:
            # The thread holds the queues, not this object, so it ends when nobody can ask it any more.
            stop = weakref.WeakMethod(self.stop)
            self.ident = start_thread("collective_scope-store", _serve, *self._args, stop=stop).ident or 0
        except RuntimeError:
            self.is_running, self.ident = False, threading.get_ident()
        else:
            self.is_running = True
            weakref.finalize(self, self._jobs.put, None).atexit = False

    def submit(self, job: Job) -> None:
        """Have *job* run after those before it."""
        self._jobs.put(job)
        if not self.is_running:
            self._jobs.put(None)
            _serve(*self._args)

    def stop(self) -> None:
        """Let the thread end after the jobs that it has."""
        self._jobs.put(None)


def next_reply(replies: SimpleQueue[Any], until: float) -> Any:
    """
    Return the next reply, or None if there is none until then, on the monotonic clock.

    Looks up now and then: a signal that comes a moment before the wait begins,
    or to another thread, does not end it, and its handler runs when it ends.
    """
    while True:
        left = until - monotonic()
        try:
            return replies.get(timeout=max(0.0, min(left, SIGNALS_S)))
        except Empty:
            if left <= SIGNALS_S:
                return None


def _serve(jobs: SimpleQueue[Job | None], replies: SimpleQueue[Any], connect: Callable[[], Store]) -> None:
    store: Store | None = None
    while (job := jobs.get()) is not None:
        try:
            store = connect() if store is None else store
            reply = job(store)
        except BaseException as error:
            reply = Failed(error)
        if reply is not None:
            replies.put(reply)
        # Until the next job comes, this frame must keep nothing of the last one alive.
        del job, reply


_threads: dict[threading.Thread, Callable[[], Callable[[], object] | None]] = {}
"""How to stop each thread that makes store calls: a weak reference to the function that does."""

_ports: set[int] = set()
"""Where the stores listen to which these threads have connected."""


def start_thread(
    name: str, target: Callable[..., object], *args: Any, stop: Callable[[], Callable[[], object] | None]
) -> threading.Thread:
    """Start a daemon thread that the end of the process stops, and waits for a short time; return it."""
    for ended in [thread for thread in list(_threads) if not thread.is_alive()]:
        _threads.pop(ended, None)
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    _threads[thread] = stop
    return thread


@atexit.register
def _stop_all() -> None:
    """
    End the threads before the interpreter ends.

    A daemon thread that comes back from C++ while the interpreter is going
    away is ended inside of a C++ frame, and that aborts the process ("terminate
    called without an active exception"). So a call that waits for a server that
    is silent, or was out of reach, is ended by cutting its connection.
    """
    threads = [(thread, stop()) for thread, stop in list(_threads.items()) if thread.is_alive()]
    for _, stop in threads:
        if stop is not None:
            stop()
    if not _join([thread for thread, _ in threads], EXIT_S):
        cut(connected_sockets(to=_ports))
        _join([thread for thread, _ in threads], CUT_S)


def _join(threads: list[threading.Thread], timeout: float) -> bool:
    """Wait until *threads* have ended, up to *timeout* seconds for all; return whether they have."""
    deadline = monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - monotonic()))
    return not any(thread.is_alive() for thread in threads)


def base_of(store: Store) -> Store:
    """Return the store that *store* is a view of."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def unbounded(view: Store) -> Store:
    """Return the store that *view*, a client for one thread, is a view of, with no time limit of its own."""
    store = base_of(view)
    if isinstance(store, TCPStore):  # of other stores, a clone is the user's own
        store.set_timeout(FOREVER)
        _ports.add(store.port)
    return store


def get(store: Store, key: str) -> bytes:
    """Wait for *key*, for as long as it takes, and return what is there."""
    if not isinstance(store, TCPStore):  # a client of its own, whose time limit is ours
        store.wait([key], FOREVER)
    return store.get(key)


def compare_set(store: Store, key: str, expected: bytes, value: bytes) -> bytes:
    """Write *value* if *expected* is there; return what is there, or *expected* if nothing is and that is not empty."""
    return store.compare_set(key, expected, value)  # type: ignore[arg-type]  # torch's stub has no bytes


def set_first(store: Store, key: str, value: bytes) -> bytes:
    """Write *value* unless *key* is there; wake those that wait for it; return what is there."""
    there = compare_set(store, key, b"", value)
    # The server without libuv does not wake those that wait for the key. Others do; they must not write again.
    if there == value and isinstance(store, TCPStore) and not store.libuvBackend:  # type: ignore[attr-defined]  # missing in torch's stubs
        store.set(key, value)  # type: ignore[arg-type]  # torch's stub has no bytes
    return there


def peek(store: Store, key: str) -> bytes:
    """
    Read *key* without waiting for it, in one call; `ABSENT` if it is not there.

    Not for keys that are waited for: a TCPStore wakes those that wait for a key
    at every ``compare_set`` of it, whether or not that writes it (torch 2.13).
    """
    # A compare_set that cannot match returns the present value, or what was expected.
    return compare_set(store, key, ABSENT, ABSENT)


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
