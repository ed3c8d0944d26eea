"""
The barrier: arrive, and wait for the verdict, with a real bound and open to Ctrl-C.

Needs nothing of a group but a store; what is said there is in ``_protocol``.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import attrs

from . import _report
from ._outcome import Outcome, Record, Verdict, judge
from ._protocol import Protocol
from ._store_thread import Done, Failed, Job, StoreThread


if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger("collective_scope")

ANSWER_S = 1.0
"""How long a store that should answer at once may take when the deadline has passed."""

LINGER_S = 5.0
"""How long the rank that hosts the store waits for peers to read the verdict."""

WARNINGS_S = (10.0, 30.0, 60.0, 120.0)
"""When a waiting rank logs who is missing; then again every `WARNINGS_S[-1]` seconds."""

_HOST = socket.gethostname()


@attrs.define(eq=False)
class Barrier:
    """
    The rounds of one group, as seen by one rank.

    Args:
        connect: Returns a client of the group's store for use on one thread.
        rank: This rank, counted from 0 within the group.
        world_size: Number of ranks of the group.
        server: The rank whose process hosts the store's server, if one of the group's does.
        global_ranks: What the ranks are called in the default group, if not the same.
    """

    connect: Callable[[], Store]
    rank: int
    world_size: int
    server: int | None = None
    global_ranks: tuple[int, ...] = ()
    in_step: bool = attrs.field(default=True, init=False)
    """Whether every rank arrived at the latest round; if not, a body must not start."""
    scopes: int = attrs.field(default=0, init=False)
    """How many scopes this rank has entered."""
    _round: int = attrs.field(default=0, init=False)
    _protocol: Protocol = attrs.field(init=False)
    _thread: StoreThread | None = attrs.field(default=None, init=False)
    _helper: StoreThread | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._protocol = Protocol(self.rank, self.world_size, self.server)

    def arrive(self, mine: Record, *, timeout: float, failure_timeout: float) -> Verdict:
        """
        Tell the peers *mine* and wait for the verdict, the same on every rank.

        Collective:
            Every rank of the group arrives at the same rounds in the same order.

        Args:
            mine: What to tell. Its round, host and pid are filled in.
            timeout: Longest wait in seconds, counted from now.
            failure_timeout: Longest wait in seconds from the moment at which this rank learns of a failure.
        """
        mine = self._mine(mine)
        self._round += 1
        if self.world_size == 1:
            return judge({0: mine}, mine, 1)
        self.in_step = False
        try:
            verdict = self._await(mine, timeout, failure_timeout)
        except BaseException as interrupt:
            # A signal. The peers must not be told later that this rank left in peace.
            self.in_step = self._stop_waiting(mine, interrupt).complete
            raise
        self.in_step = verdict.complete
        return attrs.evolve(verdict, global_ranks=self.global_ranks) if self.global_ranks else verdict

    def publish(self, mine: Record) -> None:
        """
        Tell the peers at once that this rank failed; it arrives later.

        Does not wait for the store: a frozen one must not delay the cleanups.
        """
        if self.world_size > 1:
            self._ask(functools.partial(self._protocol.publish, attrs.evolve(self._mine(mine), arrived=False)))

    # What follows runs on the thread that called arrive().

    def _mine(self, record: Record) -> Record:
        return attrs.evolve(record, round=self._round, host=_HOST, pid=os.getpid())

    def _new_thread(self) -> StoreThread:
        # Not a method: a thread that refers to this object would keep it, and itself, alive.
        connect, protocol = self.connect, self._protocol
        return StoreThread(lambda: protocol.join(connect()))

    def _ask(self, job: Job) -> SimpleQueue[Any]:
        if self._thread is None:
            self._thread = self._new_thread()
        return self._thread.submit(job)

    def _ask_helper(self, job: Job, timeout: float = ANSWER_S) -> Any:
        """Make a call while the first thread waits in the store."""
        if self._helper is None:
            self._helper = self._new_thread()
        try:
            return self._helper.call(job, timeout)
        except (TimeoutError, RuntimeError):
            self._helper = None
            raise

    def _await(self, mine: Record, timeout: float, failure_timeout: float) -> Verdict:
        read: list[Verdict] = []
        replies = self._ask(functools.partial(self._protocol.attend, mine, timeout, read))
        start = time.monotonic()
        deadline = start + (timeout if mine.outcome.ok else min(timeout, failure_timeout))
        warnings = _times(start)
        warn_at = next(warnings)
        while True:
            try:
                reply = replies.get(timeout=max(0.0, min(deadline, warn_at) - time.monotonic()))
            except Empty:
                now = time.monotonic()
                if read or now >= deadline:
                    return self._give_up(replies, read, mine, now - start)
                warn_at = next(warnings)
                self._warn(mine, now - start)
                continue
            if isinstance(reply, Done | Failed):
                return self._conclude(reply, read, mine, time.monotonic() - start)
            # A peer has failed.
            deadline = min(deadline, time.monotonic() + failure_timeout)

    def _give_up(self, replies: SimpleQueue[Any], read: list[Verdict], mine: Record, waited: float) -> Verdict:
        """Decide the verdict now, and return what was decided."""
        try:
            if not read:
                self._ask_helper(functools.partial(self._protocol.close, mine, waited, ""))
            # The thread that waits in the store wakes for that. If there was a verdict already,
            # this rank hosts the store, and peers that arrived have not confirmed it yet.
            patience = LINGER_S if read else ANSWER_S
            while True:
                reply = replies.get(timeout=patience)
                if isinstance(reply, Done | Failed):
                    return self._conclude(reply, read, mine, waited)
        except (Empty, TimeoutError, RuntimeError) as error:
            self._thread = None
            return read[0] if read else self._unreachable(mine, waited, error)

    def _conclude(self, reply: Done | Failed, read: list[Verdict], mine: Record, waited: float) -> Verdict:
        if isinstance(reply, Done):
            return cast("Verdict", reply.value)
        self._thread = None
        if not isinstance(reply.error, RuntimeError):  # not one of torch's store errors
            raise reply.error
        return read[0] if read else self._unreachable(mine, waited, reply.error)

    def _stop_waiting(self, mine: Record, interrupt: BaseException) -> Verdict:
        """End the round for all: an interrupt has ended the wait of this rank."""
        if mine.outcome.ok:
            mine = attrs.evolve(mine, outcome=Outcome.of(interrupt, "barrier"))
        reason = _report.stopped_waiting(self.rank, interrupt)
        self._thread = None
        try:
            verdict: Verdict = self._ask_helper(
                functools.partial(self._protocol.close, mine, 0.0, reason), ANSWER_S / 2
            )
        except (TimeoutError, RuntimeError) as error:
            logger.warning("rank %d could not tell its peers that it stopped waiting: %s", self.rank, error)
            return self._unreachable(mine, 0.0, error)
        return verdict

    def _unreachable(self, mine: Record, waited: float, error: Exception) -> Verdict:
        """No store, so no agreement: what this rank alone can say."""
        gone = not isinstance(error, Empty | TimeoutError)
        lost = (self.server,) if gone and self.server not in (None, self.rank) else ()
        return Verdict(
            scope=mine.scope,
            sequence=mine.sequence,
            world_size=self.world_size,
            stage=mine.stage,
            outcomes={self.rank: mine.outcome},
            missing=tuple(rank for rank in range(self.world_size) if rank != self.rank and rank not in lost),
            lost=lost,
            timeout=waited,
            reason=_report.store_trouble(self.server, waited, error if gone else None),
        )

    def _warn(self, mine: Record, waited: float) -> None:
        try:
            records = self._ask_helper(self._protocol.records)
        except (TimeoutError, RuntimeError) as error:
            logger.warning("%s", _report.waiting_blindly(mine, self.rank, waited, error))
        else:
            logger.warning("%s", _report.waiting(judge(records, mine, self.world_size), self.rank, waited))


def _times(start: float) -> Iterator[float]:
    yield from (start + after for after in WARNINGS_S)
    while True:
        start += WARNINGS_S[-1]
        yield start + WARNINGS_S[-1]
