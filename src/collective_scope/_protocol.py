"""
What the ranks of a group do to their store to agree on one verdict a round.

Everything here blocks for as long as the store does, and runs on a `StoreThread`.
The keys of round *t*, under a prefix that no other life of the group uses:

``rank/{r}``
    The latest `Record` of rank *r*; written over, never removed. A rank that has
    nothing to report writes it only when it has to wait for long.
``{t}/count/{head}``
    The arbiter: how many ranks arrived at the place *head* stands for (stage,
    scope, sequence), how many of them have been told the verdict, and in upper
    bits what keeps the round from being ok: a rank failed, has collective
    cleanups left, or ended its wait. If all ranks are counted before any of
    this is, the round is ok, and that is final.
``{t}/count/{head}/ok``
    What a rank waits for that knows of nothing to report; who sees it leaves in
    peace. If the round ends otherwise, it is set when all who wait for it have
    been told so on another thread, to end the wait of theirs.
``{t}/seen/{r}``
    Set when rank *r* knows that the round is ok. The process that hosts the
    store must not leave before its peers have their answers; so the rank that
    lives there waits for these.
``{t}/news``
    For ranks that wait for ``ok``: ``failed`` (a rank failed; the verdict comes
    later), then ``closed`` (the verdict is there).
``{t}/verdict``
    The verdict, where there is something to report. The first writer wins.
``{t}/read``, ``{t}/empty``
    How many ranks have read that verdict; set when all have.
``{t}/resigned``, ``{t}/gave_up``
    Set by a rank that ends its wait before it says so in a verdict, and by one
    that raised without a verdict, because the store was frozen.

The rank that arrives last knows from the count that all is well, so a healthy
round costs a rank two calls: ``add``, and ``wait`` or ``set``. Its keys are
removed by the rank that hosts the store; where no rank does, by the one that
arrives last in the next round.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from uuid import uuid4

import attrs
from torch.distributed import PrefixStore, Store, TCPStore

from ._outcome import NOWHERE, OK, Record, Verdict, judge
from ._process import NOBODY, Place, me
from ._store_thread import ABSENT, Later, base_of, peek, set_first


# Fields of the count, of 16 bits each: how many arrived, how many have been told the verdict,
# 1 + the rank that hosts the store, and the rest. A rank adds at most five to that: 6 000 ranks fit.
_FIELD = 0xFFFF
_TOLD = 1 << 16
_HOST = 1 << 32
_SPOILED = 1 << 48

RECORDS_S = 0.25
"""How long the rank that decides waits for the records of those that have arrived a moment ago."""

FOREVER = timedelta(days=1)
"""The bound of a wait is its caller's, who ends the round, and with it the wait."""

SLICE = timedelta(seconds=0.5)
"""How long a thread that was left behind may go on to wait in a store that does not wake it."""


@attrs.define(eq=False)
class Wait:
    """
    What the thread that waits in the store shares with the one that waits for it.

    Attributes:
        for_ok: Whether it waits for ``ok``, and has to be told if the round ends otherwise.
        read: The verdict and when it was read, on a rank that now waits for confirmations of its peers.
        confirmed: The keys that are set when all have confirmed.
        disturbed: Set when the wait for confirmations was ended by something else.
        gave_up: Set when the rank has raised without a verdict, which is to be told as soon as that can be.
        arriving: Held while the rank is being counted as arrived, which it never is once the wait has been claimed.
        has_arrived: Whether it has been.
    """

    for_ok: bool = False
    read: tuple[Verdict, float] | None = None
    confirmed: list[str] = attrs.field(factory=list)
    disturbed: bool = False
    gave_up: bool = False
    arriving: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    has_arrived: bool = False
    _turn: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _asking: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def claim(self) -> bool:
        """Become the one that acts on the end of the wait: the first of the two threads does."""
        return self._turn.acquire(blocking=False)

    @property
    def is_claimed(self) -> bool:
        """Whether one of them has."""
        return self._turn.locked()

    def must_resign(self) -> bool:
        """Whether the peers are to be told, by the thread that asks first, that the rank gave up."""
        if not self.gave_up:  # without the lock, as nearly always
            return False
        with self._asking:
            gave_up, self.gave_up = self.gave_up, False
        return gave_up


@attrs.define(eq=False)
class Protocol:
    """
    One rank's part in the rounds of its group.

    Args:
        rank: This rank, counted from 0 within the group.
        world_size: Number of ranks of the group.
        server:
            The rank whose process hosts the store's server, if one of the group's
            does. Only that rank knows for certain, until all have met.
    """

    rank: int
    world_size: int
    server: int | None
    is_settled: bool = attrs.field(default=False, init=False)
    """Whether *server* is certain."""
    _stale: list[str] = attrs.field(factory=list, init=False)
    """Keys of the last round that was ok, for the rank that arrives last in the next one to remove."""
    _seat: str = attrs.field(factory=lambda: uuid4().hex, init=False)
    _life: str = attrs.field(default="", init=False)
    _is_woken: bool = attrs.field(default=False, init=False)
    """Whether the store's server tells who waits for a key of it; other stores look for it again and again."""
    _told: str = attrs.field(default="", init=False)
    """The record of this rank that is in the store, as far as is known."""
    _order: tuple[tuple[int, str], int, int] = attrs.field(default=((-1, ""), -2, 0), init=False)
    """Id of the last scope that failed here, its last round so far, and its place in the order of failures."""

    def join(self, store: Store) -> Store:
        """
        Agree with the peers on keys that no other life of the group uses; return a view of them.

        A store may outlive its groups: under torchrun, a second
        ``init_process_group`` finds the keys of the first. Each rank takes its
        seat in the newest life; a seat that is taken was taken in an earlier
        one, so that one is over and the next one begins. A rank that never took
        a seat in the earlier one relies on its peers to `end` it.
        """
        self._is_woken = isinstance(base_of(store), TCPStore)
        store = PrefixStore(f"collective_scope/{self.world_size}", store)
        if self._life:  # another thread of this rank has joined
            return PrefixStore(self._life, store)
        life = set_first(store, "life", "0")
        while set_first(store, f"{life}/seat/{self.rank}", self._seat) != self._seat:
            life = store.compare_set("life", life, str(int(life) + 1)).decode()
        self._life = life
        store = PrefixStore(life, store)
        # From now on peers know which process this rank is, wherever it gets stuck.
        set_first(store, f"rank/{self.rank}", Record(-1, "", "", -1, arrived=False, process=me()).encode())
        return store

    def end(self, store: Store) -> None:
        """End this life of the group, which has been destroyed here, unless that has been done."""
        store.underlying_store.compare_set("life", self._life, str(int(self._life) + 1))  # type: ignore[attr-defined]

    @property
    def is_host(self) -> bool:
        """Whether the store lives in this rank's process."""
        return self.rank == self.server

    def attend(self, mine: Record, wait: Wait, store: Store) -> Verdict | Later | None:
        """Arrive, wait, read, confirm; return None if somebody else has claimed the wait."""
        verdict = self._attend(mine, wait, store)
        return self.resign(mine, wait, self.gave_up, store, gave_up=True) if wait.must_resign() else verdict

    @property
    def gave_up(self) -> str:
        """Why a round ends that this rank has not waited for to the end."""
        return f"rank {self.rank} gave up, because the store did not answer in time"

    def _attend(self, mine: Record, wait: Wait, store: Store) -> Verdict | Later | None:
        count_key = _count_key(mine)
        with wait.arriving:
            if wait.is_claimed:
                return None  # it stopped waiting before it came to this
            if not mine.outcome.ok:
                self.publish(mine, store)
            elif mine.cleanups:
                self.tell(mine, store)
            pending = _SPOILED if mine.cleanups else 0
            count = store.add(count_key, 1 + pending + (1 + self.rank if self.is_host else 0) * _HOST)
            wait.has_arrived = True
        is_last = count & _FIELD == self.world_size
        if count < _SPOILED:
            return self._attend_ok(mine, wait, store, count_key, count, is_last=is_last)
        if is_last and not wait.gave_up:
            self.close(mine, store, is_spoiled=True)
        is_mine = wait.claim() if is_last else self._wait([f"{mine.round}/verdict"], wait, store)
        return self.read(mine, wait, store) if is_mine else None

    def _attend_ok(
        self, mine: Record, wait: Wait, store: Store, count_key: str, count: int, *, is_last: bool
    ) -> Verdict | Later | None:
        """Go on where nothing is known that keeps the round from being ok."""
        t, ok_key = mine.round, f"{count_key}/ok"
        if is_last:
            if not wait.claim():
                return None
            store.set(ok_key, "")
        verdict = all_ok(mine, self.world_size)  # made here, where nobody waits for it
        if self.is_host:
            wait.confirmed = self._seen_by_peers(t)
            wait.read = (verdict, time.monotonic()) if is_last else None
        wait.for_ok = not is_last
        if is_last and self.is_host:
            store.wait(wait.confirmed, FOREVER)
        elif not is_last and not self._wait(wait.confirmed or [ok_key], wait, store):
            return None
        if not self.is_settled:
            self._settle(count if is_last else store.add(count_key, 0))
        if wait.disturbed and peek(store, f"{t}/gave_up") != ABSENT:
            # The store had been frozen for so long that peers raised without a verdict.
            return Verdict.decode(peek(store, f"{t}/verdict"))
        if self.is_host:
            return _later(verdict, [count_key, ok_key, *wait.confirmed])
        if self.server is not None:
            store.set(f"{t}/seen/{self.rank}", "")
            return verdict
        stale, self._stale = self._stale, [count_key, ok_key]
        return _later(verdict, stale if is_last else [])

    def _wait(self, keys: list[str], wait: Wait, store: Store) -> bool:
        """
        Wait for *keys* and claim the wait; return whether nobody else had.

        The keys may be gone a moment after they came; a thread that misses them must not wait for ever.
        """
        while not wait.is_claimed:
            start = time.monotonic()
            try:
                store.wait(keys, FOREVER if self._is_woken else SLICE)
                break
            except RuntimeError:
                # "Wait timeout" is a DistStoreError of a HashStore and a plain RuntimeError of a FileStore;
                # what is wrong with the store is raised by the next call, and before its time is over.
                if self._is_woken or time.monotonic() < start + SLICE.total_seconds():
                    raise
        return wait.claim()

    def _settle(self, count: int) -> None:
        """Learn for certain, from the count of a round at which all arrived, which rank hosts the store."""
        host = count // _HOST & _FIELD
        self.server, self.is_settled = host - 1 if host else None, True

    def _seen_by_peers(self, t: int) -> list[str]:
        return [f"{t}/seen/{rank}" for rank in range(self.world_size) if rank != self.rank]

    def is_ok(self, mine: Record, store: Store) -> bool:
        """Whether the round is known to be ok."""
        # Not by peek(): on a TCPStore that wakes who waits for the key.
        return store.check([f"{_count_key(mine)}/ok"])

    def read(self, mine: Record, wait: Wait, store: Store) -> Verdict | Later:
        """Read and confirm the verdict of a round in which there is something to report."""
        t, count_key = mine.round, _count_key(mine)
        verdict = Verdict.decode(peek(store, f"{t}/verdict"))
        keys, readers, expected = self._count_reader(mine, verdict, store)
        if self.is_host and readers < expected:
            wait.confirmed, wait.read = [f"{t}/empty"], (verdict, time.monotonic())
            store.wait([f"{t}/empty"], FOREVER)
        # Where a rank hosts the store, it is the last that may still reach it.
        by_host = verdict.complete and self.server is not None
        if self.is_host if by_host else readers == self.world_size:
            keys += [count_key, f"{count_key}/ok", *self._stale]
            keys += [f"{t}/{key}" for key in ("news", "verdict", "read", "empty", "resigned", "gave_up")]
            self._stale = []
        return _later(verdict, keys)

    def _count_reader(self, mine: Record, verdict: Verdict, store: Store) -> tuple[list[str], int, int]:
        """Confirm that this rank knows *verdict*; return keys to remove, how many have confirmed, and how many are to."""
        t, count_key, keys = mine.round, _count_key(mine), []
        count = store.add(count_key, _TOLD + _SPOILED)
        if count & _FIELD == self.world_size:
            self._settle(count)
        dead = set(verdict.arrived) & set(verdict.lost)
        if count // _TOLD & _FIELD == (count & _FIELD) - len(dead):
            # Nobody who still waits for this key takes it for what it says.
            store.set(f"{count_key}/ok", "")
            keys = [f"{count_key}/ok", *[count_key] * bool(verdict.names or verdict.outside)]
        if self.is_host:
            # The thread that waits for these is let go by its own rank: it alone waits for them.
            for key in self._seen_by_peers(t):
                store.set(key, "")
                keys.append(key)
        readers, expected = store.add(f"{t}/read", 1), len(set(verdict.arrived) - set(verdict.lost))
        if self.server is not None and readers == expected:
            store.set(f"{t}/empty", "")
        return keys, readers, expected

    def resign(
        self,
        mine: Record,
        wait: Wait,
        reason: str,
        store: Store,
        *,
        counts: bool = True,
        gave_up: bool = False,
    ) -> Verdict | Later:
        """
        End the round for all, because this rank does not wait any more.

        Args:
            mine: What this rank tells.
            wait: The wait that it ends. If it had not been counted as arrived, it must not be counted as told either:
                peers would take the one who waits for them for the last one who is to be told, and let it go in peace.
            reason: Why.
            store: The store.
            counts: Whether to confirm the verdict, because nobody else does on this rank.
            gave_up: Whether this rank has raised already, so that no other may leave in peace.
        """
        with wait.arriving:
            if not wait.has_arrived:
                mine, counts = attrs.evolve(mine, arrived=False), False
        store.set(f"{mine.round}/resigned", "")
        verdict, keys = self.close(mine, store, reason=reason, gave_up=gave_up), []
        if counts and verdict.complete:
            store.set(f"{mine.round}/seen/{self.rank}", "")
        elif counts:
            keys = self._count_reader(mine, verdict, store)[0]
        return _later(verdict, keys)

    def publish(self, mine: Record, store: Store) -> None:
        """Tell that this rank failed, and wake the waiting ones."""
        failed, last, order = self._order
        # The rounds of a scope follow one another. A later scope may have the sequence of one within an earlier one.
        if failed != mine.id or mine.round > last + 1:
            order = store.add("failures", 1)
        self._order = (mine.id, mine.round, order)
        outcome = attrs.evolve(mine.outcome, order=order)
        self.tell(attrs.evolve(mine, outcome=outcome), store)
        store.add(_count_key(mine), _SPOILED)
        set_first(store, f"{mine.round}/news", "failed")

    def tell(self, record: Record, store: Store) -> None:
        """
        Write the record of this rank, unless one of a later round is there.

        A lookout may come to this, or a thread that was left behind, when the rank is in a later round already.
        """
        text = record.encode()
        while (there := store.compare_set(f"rank/{self.rank}", self._told, text).decode()) != text:
            if Record.decode(there).round > record.round:
                return
            self._told = "" if there == self._told else there  # one that is absent is said to be what was expected
        self._told = text

    def close(
        self,
        mine: Record,
        store: Store,
        *,
        waited: float = 0.0,
        reason: str = "",
        lost: tuple[int, ...] = (),
        where: Mapping[int, Place] = NOWHERE,
        gave_up: bool = False,
        is_spoiled: bool = False,
    ) -> Verdict:
        """
        Decide the verdict from what is known now, unless it has been decided; return what was.

        That all have arrived and are well is a decision too, which only *gave_up* overrules.
        The rank that arrived last knows whether it *is_spoiled*.
        """
        t, count_key = mine.round, _count_key(mine)
        count = store.add(count_key, _SPOILED)
        arrived = count & _FIELD
        if arrived == self.world_size and count < 2 * _SPOILED and not gave_up:
            store.set(f"{count_key}/ok", "")  # the rank that arrived last may not have come to it
            return all_ok(mine, self.world_size)
        if arrived == self.world_size and not is_spoiled and not gave_up and self._becomes_ok(t, count_key, store):
            return all_ok(mine, self.world_size)
        records = self._records_of(mine, arrived, store)
        if reason:
            records[self.rank] = mine
        verdict = judge(records, mine, self.world_size, timeout=waited, reason=reason, lost=lost, where=where)
        if verdict.ok and peek(store, f"{t}/resigned") != ABSENT:
            # All have arrived, and one of them does not wait any more. That is for it to say.
            store.wait([f"{t}/verdict"], FOREVER)
        decided = set_first(store, f"{t}/verdict", verdict.encode())
        if gave_up:
            store.set(f"{t}/gave_up", "")
        store.set(f"{t}/news", "closed")
        return Verdict.decode(decided)

    def _becomes_ok(self, t: int, count_key: str, store: Store) -> bool:
        """Whether all had arrived before somebody else spoiled the count: the one who did knows, and says so at once."""
        limit = time.monotonic() + RECORDS_S
        while time.monotonic() < limit and not store.check([f"{t}/verdict"]):
            if store.check([f"{count_key}/ok"]):
                return not store.check([f"{t}/verdict"])
            time.sleep(RECORDS_S / 20)
        return False

    def _records_of(self, mine: Record, arrived: int, store: Store) -> dict[int, Record]:
        """Return all records, those of the *arrived* ranks included, which may have nothing to report."""
        limit = time.monotonic() + RECORDS_S
        records: dict[int, Record] = {}
        while True:
            here = {rank for rank, r in records.items() if r.round == mine.round and r.arrived}
            records |= self.records(store, set(range(self.world_size)) - here)
            if self.rank not in records or records[self.rank].round != mine.round:
                records[self.rank] = mine
            here = {
                rank for rank, r in records.items() if r.round == mine.round and r.arrived and r.place == mine.place
            }
            if arrived == self.world_size:
                for rank in set(range(self.world_size)) - here:
                    process = records[rank].process if rank in records else NOBODY
                    records[rank] = attrs.evolve(mine, outcome=OK, cleanups=(), process=process)
                return records
            # Once there is a verdict, some may have read it and told of the next round in the place of this one.
            if len(here) >= arrived or time.monotonic() > limit or store.check([f"{mine.round}/verdict"]):
                return records
            time.sleep(RECORDS_S / 20)

    def records(self, store: Store, ranks: Iterable[int] | None = None) -> dict[int, Record]:
        """Return the latest record of each rank, or of *ranks*, that has told anything."""
        texts = {rank: peek(store, f"rank/{rank}") for rank in (range(self.world_size) if ranks is None else ranks)}
        return {rank: Record.decode(text) for rank, text in texts.items() if text != ABSENT}


def _count_key(record: Record) -> str:
    head = hashlib.sha1(repr(record.place).encode(), usedforsecurity=False).hexdigest()[:16]
    return f"{record.round}/count/{head}"


def all_ok(mine: Record, world_size: int) -> Verdict:
    return Verdict(
        scope=mine.scope,
        sequence=mine.sequence,
        world_size=world_size,
        stage=mine.stage,
        outcomes=dict.fromkeys(range(world_size), OK),
        arrived=range(world_size),
    )


def _later(verdict: Verdict, stale: list[str]) -> Verdict | Later:
    return Later(verdict, stale) if stale else verdict
