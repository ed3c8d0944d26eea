"""
One wait of one rank, and what its threads share.

These fields are shared between threads:

=================  =========================================  =============================
field              written by                                 read by
=================  =========================================  =============================
Wait.record        the rank's thread; once more, if it is     the store and control threads
                   interrupted
Wait.deadline      the rank's thread; the control thread      both
                   makes it earlier when a failure is known
Wait.reason        the rank's thread, when it ends the wait;  the store and control threads
                   the control thread, when it does
Wait.counted       the store thread, when the store has       the control thread
                   counted the rank
Wait.reply         the rank's thread                          the same
Wait.over          the rank's thread; the control thread,     the control thread
                   for a wait that it has ended
Part.life          the store thread, when it joins            all
Part.told          the store and control threads, under a     the same
                   lock
Part.records       the store and control threads, each        the same
                   value as a whole
Part.lost, .beats, the control thread                         the same
.asked
Part.revoked       the control thread; the rank's thread,     the control thread
                   when it leaves the scope
Part.owner         the rank's thread                          the store thread
Part._odd          the store thread; the control thread, for  the store thread
                   a wait that is over
Part.spent,        the store and control threads              the same
.items
Part, all others   the store thread                           the store thread
=================  =========================================  =============================
"""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import attrs

from .records import Record, Verdict


GRACE_S = 0.8
"""How long after the deadline the store may keep silent; then it is taken for frozen."""

FIRST_LOOK_S = 0.05
"""How long a rank waits before anything is looked for, and its peers are told that it waits."""


@attrs.define(eq=False)
class Wait:
    """
    One wait of one rank at one round.

    Attributes:
        record: What the rank tells there.
        start: When the wait began, on the monotonic clock.
        deadline: When it ends, on the same clock.
        failure_timeout: Longest wait in seconds from the moment at which a failure is known.
        earlier: The verdict of the entry before, if not all came to that, and the record with which they were missed.
        replies: Where the verdict appears.
        reason: Why the rank ends it before its time; empty if it does not.
        counted: Whether the store has counted the rank as arrived.
        reply: What appeared there.
        over: Whether nobody waits any more.
    """

    record: Record
    start: float
    deadline: float
    failure_timeout: float
    earlier: tuple[Verdict, Record] | None
    replies: SimpleQueue[Any]
    reason: str = ""
    counted: bool = False
    reply: Any = None
    over: bool = False


@attrs.frozen
class Decided:
    """
    A reply of the control thread, where the store thread does not come back with the verdict.

    Attributes:
        wait: The wait that it is for.
        verdict: What was decided.
    """

    wait: Wait
    verdict: Verdict
