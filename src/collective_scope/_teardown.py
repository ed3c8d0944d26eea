"""
The teardown of a scope on one rank: a list of steps, and one loop that runs them.

An interrupt may come between any two lines. So a step may be run again: what it has done is noted
where it was done, and neither a cleanup nor the barrier is lost, or happens twice.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import attrs

from . import _notes, _torch
from ._arrival import Arrival
from ._cleanups import Cleanup, keep_for_ever
from ._failures import clear_frames
from .agreement.clock import monotonic
from .agreement.records import Verdict
from .agreement.revocation import Renewal
from .agreement.rounds import late_path
from .agreement.stacks import innermost
from .agreement.watch import Span
from .exceptions import RevokedInterrupt


__tracebackhide__ = True
"""Where pytest leaves frames out: between the line with the scope and the line that failed, these tell nothing."""

logger = logging.getLogger("collective_scope")

MOST_TRIES = 3
"""How often a step is begun, at most, that interrupts keep from its end. Callbacks of users have a guard of their own."""

_last_with_default_group: list[str] = []
"""Name of the last scope that had a default group for its group; empty if none had."""

current: ContextVar[Any] = ContextVar("collective_scope", default=None)
"""The innermost scope whose body is running."""


@attrs.define(eq=False, repr=False, kw_only=True, on_setattr=attrs.setters.NO_OP)
class Teardown(Arrival):
    """The part of a scope that leaves it."""

    _is_late: bool = attrs.field(default=False, init=False)
    """Whether the group was not found at the entry."""
    _trace: object = attrs.field(default=None, init=False)
    _has_lost_its_group: bool = attrs.field(default=False, init=False)
    """Whether there were peers, and are none any more."""
    _is_orphan: bool = attrs.field(default=False, init=False)
    """Whether a scope around this one was left first."""
    _gc_was_enabled: bool = attrs.field(default=False, init=False)
    _steps: list[Callable[[], object]] = attrs.field(factory=list, init=False)
    """The steps that are left, the next one last."""
    _tries: dict[str, int] = attrs.field(factory=dict, init=False)
    _in_flight: BaseException | None = attrs.field(default=None, init=False)
    """The error of the body."""
    _number: int = attrs.field(default=1, init=False)
    """The number of the exit barrier that comes next."""
    _agreed: tuple[str, ...] | None = attrs.field(default=None, init=False)
    """Names of the collective cleanups that all ranks share, the next of which may run; None if a barrier comes first."""
    _chosen: Cleanup | None = attrs.field(default=None, init=False)
    """The one that is to be run now."""
    _mismatch: Verdict | None = attrs.field(default=None, init=False)
    _surfaced: BaseException | None = attrs.field(default=None, init=False)

    # The loop.

    def _tear_down(self) -> None:
        while self._steps:
            step = self._steps[-1]
            try:
                step()
                self._steps.pop()
            except BaseException as error:
                self._fail("teardown", error)
                # It says nothing of the step that it met.
                self._tries[step.__name__] = tries = self._tries.get(step.__name__, 0) + 1
                if tries >= MOST_TRIES:
                    self._steps.pop()
                if self._is_past_barrier and step != self._surface:
                    self._steps.append(self._surface)  # what surfaces may be another error now

    def _plan(self) -> None:
        """List the steps, the first one last; those that have nothing to do are left out."""
        steps: list[Callable[[], object]] = [self._release, self._end, self._surface]
        steps += [self._leave_together, self._look_at_group]
        if self._options.lockstep_gc:
            steps.append(self._collect)
        if self._options.synchronize and _torch.accelerator() is not None:
            steps.append(self._synchronize)
        if self._in_flight is not None:
            steps.append(self._note_body)
        self._steps = steps

    # The steps, in the order in which they are run.

    def _note_body(self) -> None:
        """Tell the peers at once that the body failed, and log it, before anything else."""
        error = self._in_flight
        if isinstance(error, RevokedInterrupt):
            error.args = error.args or (f"ended at {innermost(error.__traceback__)}",)
        else:
            self._failures.body = error
        if error is not None and all(error is not each for _, each in self._failures.raised):
            self._fail("body", error)

    def _synchronize(self) -> None:
        """Wait for the accelerator, so that the cleanups do not free what it works on."""
        self._guard("synchronize", _torch.synchronize_accelerator)

    def _collect(self) -> None:
        """Collect garbage, at the same point on every rank."""
        # While __exit__ runs, the exception in flight keeps the locals of the failed
        # frames alive, on the failing rank only.
        clear_frames(self._failures.body)
        gc.collect()

    def _look_at_group(self) -> None:
        """Look for a group that the body has made, and for one that it has destroyed."""
        if self._membership is None:
            self._guard("lookup of the group", self._find)
        if self._membership is None:
            if self._group is None and _last_with_default_group:
                logger.warning("%s", _notes.group_is_gone(self.name, _last_with_default_group[0]))
                self._has_lost_its_group = True
            elif self._group is None and _torch.has_appeared(self._trace):
                logger.warning("%s", _notes.group_came_and_went(self.name))
            elif callable(self._group):
                logger.warning("%s", _notes.there_was_no_group(self.name))
            return
        if self._is_late and not self._path and (barrier := self._barrier) is not None:
            # The scopes that were within this one do not count any more.
            self._path, barrier.late, barrier.entered = late_path(barrier.late, self.name), barrier.late + 1, 0
            self._appear()
        if self._group is None:
            _last_with_default_group[:] = [self.name]
        if _torch.is_destroyed(self._kept):
            logger.warning("%s", _notes.group_was_destroyed(self.name))

    def _leave_together(self) -> None:
        """Clean up, meet the peers, and run collective cleanups between barriers."""
        while not self._is_orphan:
            if self._chosen is not None and not self._chosen.begun:
                self._run(self._chosen)
            top = self._cleanups.top()
            if top is not None and not top.collective:
                self._run(top)
            elif self._agreed is None:
                self._meet()
                if self._agreed is None or self._has_lost_its_group:
                    return
            elif top is None or self._name_of(top) in self._agreed:
                number = self._number + 1
                # One line: either this cleanup is the one to be run, before the next barrier, or nothing has changed.
                self._chosen, self._agreed, self._number, self._stage = top, None, number, f"exit {number}"
                if self._span is not None:
                    self._span.stage = self._stage
                    self._span.past = set(self.verdict.failures) if self.verdict is not None else set()
            else:
                self._skip(top)

    def _meet(self) -> None:
        """Arrive at the next barrier; note which collective cleanups may be run after it."""
        if not self._arrived_at(self._stage):
            self.verdict = None
            self._take_verdict(self._arrive(self._stage))
        elif self.verdict is None and self._wait is not None and isinstance(self._wait.reply, Verdict):
            self._take_verdict(self._wait.reply)  # it was there when an interrupt came

    def _take_verdict(self, verdict: Verdict) -> None:
        if verdict.cleanups or self._mismatch is not None:
            self._mismatch = mismatch = self._mismatch or verdict
            verdict = attrs.evolve(verdict, cleanups=mismatch.cleanups, agreed=mismatch.agreed)
        # One line: a thread that sees the verdict also sees which cleanups may run.
        self.verdict, self._agreed = verdict, verdict.agreed if verdict.may_go_on else None

    def _run_rest(self) -> None:
        """Run what is left and local. No collective cleanup runs without an agreement."""
        while (top := self._cleanups.top()) is not None:
            if top.collective:
                self._skip(top)
            else:
                self._run(top)

    def _run_after(self) -> None:
        """Run what was registered for after the barrier; if a rank is missing, only what does not mind."""
        is_safe = self.verdict is not None and not self.verdict.missing
        while (top := self._after.top()) is not None:
            if is_safe or top.even_if_missing:
                self._run(top, "after_barrier")
                self._run_rest()
            else:
                self._skip(top)

    def _surface(self) -> None:
        """Run what is left, and choose what this rank raises."""
        self._is_past_barrier = True
        self._run_rest()
        self._run_after()
        if self._failures.raised or self._failures.skipped or self.verdict is None or not self.verdict.ok:
            rank = 0 if self._barrier is None else self._barrier.rank
            if self._membership is not None and self.verdict is not None:
                self._note_whose_group_it_is(self._membership, self.verdict)
            self._surfaced = self._failures.surface(self.name, self.verdict, rank)

    def _end(self) -> None:
        """Take this scope out of everything that knows it."""
        if self._gc_was_enabled:
            gc.enable()
        if current.get() is self:  # it was refused at its entry
            current.set(self._parent)
        if self._parent is not None:
            self._parent._told = self._surfaced  # noqa: SLF001  (a scope too)
            if self._parent._span is not None:  # noqa: SLF001  (a scope too)
                self._parent._span.stirred = monotonic()  # noqa: SLF001  (a scope too)
        if self._killer is not None:
            self._killer.cancel()
        if self._membership is not None and self._membership.open[-1:] == [self]:
            self._membership.open.pop()
        if self._span is not None:
            self._disappear(self._span)
        if self._renewal is not None:
            self._let_go(self._renewal)
        self._state = "left"

    def _release(self) -> None:
        """Drop all references; keep for ever what a peer may still be using."""
        if self._held and (self.verdict is None or not self.verdict.complete):
            keep_for_ever(*self._held)
        keep_for_ever(*self._failures.skipped)
        # Last of all: freeing these may run destructors that the peers take part in.
        self._held.clear()
        self._cleanups.clear()
        self._after.clear()
        self._failures.clear()
        self._told = self._parent = self._membership = self._kept = self._in_flight = None
        self._span = self._wait = self._chosen = self._mismatch = None
        self._given = ()

    # Used by the steps.

    def _run(self, cleanup: Cleanup, kind: str = "cleanup") -> None:
        self._guard(f"{kind} {cleanup.name!r}", cleanup.run, f" (registered at {cleanup.where})")

    def _skip(self, cleanup: Cleanup) -> None:
        # One line: an interrupt comes either before both or after.
        self._failures.skipped.append(cleanup); cleanup.begun = True  # noqa: E702  # fmt: skip

    def _name_of(self, cleanup: Cleanup) -> str:
        return next(name for name, each in self._cleanups.collective().items() if each is cleanup)

    def _let_go(self, renewal: Renewal) -> None:
        """Have the group made again at the next entry, unless it is as good as it was."""
        verdict = self.verdict
        is_complete = verdict is not None and verdict.complete
        if verdict is None or verdict.revoked or not is_complete or _torch.has_ended(verdict.failures.values()):
            renewal.is_due = True
            if self._membership is not None:
                self._membership.dead_since = self.name
            if is_complete:
                renewal.abandon()

    def _disappear(self, span: Span) -> None:
        """Take this scope from the control thread's sight; a wait of it may still be to be ended."""
        if span.revocation is not None:
            span.revocation.end()
            is_revoked = span.revocation.is_begun or (self.verdict is not None and self.verdict.revoked)
            if is_revoked and span.history is not None:
                # A rank that its peers have freed may have arrived before it revoked its own end.
                span.history.append((span.revocation.begun_at or span.since, "revoked"))
        span.part.revoked.discard(self._path)
        span.control.left, span.is_left = self.name, True
        if span.is_idle:
            span.control.spans.pop(id(span), None)
