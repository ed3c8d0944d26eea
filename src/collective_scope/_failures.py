"""The errors of this rank in one scope, and the one that surfaces."""

from __future__ import annotations

import logging
import os
import traceback
import unittest
from collections.abc import Iterable
from typing import Any

import attrs

from . import _notes, _report
from ._cleanups import Cleanup
from .agreement.records import OK, Outcome, Verdict
from .agreement.rounds import failures_in_order
from .agreement.text import message_of, one_line, type_name, without_frames_of_ours
from .exceptions import (
    BarrierTimeoutError,
    CleanupMismatchError,
    CollectiveScopeError,
    PeerFailedError,
    PeerLostError,
    RevokedInterrupt,
    ScopeMismatchError,
)


logger = logging.getLogger("collective_scope")

_INTERRUPTS = (KeyboardInterrupt, SystemExit)

MOST_LINES = 20
"""Later errors that peers are told of, a line each; the rest is counted."""


@attrs.define(eq=False)
class Failures:
    """The errors of one scope on one rank, in the order in which they were raised."""

    body: BaseException | None = attrs.field(default=None, init=False)
    skipped: list[Cleanup] = attrs.field(factory=list, init=False)
    """Cleanups that were not run, for want of an agreement or because a rank is missing."""
    raised: list[tuple[str, BaseException]] = attrs.field(factory=list, init=False)
    """Phase and error of each."""
    _outcome: Outcome = attrs.field(default=OK, init=False)
    """The first of them, as peers are told of it."""

    @property
    def first(self) -> BaseException | None:
        """The error that was raised first."""
        return self.raised[0][1] if self.raised else None

    @property
    def outcome(self) -> Outcome:
        """The outcome that peers are told."""
        if not self.raised:
            return OK
        if self._outcome is OK:
            phase, error = self.raised[0]
            self._outcome = Outcome.of(error, phase)
        if len(self.raised) == 1:
            return self._outcome
        later = self.raised[1 : 1 + MOST_LINES]
        also = [f"{phase}: {one_line(type_name(error), message_of(error))}" for phase, error in later]
        more = len(self.raised) - 1 - len(later)
        return attrs.evolve(self._outcome, also=(*also, *([f"and {more} more"] if more else [])))

    def log(
        self, phase: str, error: BaseException, *, scope: str, rank: int, world_size: int, dead_since: str = ""
    ) -> None:
        """Log an error that has been noted and told: in a line, if it comes of a group that is *dead_since* a scope."""
        level = logging.INFO if is_skip(error) else logging.ERROR
        try:
            text = _notes.failed_here(rank, world_size, scope, phase)
            exc_info = None if dead_since else (type(error), error, without_frames_of_ours(error.__traceback__))
            text += f": {_notes.still_dead(dead_since)}" if dead_since else ""
            logger.log(level, "%s", text, exc_info=exc_info, extra={"rank": rank, "scope": scope, "phase": phase})
        except Exception as broken:
            # A handler that raises must not be silent, nor keep the rank from the barrier.
            try:
                error.add_note(f"This could not be logged: {type_name(broken)}: {message_of(broken)}")
            except Exception:  # an exception class may forbid notes
                self.raised.append(("log", broken))

    def surface(self, scope: str, verdict: Verdict | None, rank: int) -> BaseException | None:
        """
        Choose what this rank raises, and attach the rest to it.

        The body's own exception first, then the cleanups', then what the
        verdict says of the peers; but an interrupt before ordinary errors.
        """
        self.raised = [(phase, error) for phase, error in self.raised if not isinstance(error, RevokedInterrupt)]
        here = [error for _, error in self.raised]
        peers = errors_of(verdict, rank, failed=bool(here)) if verdict is not None and not verdict.ok else []
        if not here and not peers and not self.skipped:
            return None
        interrupt = next((e for e in here if e is not self.body and isinstance(e, _INTERRUPTS)), None)
        primary: BaseException
        members: list[BaseException] = []
        if interrupt is not None and not isinstance(self.body, _INTERRUPTS):
            primary = interrupt
        elif self.body is not None:
            primary = self.body
        elif len(here) > 1:
            primary, members = BaseExceptionGroup(f"{len(here)} cleanups of scope {scope!r} failed", here), here
        elif here or peers:
            primary = (here or peers)[0]
        else:
            # Nothing else says it: a skipped cleanup never passes silently.
            primary = CleanupMismatchError(_notes.skipped(self.skipped), verdict)
        known = {id(error) for error in (primary, *members)}
        rest = [(phase, e) for phase, e in self.raised if id(e) not in known]
        # The error of a scope within this one says it already, if it was this one that was over.
        if primary is self.body and isinstance(primary, CollectiveScopeError) and primary.verdict == verdict:
            peers = []
        rest += [("at the barrier", error) for error in peers if error is not primary]
        self.attach(scope, primary, rest)
        return primary

    def attach(
        self, scope: str, primary: BaseException, rest: Iterable[tuple[str, BaseException]] | None = None
    ) -> None:
        """Attach *rest*, by default all that was raised here, to what surfaces: as notes and as an attribute."""
        rest = [(phase, error) for phase, error in (self.raised if rest is None else rest) if error is not primary]
        # A failure that leaves many scopes finds its own echo from the peers at each: told in full once.
        earlier, notes = _attribute(primary, "collective_scope_errors"), _attribute(primary, "__notes__")
        echoes = PeerFailedError if isinstance(primary, PeerFailedError) else ()
        texts = [
            _notes.attached(error, phase, in_full=not (earlier or isinstance(error, echoes))) for phase, error in rest
        ]
        if self.skipped:
            texts.append(_notes.skipped(self.skipped))
        texts = [text for text in texts if text not in notes][: max(0, MOST_LINES - len(notes))]
        try:
            for text in texts:
                primary.add_note(text)
            if rest and len(earlier) < MOST_LINES:  # of an inner scope, or one before that raised the same object
                errors = (*earlier, *(error for _, error in rest))
                primary.collective_scope_errors = errors  # type: ignore[attr-defined]  # promised by the docstring of collective_scope
        except Exception as refused:
            # An exception class may forbid attributes; then the log has what the notes would say, or else stderr.
            text = "\n".join((f"scope {scope!r}: {message_of(refused)}", *texts))
            try:
                logger.error("%s", text)  # noqa: TRY400  (the traceback is of the refusal)
            except Exception:
                os.write(2, f"{text}\n".encode(errors="replace"))

    def clear(self) -> None:
        """Drop all references: an exception refers to frames, and they to this object."""
        self.raised.clear()
        self.skipped.clear()
        self.body = None


def errors_of(verdict: Verdict, rank: int, *, failed: bool = False) -> list[CollectiveScopeError]:
    """Return what *verdict* means for *rank*, which *failed* in this scope or did not, the most important first."""
    errors: list[CollectiveScopeError] = []
    others = [outcome for peer, outcome in verdict.failures.items() if peer != rank]
    mine = verdict.failures.get(rank) if failed else None
    # Where a rank failed in a scope around this one, nobody waited for the others.
    is_timeout = bool(verdict.missing) and not verdict.outside and not verdict.reason
    if verdict.names:
        errors.append(ScopeMismatchError(_report.scopes_differ(verdict), verdict))
    elif verdict.lost:
        errors.append(PeerLostError(_report.lost(verdict), verdict))
    elif is_timeout or (verdict.reason and not others and mine is None):
        errors.append(BarrierTimeoutError(_report.missing(verdict), verdict))
    # On a rank that failed itself, only an earlier failure is news: it may be the cause.
    if others and (mine is None or failures_in_order(verdict.failures)[0][0] != rank):
        errors.append(PeerFailedError(_report.peers_failed(verdict), verdict))
    if verdict.cleanups:
        errors.append(CleanupMismatchError(_report.cleanups_differ(verdict), verdict))
    return errors


def _attribute(error: BaseException, name: str) -> tuple[Any, ...]:
    """Return a sequence that was set on an exception, without any code of its class; empty if there is none."""
    value = vars(error).get(name, ())
    return tuple(value) if isinstance(value, tuple | list) else ()


def is_skip(error: BaseException) -> bool:
    """Whether *error* skips a test, as unittest and pytest do it."""
    # pytest.skip.Exception, without importing pytest.
    return isinstance(error, unittest.SkipTest) or type(error).__name__ == "Skipped"


def clear_frames(error: BaseException | None) -> None:
    """Drop what the frames refer to that *error* came through; likewise for all errors that it brings along."""
    chain, seen = [error], set()
    while chain:
        error = chain.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            for frame, _ in traceback.walk_tb(error.__traceback__):
                # Up to CPython 3.12, a tool that has looked at the locals, as pytest does, has left a copy in the
                # frame; looking again makes it what they are now.
                len(frame.f_locals)
            attached = [
                each for each in _attribute(error, "collective_scope_errors") if isinstance(each, BaseException)
            ]
            chain += [error.__cause__, error.__context__, *_members(error), *attached]


def _members(error: BaseException) -> tuple[BaseException, ...]:
    try:
        return error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    except Exception:  # a group of somebody's own making: then its members keep what they refer to
        logger.debug("the members of a %s cannot be had", type(error).__name__, exc_info=True)
        return ()
