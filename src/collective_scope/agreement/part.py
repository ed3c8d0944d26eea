"""
One rank's part in the rounds of its group: what it does to the store, on the store and control threads.

A round costs a rank two calls. It adds to the count, and gets the verdict, which waits and reads. The
rank that arrives last writes the verdict; for a rank whose deadline is up, or that is interrupted,
the control thread does. The first one that is written stands, and every rank goes by it.

The table of what threads share is in ``wait``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from uuid import uuid4

import attrs
from torch.distributed import Store, TCPStore

from .process import Place, me
from .records import Record, Verdict
from .rounds import (
    ARRIVED,
    REPORT,
    all_ok,
    has_all,
    is_revoked,
    is_uneventful,
    judge,
    relation,
    scopes_around,
    still_refused,
)
from .store_thread import FOREVER, base_of, compare_set, get, peek, set_first
from .wait import Wait
from .wire import decode_verdict, encode_verdict


ROOT = "collective_scope"

NEWS = f"{ROOT}/news"

RECORDS_S = 0.25
"""How long the rank that decides waits for the records of those that arrived a moment ago."""

POLL_S = 0.05
"""How often a rank looks for the verdict for which the system has no thread to give."""

_OK = b"ok"


@attrs.define(eq=False)
class Part:
    """
    One rank's part in the rounds of its group.

    Args:
        clone: Returns a client of the group's store for use on one thread.
        rank: This rank, counted from 0 within the group.
        world_size: Number of ranks of the group.
        heard: Called whenever the store has answered the control thread.
    """

    clone: Callable[[], Store]
    rank: int
    world_size: int
    heard: Callable[[], object]
    life: str = attrs.field(default="", init=False)
    told: bytes = attrs.field(default=b"", init=False)
    records: dict[int, Record] = attrs.field(factory=dict, init=False)
    lost: set[int] = attrs.field(factory=set, init=False)
    revoked: set[str] = attrs.field(factory=set, init=False)
    """Paths of scopes in which the group was revoked."""
    items: deque[tuple[int, float]] = attrs.field(factory=deque, init=False)
    _view: Store | None = attrs.field(default=None, init=False)
    """The group's own part of the store."""
    _telling: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _published: tuple[str, int] = attrs.field(default=("", 0), init=False)
    """The scope whose failure was published last, and its number among all that were."""
    _reported: str = attrs.field(default="", init=False)
    """The round whose count says that this rank has something to tell."""
    _read: list[str] = attrs.field(factory=list, init=False)
    """Keys of the latest complete round."""
    _stale: list[str] = attrs.field(factory=list, init=False)
    """Keys of the one before, which all ranks have read; the rank that arrives first at the next one removes them."""
    _odd: list[str] = attrs.field(factory=list, init=False)
    """Keys of rounds that were not complete; each rank removes them after the next one that is."""

    def key(self, name: str) -> str:
        """Return a key of this group."""
        return f"{ROOT}/{self.life}/{name}"

    # What the store thread calls.

    def connect(self) -> Store:
        """Connect to the store, and join the group unless that has been done; return the root of the store."""
        view = self.clone()
        store = base_of(view)
        if isinstance(store, TCPStore):  # of other stores, a clone is the user's own
            store.set_timeout(FOREVER)
        self._view = view
        if not self.life:
            self._join(view, store)
        return store

    def _join(self, view: Store, store: Store) -> None:
        """Find the life of the group: that of an earlier group on the same store is over for this rank."""
        fresh, seat = uuid4().hex.encode(), f"seat {uuid4().hex}".encode()
        life = set_first(view, "life", fresh)
        # It is over if a rank has left it, or if this rank, in an earlier life, is there already.
        while b" " in life or set_first(store, f"{ROOT}/{life.decode()}/rank/{self.rank}", seat) != seat:
            there = compare_set(view, "life", life, fresh)
            # Of a key that is gone, compare_set says that it is as expected.
            life = set_first(view, "life", fresh) if there == life else there
        self.life = life.decode()
        self._tell(Record(process=me()), store)

    def leave(self, last_word: str, store: Store) -> None:
        """Leave the group; the last rank that does takes its keys along."""
        view = self._view
        assert view is not None  # noqa: S101  (for the type checker: this thread has connected)
        if last_word:
            self._tell(Record(process=me(), last_word=last_word), store)
        self._remove(self._odd, store)
        # Each rank that leaves writes a value of its own, so that compare_set tells whether it was this one's.
        life, left, before = self.life, 0, self.life.encode()
        while life == self.life:
            after = f"{life} {left + 1} {self.rank}".encode()
            there = compare_set(view, "life", before, after)
            if there in (before, after):
                break
            before = there
            life, *rest = there.decode().split(" ")
            left = int(rest[0]) if rest else 0
        if life == self.life and left + 1 == self.world_size:
            self._remove([*self._stale, *self._read, *(self.key(f"rank/{r}") for r in range(self.world_size))], store)
            view.delete_key("life")

    def publish(self, record: Record, store: Store) -> None:
        """Tell all ranks that this one failed."""
        number = store.add(NEWS, 1)
        self._published = (record.scope, number)
        self._tell(self._ordered(record), store)
        if self._reported != record.round:
            self._reported = record.round
            store.add(self.key(f"{record.round}/n"), REPORT)
        store.set(f"{NEWS}/{number}", f"failed {self.life} {self.rank}")
        self.items.append((number, time.monotonic()))

    def attend(self, wait: Wait, has_thread: bool, store: Store) -> None:  # noqa: FBT001  (passed on by position)
        """Arrive, and get the verdict, or write it if this rank is the last to arrive."""
        record = wait.record
        if wait.reason:
            return  # the rank stopped waiting before it was counted
        key = self.key(record.round)
        count = store.add(f"{key}/n", ARRIVED + (self._report(record, store) if record.has_something_to_tell else 0))
        wait.counted = True
        if count % REPORT == ARRIVED:
            self._remove(self._stale, store)  # the first to arrive has time
        self._stale = []
        if has_all(count, self.world_size):
            text = _OK if is_uneventful(count) else self._judgment(wait, store, count)
            text = set_first(store, f"{key}/v", text)
            verdict = all_ok(record, self.world_size) if text == _OK else decode_verdict(text)
        else:
            verdict = all_ok(record, self.world_size)  # made here, where nobody waits for it
            if wait.earlier is not None and not self._is_anybody_back(*wait.earlier, store):
                set_first(store, f"{key}/v", encode_verdict(still_refused(wait.earlier[0], record)))
            text = get(store, f"{key}/v") if has_thread else self._poll(wait, store)
            if text != _OK:
                verdict = decode_verdict(text)
        if self.rank in verdict.missing and not wait.reason:
            self._tell(record, store)  # it is back
        wait.replies.put(verdict)
        keys = [f"{key}/n", f"{key}/v"]
        if not verdict.complete:
            self._odd += keys
            return
        # All have come, so all have read the verdicts of the rounds before.
        self._stale, self._read = self._read, keys
        self._remove(self._odd, store)
        self._odd = []

    def _is_anybody_back(self, earlier: Verdict, missed: Record, store: Store) -> bool:
        """Whether a rank that the *earlier* entry lacked has come at least to the first round that was *missed*."""
        records = [Record.decode(peek(store, self.key(f"rank/{rank}"))) for rank in earlier.missing]
        return any(r is not None and r.arrived and relation(r, missed) in ("here", "elsewhere") for r in records)

    def _poll(self, wait: Wait, store: Store) -> bytes:
        """Wait for the verdict on the rank's own thread, and end the wait, because there is no other thread."""
        key = f"{self.key(wait.record.round)}/v"
        while not store.check([key]):
            if time.monotonic() > wait.deadline:
                self.decide(wait, store, (), {})
            time.sleep(POLL_S)
        return store.get(key)

    def _report(self, record: Record, store: Store) -> int:
        """Write the record of a rank that has something to tell; return what to add to the count for it."""
        if not record.outcome.ok and self._published[0] != record.scope:
            self.publish(record, store)
        else:
            self._tell(self._ordered(record), store)
        report = REPORT if self._reported != record.round else 0
        self._reported = record.round
        return report

    def _ordered(self, record: Record) -> Record:
        """Return *record* with the place of its failure among all that were published."""
        scope, number = self._published
        if scope != record.scope or record.outcome.ok:
            return record
        return attrs.evolve(record, outcome=attrs.evolve(record.outcome, order=number))

    def _tell(self, record: Record, store: Store) -> None:
        """Write the record of this rank."""
        with self._telling:
            latest = Record.decode(self.told)
            if latest is not None and latest.answered > record.answered:  # a question may be open still
                record = attrs.evolve(record, place=latest.place, answered=latest.answered)
            self.told = record.encode()
            store.set(self.key(f"rank/{self.rank}"), self.told)  # type: ignore[arg-type]  # torch's stub has no bytes

    def _remove(self, keys: list[str], store: Store) -> None:
        for key in keys:
            store.delete_key(key)

    # What the control thread calls, and what it shares with the store thread.

    def read(self, store: Store, ranks: Iterable[int]) -> None:
        """Refresh what is known of *ranks*."""
        for rank in ranks:
            record = Record.decode(peek(store, self.key(f"rank/{rank}")))
            self.heard()
            if record is not None:
                self.records[rank] = record

    def hear(self, what: str, rest: str) -> None:
        """Note an item of the news: that a rank is gone, or that the group was revoked in a scope."""
        if what == "lost":
            self.lost.add(int(rest))
        elif what == "revoked":
            self.revoked.add(rest)

    def tell_more(self, store: Store, update: Callable[[Record], Record | None]) -> bool:
        """Replace the record of this rank by what *update* makes of it; return whether that was done."""
        with self._telling:
            latest = Record.decode(self.told)
            record = None if latest is None else update(latest)
            if record is None:
                return False
            # The store thread's record may still be on its way over another connection: it must not be lost.
            text = record.encode()
            there = compare_set(store, self.key(f"rank/{self.rank}"), self.told, text)
            if there == text:
                self.told = text
            return there == text

    def decide(self, wait: Wait, store: Store, lost: Iterable[int], where: Mapping[int, Place]) -> None:
        """Write the verdict of a round from what is known now, unless there is one."""
        key = self.key(wait.record.round)
        over = [f"{self.key(path)}/exit/v" for path in scopes_around(wait.record.scope)]
        over = [each for each in over if store.check([each])]
        if over:  # a scope around this one ended without this rank, which ends this one too
            set_first(store, f"{key}/v", store.get(over[0]))
        elif not store.check([f"{key}/v"]):
            count = store.add(f"{key}/n", 0)
            if has_all(count, self.world_size) and is_uneventful(count):
                text = _OK  # the rank that arrived last may be gone
            else:
                self._await_records(wait.record, count % REPORT, store)
                text = self._judgment(wait, store, count, lost=lost, where=where)
            set_first(store, f"{key}/v", text)

    def _judgment(self, wait: Wait, store: Store, count: int, **facts: Any) -> bytes:
        """Return the verdict as it follows from all that the ranks told, and *facts*, as for `judge`."""
        texts = {rank: peek(store, self.key(f"rank/{rank}")) for rank in range(self.world_size)}
        records = {rank: record for rank, text in texts.items() if (record := Record.decode(text)) is not None}
        if records.get(self.rank, Record()).round != wait.record.round or wait.reason:
            records[self.rank] = attrs.evolve(wait.record, arrived=wait.counted)
        facts |= {"all_arrived": has_all(count, self.world_size), "revoked": is_revoked(count), "reason": wait.reason}
        facts["timeout"] = 0.0 if facts["all_arrived"] else time.monotonic() - wait.start
        return encode_verdict(judge(records, wait.record, self.world_size, **facts))

    def _await_records(self, mine: Record, arrived: int, store: Store) -> None:
        """Give ranks that have arrived a moment ago the time to say so."""
        limit = time.monotonic() + RECORDS_S
        while time.monotonic() < limit:
            self.read(store, range(self.world_size))
            here = [r for r in self.records.values() if r.round == mine.round and r.arrived]
            if len(here) >= arrived:
                break
            time.sleep(RECORDS_S / 20)
