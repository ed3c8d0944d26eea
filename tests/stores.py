"""Tools for tests of scopes and barriers where ranks are threads: groups, stores that misbehave, and a way to wait."""

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

from collective_scope.agreement.barrier import Barrier
from collective_scope.agreement.control import Control
from collective_scope.agreement.part import Part
from collective_scope.agreement.process import me
from collective_scope.agreement.records import Outcome, Record, Verdict
from collective_scope.agreement.rounds import name_of
from collective_scope.agreement.wait import Wait
from collective_scope.agreement.watch import Span
from tests.ranks import Sequencer, run_threads, values


Hook = Callable[[str, str], object]
"""Called with the method and the key (without what all keys begin with) before each call; may block or raise."""

PATIENCE_S = 20.0
"""Far more than anything takes on a busy machine."""

LONG_S = 120.0
"""A timeout that no test may reach."""


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
        # "collective_scope/{life}/{key}", and "life of 2", "collective_scope/news" and the like as they are.
        parts = key.split("/", 2)
        self._hook(method, parts[2] if len(parts) > 2 and parts[1] not in ("news", "beat") else key)

    def clone(self) -> dist.Store:  # noqa: D102  (as in torch)
        return self

    def get(self, key: str) -> bytes:  # noqa: D102  (as in torch)
        self._before("get", key)
        return self._store.get(key)

    def set(self, key: str, value: Any) -> None:  # noqa: D102  (as in torch)
        self._before("set", key)
        self._store.set(key, value)

    def add(self, key: str, amount: int) -> int:  # noqa: D102  (as in torch)
        self._before("add", key)
        return self._store.add(key, amount)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:  # noqa: D102  (as in torch)
        self._before("compare_set", key)
        return self._store.compare_set(key, expected, desired)

    def check(self, keys: list[str]) -> bool:  # noqa: D102  (as in torch)
        self._before("check", keys[0])
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta = timedelta(seconds=PATIENCE_S)) -> None:  # noqa: D102  (as in torch)
        self._before("wait", keys[0])
        self._store.wait(keys, timeout)

    def delete_key(self, key: str) -> bool:  # noqa: D102  (as in torch)
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
    lives = [key for key in store.list_keys() if key.startswith("life of ")]
    if not lives:
        return None
    key = f"collective_scope/{store.get(lives[0]).decode()}/rank/{rank}"
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


@attrs.define(eq=False)
class Rank:
    """
    A rank that is a thread, with all that it would have in a process of its own: its own control thread above all.

    Args:
        store: The store of its group. Its threads are told apart by name: see `is_control`.
        rank: Its number.
        world_size: Number of ranks.
        server: The rank that serves the store, as far as this one can guess.
        serves: Whether this one's process does.
        silence: Seconds without a heartbeat after which a rank on another machine counts as lost.

    Attributes:
        control: The control thread its process would have.
        barrier: Its barrier.
        said: Messages to people: the kind, and the facts.
    """

    store: Any
    rank: int
    world_size: int
    server: int | None = None
    serves: bool = False
    silence: float = LONG_S
    control: Control = attrs.field(init=False)
    barrier: Barrier = attrs.field(init=False)
    said: list[tuple[str, Verdict]] = attrs.field(factory=list, init=False)
    _spans: list[Span] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self.control = Control(self.store.clone, self.store if self.serves else None, serves=self.serves)
        process = attrs.evolve(me(), serves=self.serves)
        heard, items = self.control.heard, self.control.items
        part = Part(self.store.clone, self.rank, self.world_size, heard, items, process, self.server)
        self.control.groups[id(part)] = part
        self.barrier = Barrier(part, self.control)

    @property
    def part(self) -> Part:
        """Its part in the rounds."""
        return self.barrier.part

    @contextlib.contextmanager
    def scope(self, path: str = "0 scope", *, warn_after: float | None = None) -> Iterator[Span]:
        """Be in a scope at *path*, as far as the agreement knows of it; it is left without a barrier."""
        speak = lambda what, facts, _: self.said.append((what, facts))  # noqa: E731  (short)
        thread = threading.get_ident()
        span = Span(self.control, self.part, name_of(path), thread, None, warn_after, self.silence, speak, path=path)
        self.control.spans[id(span)] = span
        self._spans.append(span)
        self.barrier.join()
        span.enter("in the body of")
        try:
            yield span
        finally:
            self._spans.pop()
            self.control.left, span.is_left = span.name, True
            if span.is_idle:
                self.control.spans.pop(id(span), None)

    def record(self, path: str = "0 scope", stage: str = "exit", **fields: Any) -> Record:
        """Return what it tells there."""
        return Record(path, stage, **{"arrived": True, **fields})

    def arrive(
        self,
        path: str = "0 scope",
        stage: str = "exit",
        *,
        timeout: float = LONG_S,
        failure_timeout: float = LONG_S,
        warn_after: float | None = None,
        **fields: Any,
    ) -> Verdict:
        """Arrive at a round, in the innermost scope if that is there, and return the verdict."""
        record = self.record(path, stage, **fields)
        with contextlib.ExitStack() as stack:
            if self._spans and self._spans[-1].path == path:
                span = self._spans[-1]
            else:
                span = stack.enter_context(self.scope(path, warn_after=warn_after))

            def started(wait: Wait) -> None:
                span.stage, span.wait = stage, wait
                span.enter(f"at the {'entry' if stage == 'entry' else 'barrier'} of")

            verdict = self.barrier.arrive(record, timeout, failure_timeout, started)
        # Each rank is in exactly one list.
        assert sorted((*verdict.arrived, *verdict.missing, *verdict.lost)) == list(range(self.world_size))
        return verdict

    def publish(self, outcome: Outcome, path: str = "0 scope") -> None:
        """Tell the peers that it failed, and wait until they can know."""
        self.barrier.publish(self.record(path, outcome=outcome))
        assert wait_until(lambda: self._has_published(outcome, path))

    def _has_published(self, outcome: Outcome, path: str) -> bool:
        record = record_of(self.store, self.rank)
        return record is not None and (record.scope, record.outcome.message) == (path, outcome.message)

    def end(self) -> None:
        """End its control thread, as the end of its process would."""
        self.control.stop()
        for thread in threading.enumerate():
            if thread is self.control._thread:  # noqa: SLF001  (there is no other way to it)
                thread.join(PATIENCE_S)


def tell_as(rank: int, seen_by: Rank, record: Record) -> None:
    """Write *record* as another rank would, for one that is not there; the rank that is to see it joins first."""
    seen_by.barrier.join()
    assert wait_until(lambda: bool(seen_by.part.life))
    seen_by.store.set(seen_by.part.key(f"rank/{rank}"), record.encode())


def is_control() -> bool:
    """Whether a hook was called on a control thread."""
    return threading.current_thread().name == "collective_scope-control"


def at_once(*calls: Callable[[], Any], timeout: float = 60.0) -> list[Any]:
    """Make each call on a thread of its own; return what they returned."""
    return values(run_threads(len(calls), lambda number, *_: calls[number](), timeout=timeout))
