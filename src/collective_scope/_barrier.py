"""
The barrier: arrive, and wait for the verdict, with a real bound and open to Ctrl-C.

Needs nothing of a group but a store; what is said there is in ``_protocol``.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

import attrs

from . import _report
from ._lookout import CLOSED, FIRST_CHECK_S, LINGER_S, WARN_AFTER_S, Lookout, warning_times
from ._outcome import Outcome, Record, Verdict, judge
from ._process import NOBODY, Place, Process, me
from ._protocol import Protocol, Wait
from ._store_thread import Done, Failed, Job, StoreThread, knock, next_reply
from ._watcher import POLL_S, Watcher


if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger("collective_scope")

HEARTBEAT_TIMEOUT_S = 30.0

GRACE_S = 0.8
"""How long after its deadline a wait may take to end; then the store is taken for frozen."""


@attrs.define(eq=False)
class Barrier:
    """
    The rounds of one group, as seen by one rank.

    Args:
        connect: Returns a client of the group's store for use on one thread.
        rank: This rank, counted from 0 within the group.
        world_size: Number of ranks of the group.
        server: The rank whose process hosts the store's server, if one of the group's does.
        watcher: What answers for this process; kept alive by its barriers.
        hosted: The store object, if this process hosts its server: it must outlast the last store call.
        global_ranks: What the ranks are called in the default group, if not the same.
    """

    connect: Callable[[], Store]
    rank: int
    world_size: int
    server: int | None = None
    global_ranks: tuple[int, ...] = ()
    watcher: Watcher | None = None
    hosted: Store | None = None
    in_step: bool = attrs.field(default=True, init=False)
    """Whether every rank arrived at the latest round; if not, a body must not start."""
    scopes: int = attrs.field(default=0, init=False)
    """How many scopes this rank has entered."""
    rounds: int = attrs.field(default=0, init=False)
    """How many rounds this rank has come to."""
    _protocol: Protocol = attrs.field(init=False)
    _has_greeted: bool = attrs.field(default=False, init=False)
    _gone: RuntimeError | None = attrs.field(default=None, init=False)
    """Why there is no store any more."""
    _over: Verdict | None = attrs.field(default=None, init=False)
    """The verdict of a scope that ended while this rank was in one within it, until this rank leaves it."""
    _thread: StoreThread | None = attrs.field(default=None, init=False)
    _helper: StoreThread | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._protocol = Protocol(self.rank, self.world_size, self.server)

    def arrive(
        self,
        mine: Record,
        *,
        timeout: float,
        failure_timeout: float,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT_S,
        warn_after: float = WARN_AFTER_S,
    ) -> Verdict:
        """
        Tell the peers *mine* and wait for the verdict, the same on every rank.

        The verdict is of another scope where a rank that failed did not come to
        the one that its peers are in. If that is one within this one, this rank
        is to arrive again, in the next round; if it is one around this one, it
        is over, and so is this one: then nobody is waited for until it is left.

        Collective:
            Every rank of the group arrives at the same rounds in the same order.

        Args:
            mine: What to tell. Its round and process are filled in.
            timeout: Longest wait in seconds, counted from now.
            failure_timeout: Longest wait in seconds from the moment at which this rank learns of a failure.
            heartbeat_timeout: Seconds without a heartbeat after which a rank on another machine counts as lost.
            warn_after: Seconds until this rank first logs whom it waits for.
        """
        if self._over is not None and (over := self._take_over(mine)) is not None:
            return over
        self._fill_in(mine)
        start, wait = time.monotonic(), Wait()
        lookout: Lookout | None = None
        # Who counts the round gets to the `try`, or returns: no signal's handler runs where nothing is called.
        self.rounds += 1
        if self.world_size == 1:
            return judge({0: mine}, mine, 1)
        self.in_step = False
        if self._gone is not None:
            return self._unreachable(mine, 0.0, self._gone)
        try:
            replies = self._ask(functools.partial(self._protocol.attend, mine, wait))
            reply = next_reply(replies, start + FIRST_CHECK_S)
            if isinstance(reply, Done):
                verdict = cast("Verdict", reply.value)  # as fast as this if all are here
            else:
                deadline = start + (timeout if mine.outcome.ok else min(timeout, failure_timeout))
                lookout = Lookout(
                    self._protocol, mine, wait, start, deadline, failure_timeout, heartbeat_timeout, warn_after
                )
                verdict = self._await(replies, reply, lookout) or self._read_elsewhere(lookout)
        except BaseException as interrupt:
            # A signal. The peers must not be told later that this rank left in peace.
            if lookout is not None:
                lookout.over = True
            self.in_step = self._stop_waiting(mine, wait, interrupt).complete
            raise
        finally:
            if lookout is not None:
                lookout.over = True
        self.in_step = verdict.complete
        if self.global_ranks:
            verdict = attrs.evolve(verdict, global_ranks=self.global_ranks)
        if not self.in_step and verdict.id in mine.enclosing and not verdict.names:
            self._over = verdict
        return verdict

    def publish(self, mine: Record) -> None:
        """
        Tell the peers at once that this rank failed; it arrives later.

        Does not wait for the store: a frozen one must not delay the cleanups.
        *mine* is filled in as by `arrive`, and made one that has not arrived.
        """
        if self.world_size > 1 and self._gone is None and not self._is_over(mine):
            self._fill_in(mine)
            mine.arrived = False
            self._ask(functools.partial(self._protocol.publish, mine))

    def greet(self) -> None:
        """
        Tell the peers, at the first scope, which process this is, and learn which one hosts the store.

        From then on a rank can be said to be somewhere, or gone; so this
        waits for the store and for rank 0, but not for long.
        """
        if self.world_size > 1 and not self._has_greeted:
            self._has_greeted = True
            until = time.monotonic() + GRACE_S
            next_reply(self._ask(lambda _: None), until)
            while self.watcher is not None and not self.watcher.server and time.monotonic() < until:
                time.sleep(POLL_S / 20)

    def survey(self, mine: Record) -> dict[int, Place]:
        """Return where the other ranks are, as far as that can be said within a second or two."""
        lookout = Lookout(self._protocol, mine, Wait(), time.monotonic(), 0.0, 0.0, math.inf, math.inf)
        try:
            places: dict[int, Place] = self._new_thread().call(lookout.survey, 2 * GRACE_S)
        except (TimeoutError, RuntimeError) as error:
            logger.warning("rank %d cannot ask its peers where they are: %s", self.rank, error)
            return {}
        return places

    # What follows runs on the thread that called arrive().

    def _is_over(self, mine: Record) -> bool:
        return self._over is not None and self._over.id in (mine.id, *mine.enclosing)

    def _take_over(self, mine: Record) -> Verdict | None:
        """Return what is known already of a scope that is over; forget it with the outermost."""
        over = self._over if self._is_over(mine) else None
        if over is None or over.id == mine.id:
            self._over = None
        return over

    def _fill_in(self, mine: Record) -> None:
        mine.round, mine.process = self.rounds, me()

    def _new_thread(self) -> StoreThread:
        # Not a method: a thread that refers to this object would keep it, and itself, alive.
        connect, protocol = self.connect, self._protocol
        return StoreThread(lambda: protocol.join(connect()))

    def _leave_thread_behind(self) -> None:
        if self._thread is not None:  # pragma: no branch  (None only if an interrupt comes between two lines)
            self._thread.farewell.clear()
        self._thread = None

    def _ask(self, job: Job) -> SimpleQueue[Any]:
        if self._thread is None:
            self._thread = self._new_thread()
        if not self._thread.farewell:
            self._thread.farewell.append(functools.partial(_end_life, self._protocol, self._hosts(), self.hosted))
        return self._thread.submit(job)

    def _await(self, replies: SimpleQueue[Any], reply: Any, lookout: Lookout) -> Verdict | None:
        """Go on waiting, and look out meanwhile; return None if the round was closed and who waits cannot know."""
        if reply is None:
            self._helper = self._helper or self._new_thread()
            self._helper.submit(functools.partial(lookout.run, replies))
        warnings = warning_times(lookout.start, lookout.warn_after)
        warn_at = next(warnings)
        while not isinstance(reply, Done | Failed):
            if reply == CLOSED:
                return None
            if reply is None and time.monotonic() >= warn_at:
                self._warn_if_blind(lookout, warn_at)
                warn_at = next(warnings)
            # The lookout ends the wait; this bound holds when the store keeps it from doing so.
            limit = _limit(lookout) + GRACE_S
            if time.monotonic() > limit:
                self._helper = None
                return self._without_store(lookout, TimeoutError())
            reply = next_reply(replies, min(limit, warn_at))
        if isinstance(reply, Done):
            return cast("Verdict", reply.value)
        if not isinstance(reply.error, RuntimeError):  # not one of torch's store errors
            raise reply.error
        return self._without_store(lookout, reply.error)

    def _read_elsewhere(self, lookout: Lookout) -> Verdict:
        """Leave the thread behind that waits for ``ok`` in vain, and read the verdict on the one that knows better."""
        lookout.over = lookout.wait.claim()
        self._leave_thread_behind()
        self._thread, self._helper = self._helper, None
        now, wait = time.monotonic(), Wait()
        wait.claim()  # the peers know already
        # What ended the round, if not the deadline, is known from now on; the store may be slow as long as there is time.
        deadline = max(now, min(lookout.deadline, now + lookout.failure_timeout))
        second = attrs.evolve(lookout, wait=wait, start=now, deadline=deadline)
        second.decided = lookout.decided
        replies = self._ask(functools.partial(self._protocol.read, lookout.mine, wait))
        try:
            verdict = self._await(replies, next_reply(replies, now + FIRST_CHECK_S), second)
        finally:
            second.over = True
        assert verdict is not None  # noqa: S101  (only attend() leaves it open)
        return verdict

    def _warn_if_blind(self, lookout: Lookout, at: float) -> None:
        # As long as the store answers, the lookout warns, and names names.
        if at > lookout.looked_at + GRACE_S:
            waited = time.monotonic() - lookout.start
            why = "the store does not answer"
            logger.warning("%s", _report.waiting_blindly(lookout.mine.scope, self.rank, waited, why))

    def _without_store(self, lookout: Lookout, error: Exception) -> Verdict:
        """Choose what to go by when the thread in the store does not come back with a verdict."""
        self._leave_thread_behind()
        if lookout.wait.read is not None:
            return lookout.wait.read[0]  # only confirmations of peers were missing
        if lookout.decided is not None:
            return lookout.decided
        if isinstance(error, RuntimeError):
            self._gone = error
        lookout.wait.gave_up = lookout.wait.claim()
        now = time.monotonic()
        return self._unreachable(lookout.mine, now - lookout.start, error, silence=now - lookout.looked_at)

    def _stop_waiting(self, mine: Record, wait: Wait, interrupt: BaseException) -> Verdict:
        """End the round for all: an interrupt has ended the wait of this rank."""
        if mine.outcome.ok:
            mine = attrs.evolve(mine, outcome=Outcome.of(interrupt, "barrier"))
        reason = _report.stopped_waiting(self.rank, interrupt)
        resign = functools.partial(self._protocol.resign, mine, wait, reason, counts=wait.claim())
        self._leave_thread_behind()
        self._helper = self._helper or self._new_thread()
        try:
            verdict: Verdict = self._helper.call(resign, GRACE_S / 2)
        except (TimeoutError, RuntimeError) as error:
            self._helper = None
            logger.warning("rank %d could not tell its peers that it stopped waiting: %s", self.rank, error)
            return self._unreachable(mine, 0.0, error)
        return verdict

    def _hosts(self) -> list[Process]:
        """Return what is known of the process that hosts the store; see `Watcher.server`."""
        return self.watcher.server if self.watcher is not None else [NOBODY] if self.server is None else []

    def _is_hosted_elsewhere(self) -> bool:
        return _is_hosted_elsewhere(self._protocol, self._hosts())

    def _unreachable(self, mine: Record, waited: float, error: Exception, *, silence: float = 0.0) -> Verdict:
        """No store, so no agreement: what this rank alone can say."""
        gone = not isinstance(error, TimeoutError)
        server = None if self._is_hosted_elsewhere() else self._protocol.server
        lost = (server,) if gone and server is not None and server != self.rank else ()
        return Verdict(
            scope=mine.scope,
            sequence=mine.sequence,
            world_size=self.world_size,
            stage=mine.stage,
            outcomes={self.rank: mine.outcome},
            arrived=(self.rank,),
            missing=tuple(rank for rank in range(self.world_size) if rank != self.rank and rank not in lost),
            lost=lost,
            timeout=waited,
            reason=_report.store_trouble(server, silence, error if gone else None),
        )


def _limit(lookout: Lookout) -> float:
    if lookout.wait.read is not None:
        return lookout.wait.read[1] + LINGER_S
    if lookout.decided is not None and lookout.decided.ok:
        # All had arrived at the deadline, but some may have given up: the thread in the store finds out.
        return lookout.decided_at + LINGER_S
    return lookout.deadline


def _is_hosted_elsewhere(protocol: Protocol, hosts: list[Process]) -> bool:
    return protocol.server is None or (not protocol.is_settled and NOBODY in hosts)


def _end_life(protocol: Protocol, hosts: list[Process], hosted: Store | None, store: Store) -> None:
    """End the life of a destroyed group in a store that outlives it; where a rank hosts the store, it does not."""
    del hosted  # kept until now
    if not _is_hosted_elsewhere(protocol, hosts):
        if protocol.is_settled or hosts:
            return
        # Rank 0 never told whether it hosts the store; if it did, it may have taken it along.
        try:
            knock(store)
        except OSError:
            return
    protocol.end(store)
