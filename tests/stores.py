"""What tests of scopes and barriers need where ranks are threads: stores that misbehave, and a way to wait."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from collective_scope import _scope
from collective_scope._barrier import Barrier
from tests.ranks import Sequencer, run_threads, values


Hook = Callable[[str, str], object]
"""Called with the method and the key (without what all keys begin with) before each call; may block or raise."""

PATIENCE_S = 20.0
"""Far more than anything takes on a busy machine."""


class HookedStore(dist.Store):
    """A store in which something happens before each call; its methods are those of a store."""

    def __init__(self, store: dist.Store, hook: Hook) -> None:
        super().__init__()
        self._store = store
        self._hook = hook

    def _before(self, method: str, key: str) -> None:
        # "collective_scope/{world size}/{life}/{key}"; "life" and seats have one part less before them.
        self._hook(method, key.split("/", 3)[-1])

    def set(self, key: str, value: Any) -> None:  # noqa: D102
        self._before("set", key)
        self._store.set(key, value)

    def add(self, key: str, amount: int) -> int:  # noqa: D102
        self._before("add", key)
        return self._store.add(key, amount)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:  # noqa: D102
        self._before("compare_set", key)
        return self._store.compare_set(key, expected, desired)

    def check(self, keys: list[str]) -> bool:  # noqa: D102
        self._before("check", keys[0])
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta = timedelta(seconds=PATIENCE_S)) -> None:  # noqa: D102
        self._before("wait", keys[0])
        self._store.wait(keys, timeout)

    def deleteKey(self, key: str) -> bool:  # noqa: D102, N802  (the name that torch looks for)
        self._before("delete_key", key)
        return self._store.delete_key(key)


def wait_until(is_true: Callable[[], bool], timeout: float = PATIENCE_S) -> bool:
    """Ask until the answer is yes; return whether it came in time."""
    deadline = time.monotonic() + timeout
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)  # Nothing announces what is asked for.
    return True


def is_waiting(store: dist.Store, rank: int, world_size: int, *, round_: int = 0, life: int = 0) -> bool:
    """Whether *rank* is at the barrier, seen from outside."""
    prefix = f"collective_scope/{world_size}/{life}"
    key = f"{prefix}/rank/{rank}"
    return store.check([key]) and f"[{round_}, " in store.get(key).decode()


@contextlib.contextmanager
def interrupted_when(is_time: Callable[[], bool], *, wakes: bool = True) -> Iterator[None]:
    """
    Send this process's main thread, which runs the block, a SIGINT as soon as *is_time*.

    One that does not wake it comes to another thread, and is seen when the main thread runs again; so is one that
    comes a moment before the main thread begins to wait.
    """

    def interrupt() -> None:
        if wait_until(is_time):
            signal.pthread_kill(main_thread if wakes else threading.get_ident(), signal.SIGINT)

    main_thread = threading.get_ident()
    thread = threading.Thread(target=interrupt)
    # A process that was started in the background may have been told to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def barriers_as_groups() -> Iterator[None]:
    """
    Let `collective_scope` take a `Barrier` as its group.

    A process has one default group, so ranks that are threads cannot each have one.
    """
    find_barrier = _scope.find_barrier  # type: ignore[attr-defined]

    def find(group: Any) -> Any:
        return (group, None) if isinstance(group, Barrier) else find_barrier(group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_scope, "find_barrier", find)
        yield


def barrier_of(store: dist.Store, rank: int, world_size: int, **options: Any) -> Barrier:
    """Return the barrier of one rank; options are those of `Barrier`."""
    return Barrier(lambda: store, rank, world_size, **options)


def meet(
    world_size: int, fn: Callable[[int, Barrier, Sequencer], Any], *, timeout: float = 60.0, **options: Any
) -> list[Any]:
    """Call *fn* on each rank, a thread, with a barrier of its own; return what it returned."""
    kept: list[Barrier] = []  # a group that one rank destroys early is over for ranks that have not come to it yet

    def run(rank: int, store: dist.HashStore, sequencer: Sequencer) -> Any:
        barrier = barrier_of(store, rank, world_size, **options)
        kept.append(barrier)
        return fn(rank, barrier, sequencer)

    return values(run_threads(world_size, run, timeout=timeout))
