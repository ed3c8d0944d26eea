"""
What the ranks of a group do to their store to agree on one verdict a round.

Everything here blocks for as long as the store does, and runs on a `StoreThread`.
The keys of round *t*, under a prefix
that no other life of the group uses:

``rank/{r}``
    The latest `Record` of rank *r*; written over, never removed.
``{t}/count/{head}``
    How many ranks arrived at the place *head* stands for (stage, scope,
    sequence), and in its upper bits how many of them failed, or have
    collective cleanups left.
``{t}/head``
    The place of the first rank to arrive. A rank at another place finds out here.
``{t}/news``
    What waiting ranks wake for: ``ok`` (all arrived, nothing to report, and
    that is final), ``failed`` (a rank failed; the verdict comes later), or
    ``closed`` (the verdict is there). The first writer wins.
``{t}/verdict``
    The verdict, where there is something to report. The first writer wins.
``{t}/seen``
    How many ranks have seen the news, and in the upper bits how many have read
    the verdict, and how many gave up before. `_SPOILED` is added before anything but ``ok`` becomes news, so
    that on the healthy path one call both reads the verdict and confirms it.
``{t}/empty``
    Set when all have read. The rank whose process hosts the store waits for it.

A healthy round costs a rank four calls: ``set``, ``add``, ``wait``, ``add``.
The round's keys are removed after the last confirmation, when there is nothing
else to do: by the rank that hosts the store (nobody else may still reach it),
or, where no rank does, by the last one to confirm.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from uuid import uuid4

import attrs
from torch.distributed import PrefixStore, Store

from ._outcome import NOWHERE, OK, Record, Verdict, judge
from ._process import Place, me
from ._store_thread import ABSENT, Later, Tell, peek, set_first


# Fields of the counters. 65 535 ranks fit.
_FIELD = 0xFFFF
_FAILED = 1 << 16
_PENDING = 1 << 32
_READ = 1 << 16
_SPOILED = 1 << 32
_GAVE_UP = 1 << 48


FOREVER = timedelta(days=1)
"""The bound of a wait is its caller's, who ends the round, and with it the wait."""


@attrs.define(eq=False)
class Wait:
    """
    What the thread that waits in the store shares with the one that waits for it.

    Attributes:
        read: The verdict and when it was read, on a rank that now waits for confirmations of its peers.
        gave_up: Set when nobody waits for the thread any more: it must not confirm anything.
    """

    read: tuple[Verdict, float] | None = None
    gave_up: bool = False


@attrs.define(eq=False)
class Protocol:
    """
    One rank's part in the rounds of its group.

    Args:
        rank: This rank, counted from 0 within the group.
        world_size: Number of ranks of the group.
        server: The rank whose process hosts the store's server, if one of the group's does.
    """

    rank: int
    world_size: int
    server: int | None
    _seat: str = attrs.field(factory=lambda: uuid4().hex, init=False)
    _life: str = attrs.field(default="", init=False)
    _order: tuple[int, int] = attrs.field(default=(-1, 0), init=False)
    """Sequence of the last scope that failed here, and the place of its failure among all ranks'."""

    def join(self, store: Store) -> Store:
        """
        Agree with the peers on keys that no other life of the group uses; return a view of them.

        A store may outlive its groups: under torchrun, a second
        ``init_process_group`` finds the keys of the first. Each rank takes its
        seat in the newest life; a seat that is taken was taken in an earlier
        one, so that one is over and the next one begins. A rank that never took
        a seat in the earlier one relies on its peers to `end` it.
        """
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

    def end(self, store: Store, tell: Tell) -> None:  # noqa: ARG002  (a job's signature)
        """End this life of the group, which has been destroyed here, unless that has been done."""
        store.underlying_store.compare_set("life", self._life, str(int(self._life) + 1))  # type: ignore[attr-defined]

    def attend(self, mine: Record, wait: Wait, store: Store, tell: Tell) -> Verdict | Later:
        """Arrive, wait, read, confirm."""
        t, head = mine.round, _head(mine)
        self._arrive(mine, head, store, tell)
        if wait.gave_up:
            return self._give_up(mine, store)
        seen = store.add(f"{t}/seen", 1)
        spoiled = seen >= _SPOILED
        news = peek(store, f"{t}/news") if spoiled else "ok"
        if news == "ok":
            verdict, readers = _all_ok(mine, self.world_size), seen & _FIELD
        else:
            verdict = self._read(mine, news, store, tell)
            readers = store.add(f"{t}/seen", _READ) // _READ & _FIELD
        if self.server is not None:
            verdict = self._see_off(mine, verdict, readers, wait, store)
        keys = self._garbage(verdict, readers, spoiled=spoiled)
        if keys or verdict.names:  # at a mismatch, nobody else may know of this one
            keys.append(f"count/{head}")
        return Later(verdict, functools.partial(_remove, [f"{t}/{key}" for key in keys])) if keys else verdict

    def _arrive(self, mine: Record, head: str, store: Store, tell: Tell) -> None:
        """Tell *mine*, be counted, and come back when there is news."""
        t = mine.round
        flags = _PENDING if mine.cleanups else 0
        if mine.outcome.ok:
            store.set(f"rank/{self.rank}", mine.encode())
        else:
            flags |= _FAILED
            self.publish(mine, store, tell)
        count = store.add(f"{t}/count/{head}", 1 + flags)
        mismatch = count & _FIELD == 1 and set_first(store, f"{t}/head", head) != head
        if count == self.world_size:
            set_first(store, f"{t}/news", "ok")
        elif mismatch or count & _FIELD == self.world_size:
            self.close(mine, store)
        else:
            store.wait([f"{t}/news"], FOREVER)

    def _see_off(self, mine: Record, verdict: Verdict, readers: int, wait: Wait, store: Store) -> Verdict:
        """Let the process that hosts the store go, but not before its peers have read the verdict."""
        expected = len(set(verdict.arrived) - set(verdict.lost))
        if readers == expected:
            store.set(f"{mine.round}/empty", "")
        elif readers < expected and self.rank == self.server:
            wait.read = (verdict, time.monotonic())
            store.wait([f"{mine.round}/empty"], FOREVER)
            if int(peek(store, f"{mine.round}/seen")) >= _GAVE_UP:
                # The store had been frozen for so long that peers raised without a verdict.
                return Verdict.decode(peek(store, f"{mine.round}/verdict"))
        return verdict

    def _give_up(self, mine: Record, store: Store) -> Verdict:
        """Nobody waits for this verdict any more: this rank has raised, so no other may leave in peace."""
        reason = f"rank {self.rank} gave up, because the store did not answer in time"
        verdict = self.close(mine, store, reason=reason)
        store.add(f"{mine.round}/seen", _GAVE_UP)
        store.set(f"{mine.round}/empty", "")
        return verdict

    def _garbage(self, verdict: Verdict, readers: int, *, spoiled: bool) -> list[str]:
        """Return the keys that this rank is to remove when it has read *verdict*."""
        # Where a rank hosts the store, it is the last that may still reach it.
        by_server = verdict.complete and self.server is not None
        if not (self.rank == self.server if by_server else readers == self.world_size):
            return []
        return ["head", "news", "seen", *["verdict"] * spoiled, *["empty"] * (self.server is not None)]

    def _read(self, mine: Record, news: str, store: Store, tell: Tell) -> Verdict:
        """Return the verdict of a round in which there is more to say than ``ok``."""
        if news == "failed":
            tell("failed")
            store.wait([f"{mine.round}/verdict"], FOREVER)
        return Verdict.decode(peek(store, f"{mine.round}/verdict"))

    def publish(self, mine: Record, store: Store, tell: Tell) -> None:  # noqa: ARG002  (a job's signature)
        """Tell that this rank failed, and wake the waiting ones."""
        if self._order[0] != mine.sequence:
            self._order = (mine.sequence, store.add("failures", 1))
        outcome = attrs.evolve(mine.outcome, order=self._order[1])
        store.set(f"rank/{self.rank}", attrs.evolve(mine, outcome=outcome).encode())
        store.add(f"{mine.round}/seen", _SPOILED)
        set_first(store, f"{mine.round}/news", "failed")

    def close(
        self,
        mine: Record,
        store: Store,
        *,
        waited: float = 0.0,
        reason: str = "",
        lost: tuple[int, ...] = (),
        where: Mapping[int, Place] = NOWHERE,
    ) -> Verdict:
        """Decide the verdict from what is known now, unless it has been decided; return what was."""
        t = mine.round
        records = self.records(store)
        if reason or self.rank not in records or records[self.rank].round != t:
            records[self.rank] = mine
        verdict = judge(records, mine, self.world_size, timeout=waited, reason=reason, lost=lost, where=where)
        store.add(f"{t}/seen", _SPOILED)
        decided = set_first(store, f"{t}/verdict", verdict.encode())
        news = set_first(store, f"{t}/news", "closed")
        return _all_ok(mine, self.world_size) if news == "ok" else Verdict.decode(decided)

    def records(self, store: Store, ranks: Iterable[int] | None = None) -> dict[int, Record]:
        """Return the latest record of each rank, or of *ranks*, that has told anything."""
        texts = {rank: peek(store, f"rank/{rank}") for rank in (range(self.world_size) if ranks is None else ranks)}
        return {rank: Record.decode(text) for rank, text in texts.items() if text != ABSENT}


def _head(record: Record) -> str:
    place = f"{record.stage}\n{record.sequence}\n{record.scope}"
    return hashlib.sha1(place.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()[:16]


def _all_ok(mine: Record, world_size: int) -> Verdict:
    return Verdict(
        scope=mine.scope,
        sequence=mine.sequence,
        world_size=world_size,
        stage=mine.stage,
        outcomes=dict.fromkeys(range(world_size), OK),
        arrived=range(world_size),
    )


def _remove(keys: list[str], store: Store, tell: Tell) -> None:  # noqa: ARG001  (a job's signature)
    for key in keys:
        store.delete_key(key)
