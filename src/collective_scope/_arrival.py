"""How a scope meets its peers: it finds its group, tells what went wrong, and arrives at a barrier."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from types import CodeType
from typing import Any

import attrs

from . import _groups, _notes, _torch
from ._cleanups import Cleanup
from ._kill import Killer, end
from ._membership import Membership
from ._registry import Registry
from ._speaker import Speaker
from .agreement.barrier import Barrier, verdict_alone
from .agreement.clock import monotonic
from .agreement.records import AFTER_REVOCATION, Listed, Record, Verdict
from .agreement.revocation import Renewal, Revocation
from .agreement.text import message_of, shorten, type_name
from .agreement.wait import Wait
from .agreement.watch import Span
from .exceptions import RevokedInterrupt


__tracebackhide__ = True
"""Where pytest leaves frames out: between the line with the scope and the line that failed, these tell nothing."""


MAKING = "making the group"
"""The phase in which a `RenewableGroup` is made."""


@attrs.frozen
class Options:
    """How a scope behaves; times in seconds. `collective_scope` says what they mean."""

    timeout: float
    failure_timeout: float
    warn_after: float | None
    heartbeat_timeout: float
    kill_after: float | None
    synchronize: bool
    lockstep_gc: bool
    meet_at_entry: bool
    history: list[tuple[float, str]] | None = None
    """Where to note phases, failure and revocation, each with its time on the monotonic clock; None if nowhere."""


@attrs.define(eq=False, repr=False, kw_only=True, on_setattr=attrs.setters.NO_OP)
class Arrival(Registry):
    """The part of a scope that talks to its peers."""

    _group: Any
    _options: Options
    _given: tuple[Callable[[], object], ...]
    verdict: Verdict | None = attrs.field(default=None, init=False)
    _membership: Membership | None = attrs.field(default=None, init=False)
    _kept: Any = attrs.field(default=None, init=False)
    """An object that has to stay alive while that is used."""
    _body: CodeType | None = None
    """The code that the body is; that of the caller of ``__enter__`` if not given."""
    _pid: int = attrs.field(default=0, init=False)
    _thread: int = attrs.field(default=0, init=False)
    _path: str = attrs.field(default="", init=False)
    _inner: int = attrs.field(default=0, init=False)
    """How many scopes on the same group have been entered directly within this one."""
    _parent: Any = attrs.field(default=None, init=False)
    _told: BaseException | None = attrs.field(default=None, init=False)
    """The error of an inner scope; it is logged already."""
    _span: Span | None = attrs.field(default=None, init=False)
    _killer: Killer | None = attrs.field(default=None, init=False)
    _stage: str = attrs.field(default="exit", init=False)
    """The round that comes next: ``"entry 2"``, ``"exit"``, ``"exit 2"``, ..."""
    _wait: Wait | None = attrs.field(default=None, init=False)
    """Its latest wait at a barrier."""

    @property
    def _barrier(self) -> Barrier | None:
        """The barrier of this rank; None without a group, or without peers."""
        return None if self._membership is None else self._membership.barrier

    @property
    def _renewal(self) -> Renewal | None:
        """The group itself, if it can be revoked and made again."""
        return None if self._membership is None else self._membership.renewal

    def _arrived_at(self, stage: str) -> bool:
        """Whether this rank's latest wait is, or was, at that *stage*."""
        return self._wait is not None and self._wait.record.stage == stage

    def _arrive(self, stage: str) -> Verdict:
        is_entry, options, barrier = stage == "entry", self._options, self._barrier
        listed: tuple[Listed, ...] = ()
        if self._cleanups and not is_entry:
            listed = tuple(self._listed(name, cleanup) for name, cleanup in self._cleanups.collective().items())
        record = self._record(stage, listed)
        if barrier is None:
            return verdict_alone(record)
        # A rank that is stuck in an earlier scope must not cost each further one a whole timeout.
        timeout = min(options.timeout, options.failure_timeout) if is_entry else options.timeout
        if self._killer is not None:
            timeout = min(timeout, max(0.0, self._killer.at - monotonic()))
        return barrier.arrive(record, timeout, options.failure_timeout, self._note_arrival)

    def _note_arrival(self, wait: Wait) -> None:
        self._wait, stage, span = wait, wait.record.stage, self._span
        if span is not None:
            span.stage, span.wait = stage, wait
            span.enter(f"at the {'entry' if stage.startswith('entry') else 'barrier'} of")

    def _record(self, stage: str, listed: tuple[Listed, ...] = ()) -> Record:
        return Record(self._path or f"0 {self.name}", stage, True, self._failures.outcome, listed)  # noqa: FBT003  (the third field of a record)

    def _listed(self, name: str, cleanup: Cleanup) -> Listed:
        """Return a collective cleanup as the ranks compare it."""
        if cleanup.fingerprint is None:
            return name, "", ""
        try:
            text = repr(cleanup.fingerprint())
        except BaseException as error:
            self._fail(f"fingerprint of cleanup {name!r}", error)
            return name, f"raised on {os.getpid()}", f"raised {type_name(error)}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return name, digest, shorten(text, 1000)

    def _guard(self, phase: str, call: Callable[[], object], place: str = "") -> None:
        """Call; keep what it raises, a KeyboardInterrupt included, so that what comes next is reached."""
        if self._span is not None:
            self._span.enter(f"in {phase}{place} of")
        try:
            call()
        except BaseException as error:
            self._fail(phase, error)

    def _fail(self, phase: str, error: BaseException) -> None:
        """Note that *error* was raised in *phase*; then tell the peers, if it is the first; then log it."""
        barrier, span = self._barrier, self._span
        if span is not None:
            if span.history is not None and not span.has_failed:
                span.history.append((monotonic(), "failed"))
            span.has_failed = True
            if span.revocation is not None and span.revocation.is_begun:
                phase += AFTER_REVOCATION
        self._failures.raised.append((phase, error))
        if barrier is not None and len(self._failures.raised) == 1 and self._path and not self._is_past_barrier:
            barrier.publish(self._record(self._stage))
        # A body that has made the group, and failed, has no barrier yet.
        rank, world_size = _torch.place_in_world() if barrier is None else (barrier.rank, barrier.world_size)
        if error is not self._told:  # what an inner scope raised is in the log already
            try:
                since = self._note_death(error)
                self._failures.log(phase, error, scope=self.name, rank=rank, world_size=world_size, dead_since=since)
            except BaseException as broken:  # of a handler: it must keep nobody from the barrier
                self._failures.raised.append(("log", broken))

    def _note_death(self, error: BaseException) -> str:
        """Return since which scope the group is dead, if *error* comes of that and the log has told it in full."""
        membership = self._membership
        is_end = _is_a(error, "RuntimeError") and _torch.is_end_of_gloo(message_of(error))
        if membership is None or membership.renewal is not None or not is_end:
            return ""
        since, membership.dead_since = membership.dead_since, membership.dead_since or self.name
        if self._barrier is not None:
            error.add_note(_notes.still_dead(since) if since else _notes.GROUP_IS_DEAD)
        return since

    def _note_whose_group_it_is(self, membership: Membership, verdict: Verdict) -> None:
        """Note which scope has cost a group that is gone, and for a group made twice, which call made it first."""
        is_here = verdict.revoked or not verdict.complete
        for phase, error in self._failures.raised if membership.renewal is not None else ():
            message = message_of(error) if _is_a(error, "RuntimeError", "ValueError") else ""
            if membership.dead_since and not is_here and _torch.is_end_of_group(message):
                error.add_note(_notes.made_again(membership.dead_since))
            if _torch.is_made_twice(message):
                error.add_note(_notes.MADE_BEFORE if phase == MAKING else _notes.MADE_TWICE)

    def _find(self) -> None:
        """Look the group up, unless that has been found."""
        if self._membership is None and (found := _groups.find(self._group)) is not None:
            self._membership, self._kept = found

    def _appear(self) -> None:
        """Let the control thread see this scope."""
        barrier, renewal, options = self._barrier, self._renewal, self._options
        if barrier is not None and self._span is None:
            span = Span(
                barrier.control,
                barrier.part,
                self.name,
                self._thread,
                self._body,
                options.warn_after,
                options.heartbeat_timeout,
                Speaker(self.name, barrier.rank, options.kill_after),
                None if renewal is None else Revocation(renewal, self._thread, RevokedInterrupt, self._give_up),
                self._path,
                history=options.history,
            )
            self._span = barrier.control.spans[id(span)] = span

    def _give_up(self, reason: str) -> None:
        """End this process: what the group has of it cannot be taken back."""
        end(_notes.cannot_be_freed(self.name, reason))


def _is_a(error: BaseException, *names: str) -> bool:
    """Whether *error* is of a class with one of these *names*: what a test raised comes from the plugin in another one."""
    return any(each.__name__ in names for each in type(error).__mro__)
