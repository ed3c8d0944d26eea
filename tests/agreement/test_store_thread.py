"""Store calls on a thread of their own: bounded, in order, and gone when nobody needs them."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch.distributed as dist

from collective_scope.agreement.store_thread import SIGNALS_S, Failed, StoreThread, next_reply
from tests.ranks import run_script
from tests.stores import PATIENCE_S, interrupted_when


def _reply(thread: StoreThread, job: Callable[[dist.Store], Any]) -> Any:
    thread.submit(job)
    return thread.replies.get(timeout=PATIENCE_S)


def _current_thread(_: dist.Store) -> threading.Thread:
    return threading.current_thread()


@pytest.fixture(name="no_threads")
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the system have no more threads to give."""

    def refuse(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def test_jobs_run_in_order_on_one_daemon_thread_with_one_connection() -> None:
    """All jobs share a thread, which never keeps a process from ending, and one connection, made for the first."""
    connections: list[dist.Store] = []

    def connect() -> dist.Store:
        connections.append(dist.HashStore())
        return connections[-1]

    thread = StoreThread(connect)
    assert [] == connections
    for number in range(3):
        thread.submit(lambda store, number=number: (number, store, threading.current_thread()))
    replies = [thread.replies.get(timeout=PATIENCE_S) for _ in range(3)]

    assert [0, 1, 2] == [number for number, _, _ in replies]
    assert [connections[0]] == list({store for _, store, _ in replies})
    (worker,) = {worker for _, _, worker in replies}
    assert (True, False) == (worker.daemon, worker is threading.current_thread())


def test_job_that_returns_nothing_has_no_reply() -> None:
    """Only what a job returns is a reply."""
    thread = StoreThread(dist.HashStore)
    thread.submit(lambda _: None)

    assert "second" == _reply(thread, lambda _: "second")


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(dist.DistNetworkError("reset"), id="network"),
        pytest.param(KeyError("key"), id="exception"),
        pytest.param(SystemExit(3), id="base-exception"),
    ],
)
def test_job_that_raises_replies_with_the_error_and_the_thread_goes_on(error: BaseException) -> None:
    """A job's error reaches the one that asked, the same object, and the next job runs."""
    thread = StoreThread(dist.HashStore)

    def fail(_: dist.Store) -> None:
        raise error

    reply = _reply(thread, fail)

    assert isinstance(reply, Failed)
    assert error is reply.error
    assert 1 == _reply(thread, lambda _: 1)


def test_connection_that_fails_is_a_reply_and_is_tried_again() -> None:
    """A connection that cannot be made fails that job only."""
    stores: list[dist.Store] = []

    def connect() -> dist.Store:
        stores.append(dist.HashStore())
        if len(stores) == 1:
            msg = "refused"
            raise RuntimeError(msg)
        return stores[-1]

    thread = StoreThread(connect)

    assert "refused" == str(_reply(thread, lambda store: store).error)
    assert _reply(thread, lambda store: store) is stores[1]


def test_next_reply_that_does_not_come_is_bounded() -> None:
    """A reply that does not come costs the one that waits the time that it gave, no less."""
    start = time.monotonic()

    assert next_reply(SimpleQueue(), start + 0.1) is None
    assert 0.1 <= time.monotonic() - start < PATIENCE_S / 2


@pytest.mark.parametrize("wakes", [True, False])
def test_next_reply_lets_a_signal_be_seen_soon(wakes: bool) -> None:  # noqa: FBT001  (parametrized)
    """A signal ends the wait, also if it comes to another thread, or a moment before the wait begins."""
    start = time.monotonic()

    with pytest.raises(KeyboardInterrupt), interrupted_when(lambda: True, wakes=wakes):
        next_reply(SimpleQueue(), start + PATIENCE_S)
    assert time.monotonic() - start < SIGNALS_S + 5.0


def test_thread_ends_when_nobody_can_ask_it_any_more() -> None:
    """Dropping the last reference ends the thread, after the jobs that it has."""
    thread, ran = StoreThread(dist.HashStore), threading.Event()
    worker = _reply(thread, _current_thread)
    thread.submit(lambda _: ran.set())
    del thread
    gc.collect()
    worker.join(PATIENCE_S)

    assert not worker.is_alive()
    assert ran.is_set()


def test_thread_that_is_stopped_in_a_call_ends_after_it() -> None:
    """A thread that is in a call ends when the call comes back."""
    thread, release = StoreThread(dist.HashStore), threading.Event()
    worker = _reply(thread, _current_thread)
    thread.submit(lambda _: release.wait(PATIENCE_S))
    thread.stop()

    assert worker.is_alive()

    release.set()
    worker.join(PATIENCE_S)

    assert not worker.is_alive()


def test_thread_at_rest_keeps_nothing_of_its_last_job_alive() -> None:
    """A job's objects and result can go while the thread waits for the next job."""

    class Thing:
        pass

    thread, thing, gone = StoreThread(dist.HashStore), Thing(), threading.Event()
    weakref.finalize(thing, gone.set)

    assert thing is _reply(thread, lambda _, thing=thing: thing)

    del thing

    assert gone.wait(PATIENCE_S)
    assert 1 == _reply(thread, lambda _: 1)


@pytest.mark.usefixtures("no_threads")
def test_jobs_without_a_thread_run_where_they_are_given() -> None:
    """If the system has no thread to give, the one that asks makes the calls itself, and errors are replies too."""
    thread = StoreThread(dist.HashStore)

    def fail(_: dist.Store) -> None:
        raise KeyError

    assert not thread.is_running
    assert _reply(thread, _current_thread) is threading.current_thread()
    assert isinstance(_reply(thread, fail).error, KeyError)
    assert 1 == _reply(thread, lambda _: 1)


_PROGRAM = """
import threading
from datetime import timedelta
import torch.distributed as dist
from collective_scope.agreement.store_thread import StoreThread

store = dist.HashStore()
waiting, idle = StoreThread(lambda: store), StoreThread(lambda: store)
started = threading.Event()
waiting.submit(lambda store: (started.set(), store.wait(["never"], timedelta(seconds=%s))))
idle.submit(lambda _: 1)
idle.replies.get(timeout=10.0)
started.wait(10.0)
print("through")
"""


@pytest.mark.parametrize(
    "seconds",
    [pytest.param("0.3", id="comes-back-at-the-end"), pytest.param("1000", id="never-comes-back")],
)
def test_threads_at_the_end_of_a_process_do_not_keep_or_crash_it(seconds: str) -> None:
    """A process ends well, and soon, whatever its threads are waiting for."""
    result = run_script("-c", _PROGRAM % seconds, timeout=60.0)

    assert ("through\n", "") == (result.stdout, result.stderr)


_LATE_REPLY = """
import atexit
import threading

import torch.distributed as dist

server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
atexit.register(server.set, "late", "the interpreter is about to go")  # runs last, as it is registered first

from collective_scope.agreement import store_thread

store_thread.EXIT_S = 0.3
started = threading.Barrier(9)
threads = [store_thread.StoreThread(lambda: store_thread.unbounded(server.clone())) for _ in range(8)]
for thread in threads:
    thread.submit(lambda store: (started.wait(10.0), store_thread.get(store, "late")))
started.wait(10.0)
print("through")
"""


def test_reply_that_comes_while_the_interpreter_ends_does_not_crash_the_process() -> None:
    """The process cuts the connections of its threads, if a store does not answer them in time."""
    result = run_script("-c", _LATE_REPLY, timeout=60.0)

    assert "through\n" == result.stdout  # and its exit code is 0
