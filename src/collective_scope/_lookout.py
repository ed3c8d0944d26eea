"""
What is done while a rank waits: look for peers that are gone, warn, and end the wait at its deadline.

Runs on a `StoreThread` of its own, beside the one that waits in the store.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import attrs

from . import _report
from ._outcome import Record, Verdict, judge, split
from ._process import Place, Process
from ._protocol import Protocol, Wait, all_ok
from ._store_thread import ABSENT, Failed, peek
from ._watcher import ask, view


if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger("collective_scope")

FIRST_CHECK_S = 0.05
"""How long a rank waits before anything is looked for."""

CHECK_S = 0.1
"""How often that is done then, once it has waited for four times as long; until then more often."""

FAILED, CLOSED = "failed", "closed"
"""What the waiting thread is told: a rank failed, so the deadline has moved; the verdict is there, and not ``ok``."""

ASK_S = 1.0
"""How long before the deadline missing ranks are asked where they are."""

ANSWER_S = 0.5
"""How long an answer takes at most; who was asked earlier than that and has not answered will not."""

PAUSE_S = 0.02

LINGER_S = 5.0
"""How long the rank that hosts the store waits for peers to confirm that they have read the verdict."""

GONE_LINGER_S = 0.5
"""The same, when a peer has ended: it may have confirmed, and another may be about to."""

WARN_AFTER_S = 10.0
"""When a waiting rank first logs who is missing; see `warning_times`."""


@attrs.define(eq=False)
class Lookout:
    """
    One wait of one rank.

    Args:
        protocol: This rank's part in the rounds.
        mine: What this rank told in the round that it waits for.
        wait: What the thread that waits in the store, and the one that waits for it, share.
        start: When it arrived, on the monotonic clock.
        deadline: When the wait ends, on the same clock; may be moved while it runs.
        failure_timeout: Longest wait in seconds from the moment at which a failure is known.
        heartbeat_timeout: Seconds without a heartbeat after which a rank on another machine counts as lost.
        warn_after: Seconds until the first warning.
    """

    protocol: Protocol
    mine: Record
    wait: Wait
    start: float
    deadline: float
    failure_timeout: float
    heartbeat_timeout: float
    warn_after: float
    decided: Verdict | None = attrs.field(default=None, init=False)
    """The verdict, if it was this lookout that ended the wait."""
    decided_at: float = attrs.field(default=0.0, init=False)
    over: bool = attrs.field(default=False, init=False)
    """Set by the waiting thread when it waits no more."""
    looked_at: float = attrs.field(default=attrs.Factory(lambda self: self.start, takes_self=True), init=False)
    """When the store was last heard of."""
    _has_failed: bool = attrs.field(
        default=attrs.Factory(lambda self: not self.mine.outcome.ok, takes_self=True), init=False
    )
    _records: dict[int, Record] = attrs.field(factory=dict, init=False)
    _beats: dict[int, tuple[str, float]] = attrs.field(factory=dict, init=False)
    _asked: dict[int, int] = attrs.field(factory=dict, init=False)
    _asked_at: float = attrs.field(default=0.0, init=False)

    def run(self, replies: SimpleQueue[Any], store: Store) -> None:
        """Look out until the wait is over; tell the waiting thread, in *replies*, what it cannot see."""
        try:
            self._run(replies, store)
        except BaseException as error:
            # The thread that waits in the store meets torch's store errors itself.
            if not isinstance(error, RuntimeError):
                replies.put(Failed(error))
            raise

    def _run(self, replies: SimpleQueue[Any], store: Store) -> None:
        if self.mine.outcome.ok and not self.over:
            # Who arrived in peace has told nobody so far.
            self.protocol.tell(self.mine, store)
        warnings = warning_times(self.start, self.warn_after)
        warn_at = next(warnings)
        while not self.over:
            self.looked_at = now = time.monotonic()
            news = peek(store, f"{self.mine.round}/news")
            if news == FAILED and not self._has_failed:
                self._shorten(replies, now)
            if self._has_read(store, now):
                self._let_go(store, now)
            elif news == CLOSED or self.decided is not None or self._look(store, now):
                if self.wait.for_ok and (news == CLOSED or (self.decided is not None and not self.decided.ok)):
                    replies.put(CLOSED)
                    return
            elif now >= warn_at:
                warn_at = next(warnings)
                where = self._locate(store, self._missing())
                verdict = judge(self._records, self.mine, self.protocol.world_size, where=where)
                if not self.over:  # asking has taken its time: who was missing may have come, and gone
                    logger.warning("%s", _report.waiting(verdict, self.protocol.rank, now - self.start))
            # Ranks that are at different scopes learn of it in the first looks of theirs.
            pause = min(CHECK_S, max(PAUSE_S, (now - self.start) / 4))
            self._pause(pause if now >= self.deadline else min(pause, self.deadline - now))
        if self.wait.must_resign():
            self.protocol.resign(self.mine, self.wait, self.protocol.gave_up, store, gave_up=True)

    def _shorten(self, replies: SimpleQueue[Any], now: float) -> None:
        """Wait for `failure_timeout` only from the moment at which a failure is known."""
        self._has_failed = True
        if now + self.failure_timeout < self.deadline:
            self.deadline = now + self.failure_timeout
            replies.put(FAILED)

    def _let_go(self, store: Store, now: float) -> None:
        """End the wait for confirmations that will not come."""
        if self._has_lingered(now) or peek(store, f"{self.mine.round}/gave_up") != ABSENT:
            self.wait.disturbed = True
            for key in self.wait.confirmed:
                store.set(key, "")

    def _has_read(self, store: Store, now: float) -> bool:
        """Whether this rank knows the verdict, and waits for its peers to know it."""
        if (
            self.wait.read is None
            and self.wait.for_ok
            and self.protocol.is_host
            and self.protocol.is_ok(self.mine, store)
        ):
            self.wait.read = (all_ok(self.mine, self.protocol.world_size), now)
        return self.wait.read is not None

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.over and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, PAUSE_S))  # an Event would cost every exit more than this wakes up

    def survey(self, store: Store) -> dict[int, Place]:
        """Return where all other ranks are, whether or not they have arrived."""
        others = [rank for rank in range(self.protocol.world_size) if rank != self.protocol.rank]
        self._records = self.protocol.records(store, others)
        return self._locate(store, others)

    def _look(self, store: Store, now: float) -> bool:
        """Refresh what is known of missing ranks; end the wait if there is a reason. Return whether there was."""
        self._records |= self.protocol.records(store, self._missing())
        missing = self._missing()
        # A rank that has arrived does not leave before there is a verdict: if its process is gone, it is lost too.
        others = [rank for rank in range(self.protocol.world_size) if rank != self.protocol.rank]
        lost = [rank for rank in others if self._is_lost(store, rank, now, beats=rank in missing)]
        told = [record for record in self._records.values() if record.round == self.mine.round]
        is_split = any(split(told, self.mine))
        if not lost and not is_split and now < self.deadline:
            if now >= self.deadline - ASK_S and not self._asked:
                self._ask(store, missing)
            return False
        where = {} if is_split else self._locate(store, {*missing, *lost})
        lost = [rank for rank in others if rank in lost or (rank in where and where[rank].has_ended)]
        for rank, place in where.items():
            if place.stacks:
                logger.info("%s", _report.stacks(rank, place))
        self.decided_at = now
        self.decided = self.protocol.close(self.mine, store, waited=now - self.start, lost=tuple(lost), where=where)
        return True

    def _has_lingered(self, now: float) -> bool:
        """Whether peers that have not confirmed had their time; those that are gone never will."""
        assert self.wait.read is not None  # noqa: S101  (for the type checker)
        verdict, since = self.wait.read
        gone = any(process.has_ended for rank in verdict.arrived if (process := self._process(rank)) is not None)
        return now >= since + (GONE_LINGER_S if gone else LINGER_S)

    def _missing(self) -> list[int]:
        t = self.mine.round
        seen = {rank for rank, record in self._records.items() if record.round == t and record.arrived}
        return [rank for rank in range(self.protocol.world_size) if rank not in seen]

    def _process(self, rank: int) -> Process | None:
        return self._records[rank].process if rank in self._records else None

    def _is_lost(self, store: Store, rank: int, now: float, *, beats: bool) -> bool:
        process = self._process(rank)
        if process is None:
            return False
        if process.is_here or not beats:
            return process.has_ended
        beat = peek(view(store), f"{process.key}/beat")
        if beat != self._beats.get(rank, ("", 0.0))[0]:
            self._beats[rank] = (beat, now)
        return now - self._beats[rank][1] > self.heartbeat_timeout

    def _ask(self, store: Store, ranks: Iterable[int]) -> None:
        """Ask the watchers of *ranks* where they are."""
        self._asked_at = time.monotonic()
        for rank in ranks:
            process = self._process(rank)
            if process is not None and not (process.is_here and process.has_ended):
                self._asked[rank] = ask(view(store), process)

    def _locate(self, store: Store, ranks: Iterable[int]) -> dict[int, Place]:
        """Return where *ranks* are, by their own account or, failing that, by the system's."""
        if not self._asked:
            self._ask(store, ranks)
        places: dict[int, Place] = {}
        while True:
            for rank in self._asked.keys() - places.keys():
                answer = peek(view(store), f"{self._records[rank].process.key}/answer")
                number, fields = (0, {}) if answer == ABSENT else json.loads(answer)
                if number >= self._asked[rank]:
                    places[rank] = Place.of(fields)
            if len(places) == len(self._asked) or time.monotonic() > self._asked_at + ANSWER_S:
                break
            self._pause(PAUSE_S)
        self._asked.clear()
        for rank in ranks:
            process = self._process(rank)
            if process is None:
                continue
            since = self._beats.get(rank, ("", self._asked_at))[1]
            now = time.monotonic()
            place = places.get(rank) or Place(process, silence=now - min(self._asked_at, since))
            # It was there when it was asked, which was a moment ago.
            seconds = place.seconds + now - self._asked_at if place.phase else 0.0
            places[rank] = attrs.evolve(place, state=process.state(), seconds=seconds)
        return places


def warning_times(start: float, after: float) -> Iterator[float]:
    """Return when a rank that waits since *start* logs who is missing: after 10, 30, 60, 120, 240, 360, ... seconds."""
    yield from (start + after, start + 3 * after, start + 6 * after)
    yield from itertools.count(start + 12 * after, 12 * after)
