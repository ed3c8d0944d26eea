"""
The errors of a scope that the ranks did not leave together, or not all of them well.

* CollectiveScopeError
  + PeerFailedError        this rank was fine, a peer was not
  + BarrierTimeoutError    a peer is missing
  + PeerLostError          a peer is known to be gone
  + ScopeMismatchError     the ranks are at different scopes
  + CleanupMismatchError   the ranks have different collective cleanups

* RevokedInterrupt         not an error: it ends the body of a rank that was freed because a peer failed

The facts in a message are attributes too; nobody has to parse text. All pickle.
"""

from __future__ import annotations

from collections.abc import Mapping

from .agreement.records import Outcome, Verdict


__all__ = [
    "BarrierTimeoutError",
    "CleanupMismatchError",
    "CollectiveScopeError",
    "PeerFailedError",
    "PeerLostError",
    "RevokedInterrupt",
    "ScopeMismatchError",
]


class CollectiveScopeError(Exception):
    """
    Base of what this library raises at the exit, or the entry, of a scope.

    Attributes:
        verdict: Each rank's part in the scope; the same on every rank, unless the store did not answer.
    """

    verdict: Verdict

    def __init__(self, message: str, verdict: Verdict | None = None) -> None:
        super().__init__(message)
        if verdict is not None:  # None only while unpickling, which sets the attribute itself
            self.verdict = verdict


class PeerFailedError(CollectiveScopeError):
    """Raised on ranks on which all went well, when it did not on a peer."""

    @property
    def failures(self) -> Mapping[int, Outcome]:
        """The failures, by rank: type name, message, traceback text, phase."""
        return self.verdict.failures


class BarrierTimeoutError(CollectiveScopeError):
    """
    Raised when a peer is missing at the barrier and the timeout has run out.

    Also when the wait had to end before: then ``verdict.reason`` says why, or the message that an entry was refused at once.
    """

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks, within the group, that were not seen at the barrier; sorted."""
        return self.verdict.missing

    @property
    def timeout(self) -> float:
        """Seconds that were waited, by the rank that ended the wait."""
        return self.verdict.timeout


class PeerLostError(CollectiveScopeError):
    """Raised when a peer, or the store it hosted, is known to be gone."""

    @property
    def lost(self) -> tuple[int, ...]:
        """Ranks, within the group, that are gone; sorted."""
        return self.verdict.lost


class ScopeMismatchError(CollectiveScopeError):
    """Raised when ranks of one group arrive at different scopes."""

    @property
    def names(self) -> Mapping[int, str]:
        """Name of the scope at which a rank is, by rank."""
        return self.verdict.names


class CleanupMismatchError(CollectiveScopeError):
    """
    Raised when ranks have different collective cleanups; those not shared ran on no rank.

    Also when a cleanup could not run and nothing else went wrong: then the message names it, and `cleanups` is empty.
    """

    @property
    def cleanups(self) -> Mapping[int, tuple[tuple[str, str], ...]]:
        """Names and fingerprints of the collective cleanups, by rank, in the order they would run."""
        return self.verdict.cleanups


class RevokedInterrupt(BaseException):
    """
    Raised in the body of a rank whose group was revoked, if it goes on.

    Its scope then raises `PeerFailedError`, or `BarrierTimeoutError` if the peers gave it up.

    Not an ``Exception``: a body that catches those must not go on with wrong values.
    """


# Reports and pytest's summary line show the module; the short path leaves room for the facts.
for _name in __all__:
    globals()[_name].__module__ = "collective_scope"
