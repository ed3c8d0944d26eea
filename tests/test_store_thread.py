"""Store calls on a thread of their own: bounded, in order, and gone when nobody needs them."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from collective_scope import _store_thread
from collective_scope._store_thread import Done, Failed, Later, StoreThread
from tests.ranks import run_script
from tests.stores import PATIENCE_S


@pytest.fixture(name="release")
def _release() -> Iterator[threading.Event]:
    """Return an event for jobs to wait for; it is set at the end."""
    event = threading.Event()
    yield event
    event.set()


def _current_thread(*_: Any) -> threading.Thread:
    return threading.current_thread()


def _wait_for(event: threading.Event) -> Callable[..., bool]:
    return lambda *_: event.wait(PATIENCE_S)


def test_call_returns_what_the_job_returned_for_its_store() -> None:
    """A job gets the store that was connected, and its value comes back."""
    store = dist.HashStore()
    thread = StoreThread(lambda: store)

    assert thread.call(lambda given: given, PATIENCE_S) is store


def test_calls_run_on_one_daemon_thread_with_one_connection() -> None:
    """All jobs share a thread, which never keeps a process from ending, and one connection."""
    connections: list[int] = []

    def connect() -> dist.Store:
        connections.append(1)
        return dist.HashStore()

    thread = StoreThread(connect)
    threads = {thread.call(_current_thread, PATIENCE_S) for _ in range(3)}

    assert [(True, False)] == [(each.daemon, each is threading.current_thread()) for each in threads]
    assert [1] == connections


def test_call_that_blocks_is_bounded(release: threading.Event) -> None:
    """A job that does not come back costs its caller the time limit, and says so."""
    thread = StoreThread(dist.HashStore)
    start = time.monotonic()

    with pytest.raises(TimeoutError, match=r"^the store did not answer within 0\.1 s$"):
        thread.call(_wait_for(release), 0.1)

    assert 0.1 <= time.monotonic() - start < PATIENCE_S / 2


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(dist.DistNetworkError("reset"), id="network"),
        pytest.param(KeyError("key"), id="exception"),
        pytest.param(SystemExit(3), id="base-exception"),
    ],
)
def test_call_error_is_delivered_and_the_thread_goes_on(error: BaseException) -> None:
    """What a job raises reaches its caller, the same object, and the next job runs."""
    thread = StoreThread(dist.HashStore)

    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        thread.call(fail, PATIENCE_S)

    assert error is caught.value
    assert 1 == thread.call(lambda *_: 1, PATIENCE_S)


def test_call_failed_connection_is_delivered_and_tried_again() -> None:
    """A connection that cannot be made fails that job only."""
    stores: list[dist.Store] = []

    def connect() -> dist.Store:
        stores.append(dist.HashStore())
        if len(stores) == 1:
            msg = "refused"
            raise RuntimeError(msg)
        return stores[-1]

    thread = StoreThread(connect)

    with pytest.raises(RuntimeError, match=r"^refused$"):
        thread.call(lambda *_: None, PATIENCE_S)
    store = thread.call(lambda store: store, PATIENCE_S)
    assert store is stores[1]


def test_submit_reply_says_how_the_job_ended() -> None:
    """What comes back is `Done` or `Failed`."""
    thread = StoreThread(dist.HashStore)

    def fail(_: dist.Store) -> None:
        msg = "no"
        raise ValueError(msg)

    replies, failures = thread.submit(lambda _: "value"), thread.submit(fail)

    assert Done("value") == replies.get(timeout=PATIENCE_S)
    match failures.get(timeout=PATIENCE_S):
        case Failed(ValueError()):
            pass
        case other:
            pytest.fail(f"not the error: {other}")


class _NotingStore(dist.Store):
    """Notes which keys are removed."""

    def __init__(self, fail_at: str = "", hold_at: str = "") -> None:
        super().__init__()
        self.fail_at, self.hold_at = fail_at, hold_at
        self.is_held, self.release = threading.Event(), threading.Event()
        self.removed: list[str] = []
        self.is_done = threading.Event()

    def delete_key(self, key: str) -> bool:
        if key == self.fail_at:
            self.is_done.set()
            msg = "connection reset"
            raise RuntimeError(msg)
        if key == self.hold_at:
            self.is_held.set()
            self.release.wait(PATIENCE_S)
        self.removed.append(key)
        if key == "last":
            self.is_done.set()
        return True


def test_stale_keys_are_removed_when_there_is_nothing_else_to_do() -> None:
    """What a job leaves behind goes soon after the last one."""
    store = _NotingStore()
    thread = StoreThread(lambda: store)

    assert 1 == thread.call(lambda _: Later(1, ["first", "last"]), PATIENCE_S)
    assert store.is_done.wait(PATIENCE_S)
    assert ["first", "last"] == store.removed


def test_stale_keys_give_way_to_jobs() -> None:
    """Removing them does not delay what somebody waits for."""
    store = _NotingStore()
    thread = StoreThread(lambda: store)
    started = threading.Event()
    thread.submit(_wait_for(started))
    thread.submit(lambda _: Later(None, ["last"]))
    thread.submit(lambda given: given.removed.append("a job"))  # type: ignore[attr-defined]
    started.set()

    assert store.is_done.wait(PATIENCE_S)
    assert ["a job", "last"] == store.removed


def test_stale_keys_being_removed_give_way_to_the_next_job() -> None:
    """A job that comes in the middle waits for one key, not for all of them."""
    store = _NotingStore(hold_at="second")
    thread = StoreThread(lambda: store)
    thread.call(lambda _: Later(None, ["first", "second", "third", "last"]), PATIENCE_S)

    assert store.is_held.wait(PATIENCE_S)
    thread.submit(lambda given: given.removed.append("a job"))  # type: ignore[attr-defined]
    store.release.set()
    assert store.is_done.wait(PATIENCE_S)
    assert ["first", "second", "a job", "third", "last"] == store.removed


def test_stale_keys_without_a_pause_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is never idle removes them, a few at a time, before there are too many."""
    monkeypatch.setattr(_store_thread, "MOST_STALE", 10)
    store = _NotingStore()
    thread = StoreThread(lambda: store)
    started = threading.Event()
    thread.submit(_wait_for(started))
    seen: list[int] = []
    for number in range(40):
        thread.submit(lambda given: seen.append(len(given.removed)))  # type: ignore[attr-defined]
        thread.submit(lambda _, n=number: Later(None, [f"{n}a", f"{n}b", f"{n}c"]))  # type: ignore[misc]
    started.set()
    removed = thread.call(lambda given: len(given.removed), PATIENCE_S)  # type: ignore[attr-defined]

    assert 3 * 40 - removed <= 10 + 3
    assert max(after - before for before, after in itertools.pairwise(seen)) <= 6


def test_stale_keys_of_a_store_that_is_gone_are_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing to remove then; a line for those who look, and the thread goes on."""
    caplog.set_level(logging.DEBUG, "collective_scope")
    store = _NotingStore(fail_at="first")
    thread = StoreThread(lambda: store)
    thread.call(lambda _: Later(None, ["first", "second"]), PATIENCE_S)

    assert store.is_done.wait(PATIENCE_S)
    store.is_done.clear()
    assert 2 == thread.call(lambda _: Later(2, ["last"]), PATIENCE_S)
    assert store.is_done.wait(PATIENCE_S)
    assert ["last"] == store.removed
    assert ["stale keys cannot be removed: connection reset"] == caplog.messages


def test_thread_ends_when_nobody_can_ask_it_any_more() -> None:
    """Dropping the last reference ends the thread."""
    thread = StoreThread(dist.HashStore)
    worker = thread.call(_current_thread, PATIENCE_S)
    del thread
    gc.collect()
    worker.join(PATIENCE_S)

    assert not worker.is_alive()


def test_thread_says_farewell_when_nobody_can_ask_it_any_more(caplog: pytest.LogCaptureFixture) -> None:
    """At last it removes what is stale, then does what was left to it; a store that is gone is no trouble."""
    caplog.set_level(logging.DEBUG, "collective_scope")
    store = _NotingStore()
    thread = StoreThread(lambda: store)

    def fail(_: dist.Store) -> None:
        msg = "connection reset"
        raise RuntimeError(msg)

    thread.farewell.extend([lambda given: given.removed.append("farewell"), fail])  # type: ignore[attr-defined]
    worker = thread.call(lambda _: Later(threading.current_thread(), ["stale"]), PATIENCE_S)
    del thread
    gc.collect()
    worker.join(PATIENCE_S)

    assert ["farewell", "stale"] == store.removed
    assert ["the store was gone before it was left: connection reset"] == caplog.messages


def test_thread_left_in_a_call_ends_after_it() -> None:
    """A thread that was left behind in a call ends when the call comes back."""
    thread, release = StoreThread(dist.HashStore), threading.Event()
    worker = thread.call(_current_thread, PATIENCE_S)
    with pytest.raises(TimeoutError):
        thread.call(_wait_for(release), 0.01)
    del thread
    gc.collect()

    assert worker.is_alive()

    release.set()
    worker.join(PATIENCE_S)

    assert not worker.is_alive()


def test_thread_at_rest_keeps_nothing_of_its_last_job_alive() -> None:
    """What a job used and returned can go while the thread waits for the next one."""

    class Thing:
        pass

    thread = StoreThread(dist.HashStore)
    thing = Thing()
    gone = threading.Event()
    weakref.finalize(thing, gone.set)
    replies = thread.submit(lambda *_, thing=thing: thing)

    assert thing is replies.get(timeout=PATIENCE_S).value

    del thing, replies

    assert gone.wait(PATIENCE_S)
    assert 1 == thread.call(lambda *_: 1, PATIENCE_S)


_WAITING_PROGRAM = """
import threading, time
from datetime import timedelta
import torch.distributed as dist
from collective_scope._store_thread import StoreThread

store = dist.HashStore()
waiting, idle = StoreThread(lambda: store), StoreThread(lambda: store)
started = threading.Event()
waiting.submit(lambda store: (started.set(), store.wait(["never"], timedelta(seconds=%s))))
idle.call(lambda *_: None, 10.0)
started.wait(10.0)
print("through")
"""


@pytest.mark.parametrize(
    "seconds",
    [pytest.param("0.3", id="comes-back-at-the-end"), pytest.param("1000", id="never-comes-back")],
)
def test_threads_at_the_end_of_a_process_do_not_keep_or_crash_it(seconds: str) -> None:
    """A process ends in peace, and soon, whatever its threads are waiting for."""
    result = run_script("-c", _WAITING_PROGRAM % seconds, timeout=60.0)

    assert ("through\n", "") == (result.stdout, result.stderr)
