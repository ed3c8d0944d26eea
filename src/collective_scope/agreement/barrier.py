"""The barrier of one rank: arrive, and wait for the verdict with a real bound, open to Ctrl-C."""

from __future__ import annotations

import functools
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import attrs

from .clock import monotonic, sleep
from .control import THAW_S, Control
from .part import Part
from .records import Outcome, Record, Verdict
from .rounds import all_ok, judge
from .store_thread import SIGNALS_S, StoreThread, next_reply
from .text import one_line, type_name
from .wait import FIRST_LOOK_S, GRACE_S, Decided, Wait


__tracebackhide__ = True
"""Where pytest leaves frames out: they tell nothing of a test."""

LOOKS = 8
"""How often a rank looks for an answer within `GRACE_S`. One that stood still meanwhile has not looked, and waits on."""

STOP_S = 0.4
"""How long a rank that is interrupted waits until its peers have been told."""

LEAVE_S = 0.5
"""How long a rank that leaves its group waits until that is noted in the store."""


@attrs.define(eq=False)
class Barrier:
    """
    The rounds of one group, as one rank goes through them. Belongs to the thread of the rank.

    Args:
        part: The rank's part in them.
        control: What looks, answers and warns for this process.
        global_ranks: What the ranks are called in the default group, if not the same.

    Attributes:
        in_step: Whether every rank arrived at the latest round; if not, a body must not start.
        entered: How many scopes this rank has entered that were in no other one of the group.
        late: How many scopes found this group at their exit only.
        gone: Why there is no store any more.
    """

    part: Part
    control: Control
    global_ranks: tuple[int, ...] = ()
    in_step: bool = attrs.field(default=True, init=False)
    entered: int = attrs.field(default=0, init=False)
    late: int = attrs.field(default=0, init=False)
    gone: RuntimeError | None = attrs.field(default=None, init=False)
    _missed: Record | None = attrs.field(default=None, init=False)
    """The record of this rank at the first round that was not complete, after one that was."""
    _refused: tuple[Verdict, Record] | None = attrs.field(default=None, init=False)
    """The verdict of the latest round, if that was an entry to which not all have come, and `_missed`."""
    _thread: StoreThread | None = attrs.field(default=None, init=False)

    @property
    def rank(self) -> int:
        """The number of this rank, counted from 0 within the group."""
        return self.part.rank

    @property
    def world_size(self) -> int:
        """Number of ranks of the group."""
        return self.part.world_size

    def join(self) -> None:
        """Tell the peers, without waiting for the store, which process this rank is."""
        if self._thread is None and self.gone is None:
            self._get_thread().submit(_nothing)  # which connects, and joins

    def publish(self, record: Record) -> None:
        """Tell the peers at once, without waiting for the store, that this rank failed. It arrives later."""
        if self.gone is None:
            self._get_thread().submit(functools.partial(self.part.publish, attrs.evolve(record, arrived=False)))

    def arrive(
        self, record: Record, timeout: float, failure_timeout: float, started: Callable[[Wait], object]
    ) -> Verdict:
        """
        Tell the peers *record* and wait for the verdict, the same on every rank.

        Collective:
            Every rank of the group arrives at the same rounds.

        Args:
            record: What to tell.
            timeout: Longest wait in seconds, counted from now.
            failure_timeout: Longest wait in seconds from the moment at which this rank learns of a failure.
            started: Called with the wait as it begins, for the control thread to see.
        """
        if self.gone is not None:
            return self._alone(record, 0.0, self.gone)
        broken = self.control.broken
        if broken is not None and not isinstance(broken, RuntimeError):
            raise broken
        self._thaw(monotonic())
        now = monotonic()
        timeout = timeout if record.outcome.ok else min(timeout, failure_timeout)
        earlier = self._refused if record.stage == "entry" else None
        thread = self._get_thread()
        wait = Wait(record, now, now + timeout, failure_timeout, earlier, thread.replies)
        try:
            started(wait)
            thread.submit(functools.partial(self.part.attend, wait, thread.is_running and broken is None))
            return self._note(self._await(wait), record)
        except BaseException as interrupt:
            self._stop_waiting(wait, interrupt)
            raise

    def leave(self, last_word: str) -> None:
        """Leave the group, which has been destroyed here; wait for the store at most `LEAVE_S`."""
        # A thread that was left behind is no reason to stay.
        thread, self._thread = self._get_thread() if self.part.life else self._thread, None
        if thread is not None and self.gone is None and self.control.broken is None:
            self.gone = RuntimeError("the group was destroyed")
            done: SimpleQueue[Any] = SimpleQueue()
            thread.submit(functools.partial(self.part.leave, last_word))
            thread.submit(done.put)
            thread.stop()
            next_reply(done, monotonic() + LEAVE_S)

    def _thaw(self, now: float) -> None:
        """
        If the store, or this process, has just stood still, give ranks that gave up meanwhile the time to say so.

        Otherwise a rank that arrives last would count them, too, and leave quietly where they have raised.
        """
        calm_at = now + THAW_S if now > self.control.heard_at + GRACE_S else self.control.calm_at
        if now < calm_at and self.part.life:
            sleep(calm_at - now)

    def _get_thread(self) -> StoreThread:
        if self._thread is None:
            self._thread = StoreThread(self.part.connect)
            self.part.owner = self._thread.ident
        return self._thread

    def _note(self, verdict: Verdict, record: Record) -> Verdict:
        self.in_step = verdict.complete
        if verdict.complete:
            self._missed = self._refused = None
        else:
            self._missed = self._missed or record
            # One that ended early was not waited for, and at the next entry other ranks may be outside.
            is_waited_for = verdict.stage == "entry" and not verdict.reason and not verdict.outside
            self._refused = (verdict, self._missed) if is_waited_for else None
        return attrs.evolve(verdict, global_ranks=self.global_ranks) if self.global_ranks else verdict

    def _await(self, wait: Wait) -> Verdict:
        reply = self._taken(next_reply(wait.replies, monotonic() + FIRST_LOOK_S), wait)
        if reply is None:
            self.control.wake()
        looks, since = 0, 0.0
        while reply is None:
            # The control thread ends the wait; this bound holds when the store keeps it from doing so.
            now, due = monotonic(), max(wait.deadline, self.control.heard_at if self.part.life else 0.0)
            looks, since = looks + 1 if now > due == since else 0, due
            if looks > LOOKS:
                self._leave_behind(wait, f"rank {self.rank} gave up, because the store did not answer")
                return self._alone(wait.record, now - wait.start, None, silence=now - self.control.heard_at)
            # The control thread may make the deadline earlier meanwhile.
            until = now + GRACE_S / LOOKS if now > due else min(due, now + SIGNALS_S)
            reply = self._taken(next_reply(wait.replies, until), wait)
        wait.reply, wait.over = reply, True
        if isinstance(reply, Verdict):  # otherwise it is `Failed`
            return reply
        self._thread = None
        if not isinstance(reply.error, RuntimeError):  # not one of torch's store errors
            raise reply.error
        self.gone = reply.error
        return self._alone(wait.record, monotonic() - wait.start, reply.error)

    def _taken(self, reply: Any, wait: Wait) -> Any:
        """Return *reply* for what it is to this *wait*: None if it was for an earlier one, which is over."""
        if not isinstance(reply, Decided):
            return reply
        if reply.wait is not wait:
            return None
        self._thread = None  # it may come back with the same verdict
        return reply.verdict

    def _stop_waiting(self, wait: Wait, interrupt: BaseException) -> None:
        """End the round for all: an interrupt has ended the wait of this rank."""
        if wait.over:  # it came when the round was over
            if isinstance(wait.reply, Verdict):
                wait.reply = self._note(wait.reply, wait.record)
            else:
                self.in_step = False
            return
        if wait.record.outcome.ok:
            wait.record = attrs.evolve(wait.record, outcome=Outcome.of(interrupt, "barrier"))
        self._leave_behind(wait, f"rank {self.rank} stopped waiting at the barrier")
        reply = self._taken(next_reply(wait.replies, monotonic() + STOP_S), wait)
        if isinstance(reply, Verdict):
            wait.reply = self._note(reply, wait.record)

    def _leave_behind(self, wait: Wait, reason: str) -> None:
        """Have the control thread write the verdict; leave the store thread alone, which waits for it."""
        wait.reason, wait.deadline = reason, monotonic()
        self._thread, self.in_step = None, False
        self.control.wake()

    def _alone(self, record: Record, waited: float, error: Exception | None, silence: float = 0.0) -> Verdict:
        """Return what this rank alone can say: without a store there is no agreement."""
        processes = {rank: each.process for rank, each in self.part.records.items()}
        known = next((rank for rank, each in processes.items() if each.serves), None)
        server = self.part.server if known is None else known
        # A guess may be wrong: a rank that is seen to live has not taken the store along.
        lives = known is None and server in processes and processes[server].is_here and not processes[server].has_ended
        lost = (server,) if error is not None and server not in (None, self.rank) and not lives else ()
        facts = judge({self.rank: record}, record, self.world_size, lost=lost, timeout=waited)
        host = "outside of the group" if server is None else f"by rank {server}"
        what = (
            f"is gone: {one_line(type_name(error), str(error))}" if error else f"has not answered for {silence:.1f} s"
        )
        return self._note(attrs.evolve(facts, reason=f"the group's store (served {host}) {what}"), record)


def verdict_alone(record: Record) -> Verdict:
    """Return the verdict of a rank that has no peers."""
    return judge({0: record}, record, 1, all_arrived=True) if record.has_something_to_tell else all_ok(record, 1)


def _nothing(_: object) -> None:
    """Do nothing, having connected."""
