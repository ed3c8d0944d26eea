"""
The exit of a group that has a barrier and no store, such as an mpi4py communicator.

What is lost: the ranks cannot tell each other anything. The wait is bounded
and can be interrupted, and that is all: healthy ranks do not learn that a peer
failed, a timeout does not know who is missing, and collective cleanups, which
need an agreement, are refused.
"""

from __future__ import annotations

import functools
import logging
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from . import _report
from ._lookout import WARN_AFTER_S, warning_times
from ._outcome import Record, Verdict
from ._store_thread import Failed, StoreThread, next_reply


if TYPE_CHECKING:
    from ._groups import Communicator
    from ._process import Place

logger = logging.getLogger("collective_scope")


class PlainBarrier:
    """
    A bounded wait at a communicator's own barrier.

    The barrier is called on a second thread; an MPI must be initialized with
    ``MPI_THREAD_MULTIPLE``, which is mpi4py's default.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.rank = _ask(communicator, "Get_rank", 0)
        self.world_size = _ask(communicator, "Get_size", 1)
        self.in_step = True
        self.scopes = 0
        self.rounds = 0
        self._communicator = communicator
        self._thread: StoreThread | None = None
        self._entered: SimpleQueue[Any] | None = None

    def arrive(
        self,
        mine: Record,
        *,
        timeout: float,
        failure_timeout: float,
        heartbeat_timeout: float = 0.0,
        warn_after: float = WARN_AFTER_S,
    ) -> Verdict:
        """Wait for all ranks, as `Barrier.arrive` does; the verdict knows of no other rank."""
        del heartbeat_timeout  # nobody's heart can be heard
        start = time.monotonic()
        limit = start + (timeout if mine.outcome.ok else min(timeout, failure_timeout))
        wait = functools.partial(self._left, mine.scope, start, limit, warn_after)
        self.rounds += 1
        self.in_step = False
        # The barrier of an earlier scope may still hold the thread. When it opens, all have left that
        # scope; and each rank must go through as many of them as its peers, so at an entry that is all.
        if self._entered is not None and not wait():
            return self._timed_out(mine, time.monotonic() - start)
        if mine.stage != "entry":
            if self._thread is None:
                self._thread = StoreThread(lambda: None)  # type: ignore[arg-type, return-value]  # no store
            self._entered = self._thread.submit(lambda _: self._communicator.Barrier())
            if not wait():
                return self._timed_out(mine, time.monotonic() - start)
        self.in_step = True
        return Verdict(mine.scope, mine.sequence, self.world_size, mine.stage, {self.rank: mine.outcome}, [self.rank])

    def publish(self, mine: Record) -> None:
        """Nobody can be told."""

    def greet(self) -> None:
        """Nobody can be told."""

    def survey(self, mine: Record) -> dict[int, Place]:  # noqa: ARG002  (as Barrier has it)
        """Nobody can be asked."""
        return {}

    def _left(self, scope: str, start: float, limit: float, warn_after: float) -> bool:
        assert self._entered is not None  # noqa: S101  (for the type checker)
        warnings = warning_times(start, warn_after)
        while True:
            until = min(limit, next(warnings))
            last = next_reply(self._entered, until)
            if last is not None:
                break
            if until == limit:
                return False
            waited = time.monotonic() - start
            logger.warning("%s", _report.waiting_blindly(scope, self.rank, waited, "the group has no store"))
        self._entered = None
        if isinstance(last, Failed):
            raise last.error
        return True

    def _timed_out(self, mine: Record, waited: float) -> Verdict:
        return Verdict(
            mine.scope,
            mine.sequence,
            self.world_size,
            mine.stage,
            {self.rank: mine.outcome},
            missing=tuple(rank for rank in range(self.world_size) if rank != self.rank),
            timeout=waited,
            reason=_report.NO_STORE,
        )


def _ask(communicator: Communicator, method: str, default: int) -> int:
    return int(getattr(communicator, method, lambda: default)())
