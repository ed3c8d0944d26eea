"""The entry of a scope: its place among the others, the group made anew, and the way back if the body does not start."""

from __future__ import annotations

import gc
import os
import threading
from types import CodeType
from uuid import uuid4

import attrs

from . import _notes, _report, _torch
from ._arrival import MAKING
from ._failures import errors_of
from ._kill import KILL_PHASE, Killer
from ._membership import Membership
from ._teardown import Teardown, current
from .agreement.process import Place, me
from .agreement.records import Outcome
from .agreement.revocation import Renewal
from .agreement.rounds import path_of


__tracebackhide__ = True
"""Where pytest leaves frames out: between the line with the scope and the line that failed, these tell nothing."""


@attrs.define(eq=False, repr=False, kw_only=True, on_setattr=attrs.setters.NO_OP)
class Entry(Teardown):
    """The part of a scope that enters it."""

    def _enter(self, caller: CodeType) -> None:
        self._body = self._body or caller
        self._pid, self._thread = os.getpid(), threading.get_ident()
        self._parent = current.get()
        self._find()
        if self._membership is None:
            self._is_late, self._trace = True, _torch.trace_of_a_default_group()
        else:
            self._take_place(self._membership)
            self._appear()
        current.set(self)
        if self._options.kill_after is not None:
            self._killer = Killer(self._options.kill_after, self._is_waiting, self._explain)
        if (barrier := self._barrier) is not None:
            barrier.join()
            if self._options.meet_at_entry or not barrier.in_step or self._is_renewal_due():
                self._meet_at_entry(barrier.rank, "entry")
        renewal = self._renewal if self._is_renewal_due() else None
        if renewal is not None:
            self._renew(renewal)
        if self._span is not None:
            self._span.stage = "exit"
            self._span.enter("in the body of")
        if renewal is not None:
            renewal.connect()
        if self._options.lockstep_gc:
            self._gc_was_enabled = gc.isenabled()
            gc.disable()
        if self._span is not None and self._span.revocation is not None:
            self._span.revocation.enter_body()
        self._state = "in the body"

    def _look_around(self) -> None:
        if self._state == "in the body" and self._membership is None and self._group is None:
            self._find()

    def _take_place(self, membership: Membership) -> None:
        """Find the path of this scope among those on its group."""
        around = membership.open[-1] if membership.open else None
        if around is not None and around._thread != self._thread:  # noqa: SLF001  (a scope too)
            self._membership = None
            msg = (
                f"scope {self.name!r} cannot be entered: another thread of this process is in scope {around.name!r}"
                " of the same group; a rank is one thread at a time"
            )
            raise RuntimeError(msg)
        if around is not None and around._stage == "entry 2":  # noqa: SLF001  (a scope too)
            self._membership = None
            msg = f"scope {self.name!r} cannot be entered on a group that is being made, for scope {around.name!r}"
            raise RuntimeError(msg)
        barrier = membership.barrier
        if around is None and barrier is not None:
            self._path = path_of("", barrier.entered, self.name, barrier.late)
            barrier.entered += 1
        elif around is not None:
            self._path = path_of(around._path, around._inner, self.name)  # noqa: SLF001  (a scope too)
            around._inner += 1  # noqa: SLF001  (a scope too)
        membership.open.append(self)

    def _meet_at_entry(self, rank: int, stage: str) -> None:
        """Wait until all ranks have come to the entry; refuse the body on all ranks if one has not, or has failed."""
        self.verdict = verdict = self._arrive(stage)
        if not verdict.complete or verdict.failures:
            refusal = self._failures.first or errors_of(verdict, rank)[0]
            if not verdict.stage.startswith("entry"):
                refusal.add_note(_notes.not_entered(self.name))
            try:
                raise refusal
            finally:
                del refusal  # this frame is in its traceback: no cycle

    def _is_renewal_due(self) -> bool:
        return self._renewal is not None and self._renewal.is_due

    def _renew(self, renewal: Renewal) -> None:
        """Make the group, on all ranks; refuse the body on all if one of them cannot."""
        barrier = self._barrier
        self._stage = "entry 2"
        if self._span is not None:
            self._span.stage = "entry 2"
        life = uuid4().hex if barrier is None else barrier.part.life
        self._guard(MAKING, lambda: renewal.renew(life))
        renewal.is_due = False
        if barrier is not None:
            self._meet_at_entry(barrier.rank, "entry 2")
        elif self._failures.first is not None:
            raise self._failures.first
        self._stage = "exit"

    def _refuse(self, refusal: BaseException) -> None:
        """Leave a scope whose body does not start: clean up what it was given, and attach what that raises."""
        if self._stage == "entry 2" and self._renewal is not None:
            self._renewal.is_due = True  # on all ranks, also on one that has made its part
        if self._state in ("new", "in the body"):
            self._in_flight = refusal
            self._plan()
            # Otherwise the peers are in their bodies, and wait for it.
            if not self._path or self._arrived_at("entry"):
                self._surfaced = refusal
                self._steps = [self._release, self._end, self._attach, self._run_rest]
            self._state = "in the teardown"
        self._tear_down()
        self._surfaced = None

    def _attach(self) -> None:
        if self._surfaced is not None:  # it is what refuses the body
            self._failures.attach(self.name, self._surfaced)

    # For the threads that end the process.

    def _is_waiting(self) -> bool:
        return self._span is not None and not self._span.is_idle

    def _explain(self) -> str:
        """Tell the peers that this process is ended, and say where every rank is."""
        seconds = self._options.kill_after or 0.0
        barrier, span = self._barrier, self._span
        if barrier is None or span is None:
            here = Place(me(), phase=f"in scope {self.name!r}", seconds=seconds)
            return _report.out_of_patience(self.name, seconds, {0: here}, 0)
        what = f"not left within {seconds:.1f} s; its process was ended"
        outcome = Outcome(KILL_PHASE, "TimeoutError", what, barrier.control.place(span).frames)
        barrier.publish(attrs.evolve(self._record(self._stage), outcome=outcome))
        return _report.out_of_patience(self.name, seconds, barrier.control.survey(span), barrier.rank)
