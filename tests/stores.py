"""What tests of scopes and barriers need where ranks are threads: groups, stores that misbehave, and a way to wait."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import attrs
import torch.distributed as dist

from collective_scope.agreement.records import Record
from tests.ranks import Sequencer, run_threads, values


Hook = Callable[[str, str], object]
"""Called with the method and the key (without what all keys begin with) before each call; may block or raise."""

PATIENCE_S = 20.0
"""Far more than anything takes on a busy machine."""


@attrs.define(eq=False, weakref_slot=True)
class RankGroup:
    """
    A group whose ranks are threads of this process.

    Attributes:
        store: The store that they share.
        rank: One of them.
        world_size: Their number.
    """

    store: dist.Store
    rank: int
    world_size: int


class HookedStore(dist.Store):
    """A store in which something happens before each call; its methods are those of a store."""

    def __init__(self, store: dist.Store, hook: Hook) -> None:
        super().__init__()
        self._store = store
        self._hook = hook

    def _before(self, method: str, key: str) -> None:
        # "collective_scope/{life}/{key}", and "life", "collective_scope/news" and the like as they are.
        parts = key.split("/", 2)
        self._hook(method, parts[2] if len(parts) > 2 and parts[1] not in ("news", "beat") else key)

    def clone(self) -> dist.Store:  # noqa: D102
        return self

    def get(self, key: str) -> bytes:  # noqa: D102
        self._before("get", key)
        return self._store.get(key)

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

    def delete_key(self, key: str) -> bool:  # noqa: D102
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


def record_of(store: dist.Store, rank: int) -> Record | None:
    """Return the latest record of *rank*, as a peer sees it; None if it has told nothing."""
    if not store.check(["life"]):
        return None
    key = f"collective_scope/{store.get('life').decode()}/rank/{rank}"
    return Record.decode(store.get(key)) if store.check([key]) else None


def is_waiting(store: dist.Store, rank: int, stage: str = "exit") -> bool:
    """Whether *rank* is at the barrier, seen from outside."""
    record = record_of(store, rank)
    return record is not None and record.arrived and record.stage == stage


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


def meet(
    world_size: int, fn: Callable[[int, RankGroup, Sequencer], Any], *, timeout: float = 60.0, store: Any = None
) -> list[Any]:
    """Call *fn* on each rank, a thread, with a group of its own; return what it returned."""
    kept: list[RankGroup] = []  # a group that one rank drops early is left for ranks that have not come to it yet

    def run(rank: int, own: dist.HashStore, sequencer: Sequencer) -> Any:
        group = RankGroup(store or own, rank, world_size)
        kept.append(group)
        return fn(rank, group, sequencer)

    return values(run_threads(world_size, run, timeout=timeout))
