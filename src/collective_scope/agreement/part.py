"""
One rank's part in the rounds of its group: what it does to the store, on the store and control threads.

A round costs a rank two calls. It adds to the count, and gets the verdict, which waits and reads. The
rank that arrives last writes the verdict; for a rank whose deadline is up, or that is interrupted,
the control thread does. The first one that is written stands, and every rank goes by it.

The table of what threads share is in ``wait``.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, cast

import attrs
from torch.distributed import Store

from .clock import monotonic, sleep
from .life import join, leave
from .peers import CONTROL, NEWS, Peers
from .process import Place
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
from .store_thread import get, set_first, unbounded
from .wait import Wait
from .wire import ALL_OK, decode_verdict, encode_verdict


POLL_S = 0.05
"""How often a rank looks for which no control thread does."""

LOOKS = 5
"""How often the rank that decides looks for the records of ranks that arrived a moment ago, `POLL_S` apart."""


@attrs.define(eq=False)
class Part(Peers):
    """
    One rank's part in the rounds of its group.

    Attributes:
        spent: Keys that nobody reads any more.
    """

    spent: deque[str] = attrs.field(factory=deque, init=False)
    _view: Store | None = attrs.field(default=None, init=False)
    """The group's own part of the store."""
    _joining: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _published: tuple[str, int] = attrs.field(default=("", 0), init=False)
    """The scope whose failure was published last, and the number of that in the news."""
    _latest: list[str] = attrs.field(factory=list, init=False)
    """Keys of the latest complete round."""
    _odd: list[str] = attrs.field(factory=list, init=False)
    """Keys of rounds that were not complete, or were written after their end; removed after the next one that is."""

    # Called by the store thread.

    def connect(self) -> Store:
        """Connect to the store, and join the group unless that has been done; return the root of the store."""
        view = self.clone()
        store = unbounded(view)
        if not self.is_left_behind():
            self._view = view
        with self._joining:  # a thread that was left behind may be at it
            self.life = self.life or join(view, store, self.rank, self.world_size)
            if not self.told:
                self.tell(Record(), store)
        return store

    def leave(self, last_word: str, store: Store) -> None:
        """Leave the group; the last rank that does takes its keys along."""
        view = cast("Store", self._view)  # this thread has connected
        if last_word:
            self.tell(Record(last_word=last_word), store)
        if leave(view, self.life, self.rank, self.world_size):
            ranks = (self.key(f"rank/{rank}") for rank in range(self.world_size))
            self.spent += [*self._odd, *self._latest, *ranks]
        self.remove_spent(store)

    def publish(self, record: Record, store: Store) -> None:
        """Tell all ranks that this one failed."""
        number = store.add(NEWS, 1) % CONTROL
        self._published = (record.scope, number)
        self.tell(self._ordered(record), store)
        store.set(f"{NEWS}/{number}", f"failed {self.life} {self.rank}")
        self.items.append((number, monotonic()))

    def attend(self, wait: Wait, is_looked_after: bool, store: Store) -> None:  # noqa: FBT001  (passed on by position)
        """Arrive, and get the verdict, or write it if this rank is the last to arrive."""
        record = wait.record
        if wait.reason:
            return  # the rank stopped waiting before it was counted
        key = self.key(record.round)
        count = store.add(f"{key}/n", ARRIVED + (self._report(record, store) if record.has_something_to_tell else 0))
        wait.counted = True
        if self.is_left_behind():
            self._odd += [f"{key}/n"]
            return
        is_last = has_all(count, self.world_size)
        if is_last:
            text = ALL_OK if is_uneventful(count) else self._judgment(wait, store, count)
            verdict = decode_verdict(set_first(store, f"{key}/v", text), record, self.world_size)
        else:
            verdict = all_ok(record, self.world_size)  # made here, where nobody waits for it
            if wait.earlier is not None and not self._is_anybody_back(*wait.earlier, store):
                set_first(store, f"{key}/v", encode_verdict(still_refused(wait.earlier[0], record)))
            text = get(store, f"{key}/v") if is_looked_after else self._poll(wait, store)
            if text != ALL_OK:
                verdict = decode_verdict(text, record, self.world_size)
        if self.is_left_behind():
            self._odd += [f"{key}/n"]
            return
        if self.rank in verdict.missing and not wait.reason:
            self.tell(record, store)  # it is back
        if verdict.complete and self.server is not None and self.server not in self.records:
            self.read(store, [self.server])  # once: what can be said when there is no store any more
        # If all have come, all have read the verdicts of the rounds before.
        if verdict.complete:
            self.spent += [*self._odd, *(self._latest if is_last else ())]
            self._odd, self._latest = [], [f"{key}/n", f"{key}/v"]
        else:
            # A thread that was left behind may come to wait for a verdict that has a reason.
            self._odd += [f"{key}/n"] if verdict.reason else [f"{key}/n", f"{key}/v"]
        wait.replies.put(verdict)  # only now: see the end of decide()

    def remove_spent(self, store: Store) -> None:
        """Remove keys that nobody reads any more: on the control thread, so that no rank waits for it, or to leave."""
        with contextlib.suppress(IndexError):  # both threads may be at it, so the last key is not there to look at
            while True:
                store.delete_key(self.spent.popleft())

    def _is_anybody_back(self, earlier: Verdict, missed: Record, store: Store) -> bool:
        """Whether a rank that the *earlier* entry lacked has come at least to the first round that was *missed*."""
        records = self.read(store, (*earlier.missing, *earlier.lost)).values()
        return any(record.arrived and relation(record, missed) in ("here", "elsewhere") for record in records)

    def _poll(self, wait: Wait, store: Store) -> bytes:
        """Wait for the verdict, and end the wait, because no control thread does."""
        key = f"{self.key(wait.record.round)}/v"
        while not store.check([key]):
            now = monotonic()
            self.read(store, range(self.world_size))
            if self.hasten(wait, now) or now > wait.deadline:
                self.decide(wait, store, (), {})
            sleep(POLL_S)
        return store.get(key)

    def _report(self, record: Record, store: Store) -> int:
        """Write the record of a rank that has something to tell; return what to add to the count for it."""
        if not record.outcome.ok and self._published[0] != record.scope:
            self.publish(record, store)
        else:
            self.tell(self._ordered(record), store)
        return REPORT

    def _ordered(self, record: Record) -> Record:
        """Return *record* with the place of its failure among all that were published."""
        scope, number = self._published
        if scope != record.scope or record.outcome.ok:
            return record
        return attrs.evolve(record, outcome=attrs.evolve(record.outcome, order=number))

    # Called by the control thread, or shared by it and the store thread.

    def verdict(self, wait: Wait, store: Store) -> Verdict:
        """Return the verdict of a round that has been decided."""
        # A TCPStore returns nothing for a key that is removed while it is read: then nobody waits any more.
        text = store.get(f"{self.key(wait.record.round)}/v") or ALL_OK
        return self.read_verdict(text, wait)

    def read_verdict(self, text: bytes, wait: Wait) -> Verdict:
        """Return the verdict that is written in *text*."""
        return decode_verdict(text, wait.record, self.world_size)

    def decide(self, wait: Wait, store: Store, lost: Iterable[int], where: Mapping[int, Place]) -> bytes:
        """
        Write the verdict of a round from what is known now.

        Returns:
            The verdict that stands then; empty if there was one before, or nobody waits for one any more.
        """
        key = self.key(wait.record.round)
        over = [f"{self.key(path)}/exit/v" for path in scopes_around(wait.record.scope)]
        over = [each for each in over if store.check([each])]
        text = b""
        if over:  # a scope around this one ended without this rank, which ends this one too
            set_first(store, f"{key}/v", store.get(over[0]))
        elif not store.check([f"{key}/v"]):
            count = store.add(f"{key}/n", 0)
            if wait.counted and count % REPORT < ARRIVED:
                wait.reason = wait.reason or f"the store has lost the arrival of rank {self.rank}"
            if has_all(count, self.world_size) and is_uneventful(count) and not wait.reason:
                text = ALL_OK  # the rank that arrived last may be gone
            else:
                self._await_records(wait.record, count % REPORT, store)
                text = self._judgment(wait, store, count, lost=lost, where=where)
            # A round that has ended meanwhile has its verdict, or has had it: its keys may be gone.
            text = b"" if wait.over else set_first(store, f"{key}/v", text)
        if wait.over:  # if its keys were removed, some may be there again
            self._odd += [f"{key}/n", f"{key}/v"]
        return text

    def _judgment(self, wait: Wait, store: Store, count: int, **facts: Any) -> bytes:
        """Return the verdict as it follows from all that the ranks told, and *facts*, as for `judge`."""
        records = self.read(store, range(self.world_size))
        if records.get(self.rank, Record()).round != wait.record.round or wait.reason:
            records[self.rank] = attrs.evolve(wait.record, arrived=wait.counted)
        facts |= {"all_arrived": has_all(count, self.world_size), "revoked": is_revoked(count), "reason": wait.reason}
        facts["timeout"] = 0.0 if facts["all_arrived"] else monotonic() - wait.start
        return encode_verdict(judge(records, wait.record, self.world_size, **facts))

    def _await_records(self, mine: Record, arrived: int, store: Store) -> None:
        """Give ranks that have arrived a moment ago the time to say so."""
        for _ in range(LOOKS):  # not until a time, which may have passed while the process stood still
            self.read(store, range(self.world_size))
            here = [r for r in self.records.values() if r.round == mine.round and r.arrived]
            if len(here) >= arrived:
                break
            sleep(POLL_S)
