"""One rank's knowledge of its peers, and its word to them: a record each, and the news."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

import attrs
from torch.distributed import Store

from .clock import monotonic
from .life import ROOT
from .process import Process, me
from .records import Record
from .rounds import ends_early, relation
from .store_thread import compare_set, peek
from .wait import Wait


NEWS = f"{ROOT}/news"

CONTROL = 2**42
"""A control thread adds this to the count of the news when it begins, and takes it away when it ends."""


@attrs.define(eq=False)
class Peers:
    """
    What one rank knows of its peers, and tells them.

    Args:
        clone: Returns a client of the group's store for use on one thread.
        rank: This rank, counted from 0 within the group.
        world_size: Number of ranks of the group.
        heard: Called whenever the store has answered.
        items: Numbers of the news that this process wrote, and when.
        process: The process of this rank.
        server: The rank that serves the store, if one of the group's does, as far as this one can guess.

    Attributes:
        life: What all keys of the group begin with; empty until this rank has joined.
        owner: The thread that makes this rank's store calls. One from before was left behind, and tells nothing more.
        told: What this rank has told last, as it stands in the store.
        records: What each rank has told last, as far as it has been read.
        lost: Ranks that are gone.
        beats: For ranks elsewhere: the latest heartbeat, how long it has been that, and when it was looked at.
        revoked: Paths of scopes in which the group was revoked.
        asked: The latest question where ranks are: its number, when it was heard, and the round whose ranks need
            not answer.
    """

    clone: Callable[[], Store]
    rank: int
    world_size: int
    heard: Callable[[], object]
    items: deque[tuple[int, float]]
    process: Process = attrs.field(factory=me)
    server: int | None = None
    life: str = attrs.field(default="", init=False)
    owner: int = attrs.field(default=0, init=False)
    told: bytes = attrs.field(default=b"", init=False)
    records: dict[int, Record] = attrs.field(factory=dict, init=False)
    lost: set[int] = attrs.field(factory=set, init=False)
    beats: dict[int, tuple[bytes, float, float]] = attrs.field(factory=dict, init=False)
    revoked: set[str] = attrs.field(factory=set, init=False)
    asked: tuple[int, float, str] = attrs.field(default=(0, 0.0, ""), init=False)
    _telling: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def key(self, name: str) -> str:
        """Return a key of this group."""
        return f"{ROOT}/{self.life}/{name}"

    def is_left_behind(self) -> bool:
        """Whether this rank no longer waits for the thread that asks."""
        return self.owner not in (0, threading.get_ident())

    def read(self, store: Store, ranks: Iterable[int]) -> dict[int, Record]:
        """Refresh what is known of *ranks*; return it, as the other thread may put in what it has read before."""
        fresh = {}
        for rank in ranks:
            record = Record.decode(peek(store, self.key(f"rank/{rank}")))
            self.heard()
            if record is not None:
                self.records[rank] = fresh[rank] = record
        return fresh

    def hear(self, what: str, rest: str) -> None:
        """Note an item of the news: that a rank is gone, or that the group was revoked in a scope."""
        if what == "lost" and int(rest) != self.rank:
            self.lost.add(int(rest))
        elif what == "revoked":
            self.revoked.add(rest)

    def hasten(self, wait: Wait, now: float) -> bool:
        """Bound the *wait* by its failure timeout if a peer has failed there; return whether it ends at once."""
        peers = [record for rank, record in list(self.records.items()) if rank != self.rank]
        if any(not record.outcome.ok and relation(record, wait.record) == "here" for record in peers):
            wait.deadline = min(wait.deadline, max(now, wait.start) + wait.failure_timeout)
        return any(ends_early(record, wait.record) for record in peers)

    def announce(self, store: Store, item: str) -> int:
        """Write an item of the news; return its number."""
        number = store.add(NEWS, 1) % CONTROL
        store.set(f"{NEWS}/{number}", item)
        self.items.append((number, monotonic()))
        return number

    def tell(self, record: Record, store: Store) -> None:
        """Write the record of this rank, on the store thread."""
        with self._telling:
            if self.is_left_behind():
                return
            record = attrs.evolve(record, process=self.process)
            latest = Record.decode(self.told)
            if latest is not None and latest.answered > record.answered:  # a question may be open still
                record = attrs.evolve(record, place=latest.place, answered=latest.answered)
            self.told = record.encode()
            store.set(self.key(f"rank/{self.rank}"), self.told)  # type: ignore[arg-type]  # torch's stub has no bytes

    def tell_more(self, store: Store, update: Callable[[Record], Record | None]) -> bool:
        """Replace the record of this rank by what *update* makes of it, on the control thread; return whether it was."""
        with self._telling:
            latest = Record.decode(self.told)
            record = None if latest is None else update(latest)
            if record is None:
                return False
            record = attrs.evolve(record, process=self.process)
            # The store thread's record may still be on its way over another connection: it must not be lost.
            text = record.encode()
            there = compare_set(store, self.key(f"rank/{self.rank}"), self.told, text)
            if there == text:
                self.told = text
            return there == text
