"""What went wrong on this rank in one scope, and what surfaces of it."""

from __future__ import annotations

import logging
import math
import traceback
import unittest
from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from . import _report
from ._outcome import OK, Outcome, Verdict, message_of, one_line, type_name
from .exceptions import (
    BarrierTimeoutError,
    CleanupMismatchError,
    CollectiveScopeError,
    PeerFailedError,
    PeerLostError,
    ScopeMismatchError,
)


if TYPE_CHECKING:
    from ._cleanups import Cleanup

logger = logging.getLogger("collective_scope")

_INTERRUPTS = (KeyboardInterrupt, SystemExit)


@attrs.define(eq=False)
class Failures:
    """
    The errors of one scope on one rank, in the order in which they were raised.

    Args:
        scope: Name of the scope.
    """

    scope: str
    body: BaseException | None = attrs.field(default=None, init=False)
    outcome: Outcome = attrs.field(default=OK, init=False)
    """What peers are told of them."""
    skipped: list[Cleanup] = attrs.field(factory=list, init=False)
    """Collective cleanups that were not run, for want of an agreement."""
    _raised: list[tuple[str, BaseException]] = attrs.field(factory=list, init=False)

    def add(self, phase: str, error: BaseException, *, rank: int, world_size: int, log: bool = True) -> None:
        """Note that *error* was raised in *phase*, and log it, before anybody is waited for."""
        self._raised.append((phase, error))
        if phase == "body":
            self.body = error
        if self.outcome.ok:
            self.outcome = Outcome.of(error, phase)
        else:
            line = f"{phase}: {one_line(type_name(error), message_of(error))}"
            self.outcome = attrs.evolve(self.outcome, also=(*self.outcome.also, line))
        if log:
            level = logging.INFO if _is_skip(error) else logging.ERROR
            try:
                logger.log(level, "%s", _report.failed_here(rank, world_size, self.scope, phase), exc_info=error)
            except Exception:
                # A handler that raises must not keep the peers waiting. logging itself would print this.
                traceback.print_exc()

    def surface(self, verdict: Verdict | None, rank: int) -> BaseException | None:
        """
        Choose what this rank raises, and attach the rest to it.

        The body's own exception first, then the cleanups', then what the
        verdict says of the peers; but an interrupt before ordinary errors.
        """
        here = [error for _, error in self._raised]
        peers = errors_of(verdict, rank, failed=bool(here)) if verdict is not None and not verdict.ok else []
        if not here and not peers:
            return None
        interrupt = next((e for e in here if e is not self.body and isinstance(e, _INTERRUPTS)), None)
        primary: BaseException
        members: list[BaseException] = []
        if interrupt is not None and not isinstance(self.body, _INTERRUPTS):
            primary = interrupt
        elif self.body is not None:
            primary = self.body
        elif len(here) > 1:
            primary, members = BaseExceptionGroup(f"{len(here)} cleanups of scope {self.scope!r} failed", here), here
        else:
            primary = (here or peers)[0]
        rest = [(phase, e) for phase, e in self._raised if e is not primary and e not in members]
        # What a scope within this one raised says it already, if it was this one that was over.
        if primary is self.body and getattr(primary, "verdict", None) is verdict:
            peers = []
        rest += [("at the barrier", error) for error in peers if error is not primary]
        self.attach(primary, rest)
        return primary

    def attach(self, primary: BaseException, rest: Iterable[tuple[str, BaseException]] | None = None) -> None:
        """Attach *rest*, by default all that was raised here, to what surfaces: as notes and as an attribute."""
        rest = list(self._raised if rest is None else rest)
        # A failure that leaves many nested scopes finds its own echo from the peers at each: told in full once.
        is_left_again = bool(getattr(primary, "collective_scope_errors", ()))
        echoes = PeerFailedError if isinstance(primary, PeerFailedError) else ()
        texts = [
            _report.attached(error, phase, in_full=not (is_left_again or isinstance(error, echoes)))
            for phase, error in rest
        ]
        if self.skipped:
            texts.append(_report.skipped(self.skipped))
        try:
            for text in texts:
                primary.add_note(text)
            if rest:
                earlier = getattr(primary, "collective_scope_errors", ())  # of an inner scope
                errors = (*earlier, *(error for _, error in rest))
                primary.collective_scope_errors = errors  # type: ignore[attr-defined]
        except Exception as refused:
            # An exception class may forbid attributes; then the log has what the notes would say.
            logger.error("scope %r: %s\n%s", self.scope, message_of(refused), "\n".join(texts))  # noqa: TRY400

    def clear(self) -> None:
        """Drop all references: an exception refers to frames, and they to this object."""
        self._raised.clear()
        self.skipped.clear()
        self.body = None


def errors_of(verdict: Verdict, rank: int, *, failed: bool = False) -> list[CollectiveScopeError]:
    """Return what *verdict* means for *rank*, which *failed* in this scope or did not, the most important first."""
    errors: list[CollectiveScopeError] = []
    others = [outcome for peer, outcome in verdict.failures.items() if peer != rank]
    mine = verdict.failures.get(rank) if failed else None
    if verdict.names:
        errors.append(ScopeMismatchError(_report.scopes_differ(verdict), verdict))
    if verdict.lost:
        errors.append(PeerLostError(_report.lost(verdict), verdict))
    elif verdict.missing or (verdict.reason and not others and mine is None):
        errors.append(BarrierTimeoutError(_report.missing(verdict), verdict))
    # On a rank that failed itself, only an earlier failure is news: it may be the cause.
    if others and (mine is None or min(o.order or math.inf for o in others) < (mine.order or math.inf)):
        errors.append(PeerFailedError(_report.peers_failed(verdict), verdict))
    if verdict.cleanups:
        errors.append(CleanupMismatchError(_report.cleanups_differ(verdict), verdict))
    return errors


def _is_skip(error: BaseException) -> bool:
    # pytest.skip.Exception, without importing pytest.
    return isinstance(error, unittest.SkipTest) or type(error).__name__ == "Skipped"
