"""
What the ranks of a group do to their store to agree on one verdict a round.

Everything here blocks for as long as the store does, and runs on a `StoreThread`.
The keys of round *t*, under a prefix that no other life of the group uses:

``rank/{r}``
    The latest `Record` of rank *r*; written over, never removed.
``{t}/count/{head}``
    The arbiter: how many ranks arrived at the place *head* stands for (stage,
    scope, sequence), and in upper bits how many of them have seen that all is
    well, and what keeps the round from being so: a rank failed, has collective
    cleanups left, or gave up waiting. If all ranks are counted before any of
    this is, the round is ok, and that is final.
``{t}/news``
    What waiting ranks wake for: ``ok``, ``failed`` (a rank failed; the verdict
    comes later), or ``closed`` (the verdict is there). The first writer wins.
``{t}/verdict``
    The verdict, where there is something to report. The first writer wins.
``{t}/read``, ``{t}/empty``
    How many ranks have read that verdict; set when all have.
``{t}/seen/{k}``
    Set when *k* waiting ranks have seen that the round is ok, for the last values of *k*.
``{t}/gave_up``
    Set by a rank that raised without a verdict, because the store was frozen.

The rank that arrives last knows the verdict from the count, and a waiting rank
from the call with which it confirms, so a healthy round costs a rank two calls
that wait for an answer, or four: ``set``, ``add``, and ``set`` or ``wait``, ``add``.
The process that hosts the store must not leave before its peers have their
answers; so the rank that lives there waits for ``empty`` or ``seen``, and
removes the round's keys. Where no rank does, the last one to confirm removes them.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from uuid import uuid4

import attrs
from torch.distributed import PrefixStore, Store

from ._outcome import NOWHERE, OK, Record, Verdict, judge
from ._process import Place, me
from ._store_thread import ABSENT, Later, Tell, peek, set_first


# Fields of the count, of 16 bits each: how many arrived, how many have seen that all is well,
# 1 + the rank that hosts the store, and the rest. A rank adds at most four to that: 8 000 ranks fit.
_FIELD = 0xFFFF
_SEEN = 1 << 16
_HOST = 1 << 32
_SPOILED = 1 << 48

FOREVER = timedelta(days=1)
"""The bound of a wait is its caller's, who ends the round, and with it the wait."""


@attrs.define(eq=False)
class Wait:
    """
    What the thread that waits in the store shares with the one that waits for it.

    Attributes:
        read: The verdict and when it was read, on a rank that now waits for confirmations of its peers.
        confirmed: The keys that are set when there are enough of them.
        gave_up: Set when nobody waits for the thread any more: it must not confirm anything.
        disturbed: Set when the wait for confirmations was ended by something else.
    """

    read: tuple[Verdict, float] | None = None
    confirmed: Sequence[str] = ()
    gave_up: bool = False
    disturbed: bool = False


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
        t, count_key = mine.round, _count_key(mine)
        if mine.outcome.ok:
            store.set(f"rank/{self.rank}", mine.encode())
        else:
            self.publish(mine, store, tell)
        spoiled = _SPOILED if mine.cleanups else 0
        count = store.add(count_key, 1 + spoiled + (1 + self.rank if self._is_host else 0) * _HOST)
        arrived = count & _FIELD
        is_last = arrived == self.world_size and count < _SPOILED and not wait.gave_up
        if is_last:
            store.set(f"{t}/news", "ok")
        all_ok = _all_ok(mine, self.world_size)  # made here, where nobody waits for it
        if not is_last:
            if wait.gave_up:
                return self._give_up(mine, store)
            if arrived == self.world_size:
                self.close(mine, store)
            else:
                store.wait([f"{t}/news"], FOREVER)
            if wait.gave_up:
                return self._give_up(mine, store)
            count = store.add(count_key, 0 if self._is_host else _SEEN)
        is_full = count & _FIELD == self.world_size
        if is_full:
            host = count // _HOST & _FIELD
            self.server, self.is_settled = host - 1 if host else None, True
        if is_full and (count < _SPOILED or self._is_ok_nevertheless(t, store)):
            return self._confirm(mine, all_ok, wait, store, count, is_last=is_last)
        return self._read(mine, wait, store, tell)

    @property
    def _is_host(self) -> bool:
        return self.rank == self.server

    def _is_ok_nevertheless(self, t: int, store: Store) -> bool:
        """Whether what spoils the count came after the last rank had arrived, so too late."""
        return peek(store, f"{t}/news") == "ok" and peek(store, f"{t}/gave_up") == ABSENT

    def _confirm(
        self, mine: Record, verdict: Verdict, wait: Wait, store: Store, count: int, *, is_last: bool
    ) -> Verdict | Later:
        """End a round that is ok."""
        t, n, seen = mine.round, self.world_size, count // _SEEN & _FIELD
        keys = [_count_key(mine), f"{t}/news"]
        if self._is_host:
            # All others confirm, except for the one that arrived last: it knows from the count.
            awaited = [f"{t}/seen/{number}" for number in range(max(1, n - 2), n if is_last else n - 1)]
            if awaited and not self._wait_for_readers(mine, verdict, awaited, wait, store):
                return Verdict.decode(peek(store, f"{t}/verdict"))
            keys += awaited
        elif self.server is not None:
            if not is_last and seen >= max(1, n - 2):
                store.set(f"{t}/seen/{seen}", "")
            return verdict
        elif seen < n - 1:
            return verdict
        return Later(verdict, functools.partial(_remove, keys))

    def _wait_for_readers(self, mine: Record, verdict: Verdict, keys: list[str], wait: Wait, store: Store) -> bool:
        """Keep the process that hosts the store until its peers have read *verdict*; return whether it stands."""
        wait.confirmed, wait.read = keys, (verdict, time.monotonic())
        store.wait(keys, FOREVER)
        # The store may have been frozen for so long that peers raised without a verdict.
        return not wait.disturbed or peek(store, f"{mine.round}/gave_up") == ABSENT

    def _give_up(self, mine: Record, store: Store) -> Verdict:
        """Nobody waits for this verdict any more: this rank has raised, so no other may leave in peace."""
        reason = f"rank {self.rank} gave up, because the store did not answer in time"
        verdict = self.close(mine, store, reason=reason, is_final=True)
        self._count_reader(mine.round, verdict, store)
        return verdict

    def _count_reader(self, t: int, verdict: Verdict, store: Store) -> tuple[int, int]:
        """Confirm that this rank has read *verdict*; return how many have, and how many are to."""
        readers, expected = store.add(f"{t}/read", 1), len(set(verdict.arrived) - set(verdict.lost))
        if self.server is not None and readers == expected:
            store.set(f"{t}/empty", "")
        return readers, expected

    def _read(self, mine: Record, wait: Wait, store: Store, tell: Tell) -> Verdict | Later:
        """Read, and confirm, the verdict of a round in which there is more to say than ``ok``."""
        t = mine.round
        if peek(store, f"{t}/news") == "failed":
            tell("failed")
            store.wait([f"{t}/verdict"], FOREVER)
        verdict = Verdict.decode(peek(store, f"{t}/verdict"))
        readers, expected = self._count_reader(t, verdict, store)
        if (
            self._is_host
            and readers < expected
            and not self._wait_for_readers(mine, verdict, [f"{t}/empty"], wait, store)
        ):
            verdict = Verdict.decode(peek(store, f"{t}/verdict"))
        # Where a rank hosts the store, it is the last that may still reach it.
        by_host = verdict.complete and self.server is not None
        keys = [_count_key(mine)] if verdict.names else []  # at a mismatch, nobody else may know of this one
        if self._is_host if by_host else readers == self.world_size:
            keys = [_count_key(mine), *[f"{t}/{key}" for key in ("news", "verdict", "read", "empty")]]
        return Later(verdict, functools.partial(_remove, keys)) if keys else verdict

    def publish(self, mine: Record, store: Store, tell: Tell) -> None:  # noqa: ARG002  (a job's signature)
        """Tell that this rank failed, and wake the waiting ones."""
        if self._order[0] != mine.sequence:
            self._order = (mine.sequence, store.add("failures", 1))
        outcome = attrs.evolve(mine.outcome, order=self._order[1])
        store.set(f"rank/{self.rank}", attrs.evolve(mine, outcome=outcome).encode())
        store.add(_count_key(mine), _SPOILED)
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
        is_final: bool = False,
    ) -> Verdict:
        """
        Decide the verdict from what is known now, unless it has been decided; return what was.

        That all have arrived and are well is a decision too, which only *is_final* overrules.
        """
        t = mine.round
        records = self.records(store)
        if reason or self.rank not in records or records[self.rank].round != t:
            records[self.rank] = mine
        verdict = judge(records, mine, self.world_size, timeout=waited, reason=reason, lost=lost, where=where)
        if not is_final:
            count = store.add(_count_key(mine), _SPOILED)
            if count & _FIELD == self.world_size and count < 2 * _SPOILED:
                store.set(f"{t}/news", "ok")  # the rank that arrived last may not have come to it
                return _all_ok(mine, self.world_size)
        decided = set_first(store, f"{t}/verdict", verdict.encode())
        if is_final:
            store.set(f"{t}/gave_up", "")
            store.add(_count_key(mine), _SPOILED)
        set_first(store, f"{t}/news", "closed")
        return Verdict.decode(decided)

    def records(self, store: Store, ranks: Iterable[int] | None = None) -> dict[int, Record]:
        """Return the latest record of each rank, or of *ranks*, that has told anything."""
        texts = {rank: peek(store, f"rank/{rank}") for rank in (range(self.world_size) if ranks is None else ranks)}
        return {rank: Record.decode(text) for rank, text in texts.items() if text != ABSENT}


def _count_key(record: Record) -> str:
    head = hashlib.sha1(repr(record.place).encode(), usedforsecurity=False).hexdigest()[:16]
    return f"{record.round}/count/{head}"


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
