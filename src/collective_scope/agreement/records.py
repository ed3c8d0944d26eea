"""
The latest word of one rank (`Record`, with its `Outcome`), and of all in one round (`Verdict`).

These travel through a store as JSON. Exceptions travel as text, never as pickles: whatever a
foreign exception holds or needs to be constructed, its type, message and traceback arrive.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import attrs

from .process import NOBODY, Place, Process
from .text import MESSAGE_LIMIT, message_of, one_line, shorten, traceback_of, type_name


AFTER_REVOCATION = ", after the group was revoked"
"""The end of the name of a phase in which a rank failed because of that."""


@attrs.frozen
class Outcome:
    """
    What happened on one rank.

    Attributes:
        phase:
            Where the first error was raised: ``"body"``, ``"cleanup 'name'"``,
            ``"barrier"``, ... Empty if nothing went wrong.

        type_name: Qualified name of the exception's class, without the module of builtins.

        message: ``str()`` of the exception; long ones lose their middle.

        traceback: Formatted traceback, notes and causes included; long ones lose their middle.

        order:
            Grows in the order in which failures were published, over all ranks.
            0 if nothing was published.

        also: Later errors of the same rank, one line each.
    """

    phase: str = ""
    type_name: str = ""
    message: str = ""
    traceback: str = ""
    order: int = 0
    also: tuple[str, ...] = attrs.field(default=(), converter=tuple[str, ...])

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong on this rank."""
        return not self.phase

    @property
    def is_skip(self) -> bool:
        """Whether the rank skipped a test, as pytest and unittest do it."""
        return self.type_name.rpartition(".")[2] in ("Skipped", "SkipTest")

    def __str__(self) -> str:
        if self.ok:
            return "ok"
        verb = "skipped" if self.is_skip else "failed"
        phase, after, _ = self.phase.partition(AFTER_REVOCATION)
        return f"{phase} {verb}{after}: {one_line(self.type_name, self.message)}"

    @classmethod
    def of(cls, exc: BaseException, phase: str) -> Outcome:
        """Describe *exc*, whatever its ``__str__`` does."""
        return cls(phase, type_name(exc), shorten(message_of(exc), MESSAGE_LIMIT), traceback_of(exc))


OK = Outcome()

Listed = tuple[str, str, str]
"""A collective cleanup as ranks compare it: its name, a hash of its fingerprint, the fingerprint to show."""


@attrs.define
class Record:
    """
    The latest thing that one rank told its peers.

    Attributes:
        scope: Path of the scope that it is in.
        stage: Which round of the scope: ``"entry"``; ``"entry 2"``, when the group has been made; ``"exit"``,
            ``"exit 2"``, ...; empty if it came to none.
        arrived: Whether it waits there, or did.
        outcome: What happened on it so far, in that scope.
        cleanups: Collective cleanups left, in the order they would run.
        process: Its process.
        place: Where it was when it was last asked.
        answered: Number of the latest question that it has answered.
        last_word: Why it is gone from the group, if it is.
    """

    scope: str = ""
    stage: str = ""
    arrived: bool = False
    outcome: Outcome = OK
    cleanups: tuple[Listed, ...] = ()
    process: Process = NOBODY
    place: Place | None = None
    answered: int = 0
    last_word: str = ""

    @property
    def round(self) -> str:
        """The beginning of all keys of its round."""
        return f"{self.scope}/{self.stage}"

    @property
    def has_something_to_tell(self) -> bool:
        """Whether peers need this record before the round can be judged."""
        return bool(self.cleanups) or not self.outcome.ok

    def encode(self) -> bytes:
        """Write it for the store."""
        place = None if self.place is None else attrs.astuple(self.place)
        outcome = None if self.outcome.ok else attrs.astuple(self.outcome)
        rest = (self.cleanups, attrs.astuple(self.process), place, self.answered, self.last_word)
        return dump((self.scope, self.stage, self.arrived, outcome, *rest))

    @classmethod
    def decode(cls, text: bytes) -> Record | None:
        """Read what `encode` wrote; None if it is anything else, such as nothing."""
        if text[:1] != b"[":
            return None
        scope, stage, arrived, outcome, cleanups, process, place, answered, last_word = load(text)
        return cls(
            scope,
            stage,
            arrived,
            Outcome(*outcome) if outcome else OK,
            tuple((name, digest, shown) for name, digest, shown in cleanups),
            Process(*process),
            Place(Process(*place[0]), *place[1:]) if place else None,
            answered,
            last_word,
        )


@attrs.frozen(repr=False)
class Verdict:
    """
    Each rank's part in one scope; the same on every rank, unless the store did not answer: *reason* says so.

    Each rank is in exactly one of *arrived*, *missing* and *lost*.

    Attributes:
        scope: Name of the scope.

        world_size: Number of ranks of the group.

        arrived: Ranks, within the group, that came to the barrier; sorted.

        missing: Ranks that were not seen there when the wait ended; sorted.

        lost: Ranks that are known to be gone; sorted.

        outcomes: What the ranks that told anything say of themselves, by rank.

        where: Where the ranks are that did not arrive, as far as that is known.

        names: Names of the scopes at which the ranks are, by rank, if these differ.

        outside:
            Name of the scope in which a rank failed, by rank, if it failed in
            one around this scope and so will not come to this one.

        cleanups:
            Collective cleanups as name and fingerprint, in the order they would
            run, by rank, if the ranks have different ones.

        agreed: Names of the collective cleanups that all ranks share.

        timeout: Seconds that the rank that ended the wait had waited; 0 if all arrived.

        reason: Why the wait ended, if for none of the above.

        stage: Which barrier of the scope: ``"entry"``, ``"exit"``, ``"exit 2"``, ...

        pending: Whether collective cleanups were left.

        revoked: Whether the group was revoked before all had come, so that ranks which were stuck came back.

        global_ranks: What the ranks are called in the default group, if not the same.
    """

    scope: str
    world_size: int
    arrived: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    outcomes: Mapping[int, Outcome] = attrs.field(factory=dict)
    where: Mapping[int, Place] = attrs.field(factory=dict)
    names: Mapping[int, str] = attrs.field(factory=dict)
    outside: Mapping[int, str] = attrs.field(factory=dict)
    cleanups: Mapping[int, tuple[tuple[str, str], ...]] = attrs.field(factory=dict)
    agreed: tuple[str, ...] = ()
    timeout: float = 0.0
    reason: str = ""
    stage: str = "exit"
    pending: bool = False
    revoked: bool = False
    global_ranks: tuple[int, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every rank arrived at the same place."""
        return len(self.arrived) == self.world_size and not self.reason

    @property
    def may_go_on(self) -> bool:
        """Whether collective cleanups were left, and the ranks can go on to run those that they share."""
        return self.pending and self.complete and not self.revoked

    @property
    def failures(self) -> dict[int, Outcome]:
        """Outcomes of the ranks on which something went wrong, by rank."""
        if self.outcomes is all_well(self.world_size):
            return {}
        return {rank: outcome for rank, outcome in self.outcomes.items() if not outcome.ok}

    @property
    def ok(self) -> bool:
        """Whether every rank arrived and nothing went wrong anywhere."""
        return self.complete and not self.cleanups and not self.failures and not self.revoked

    def __repr__(self) -> str:
        return f"<Verdict: {self}>"

    def __str__(self) -> str:
        parts = {
            "failed": self.failures,
            "missing": self.missing,
            "lost": self.lost,
            "at different scopes": self.names,
            "in a scope around it": self.outside,
            "with different cleanups": self.cleanups,
        }
        texts = [f"{what}: {', '.join(map(str, sorted(ranks)))}" for what, ranks in parts.items() if ranks]
        what = "; ".join(texts) or self.reason or "ok"
        return f"scope {self.scope!r}, {len(self.arrived)} of {self.world_size} ranks arrived, {what}"


@functools.lru_cache(maxsize=16)
def all_well(world_size: int) -> Mapping[int, Outcome]:
    """Return the outcomes of ranks on none of which anything went wrong; the same object for all verdicts."""
    return dict.fromkeys(range(world_size), OK)


@functools.lru_cache(maxsize=16)
def everyone(world_size: int) -> tuple[int, ...]:
    """Return all ranks."""
    return tuple(range(world_size))


def dump(value: Any) -> bytes:
    """Write *value* as JSON."""
    # A name may hold half of a surrogate pair, which os.fsdecode() makes of odd file names.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def load(text: bytes) -> Any:
    """Read what `dump` wrote."""
    return json.loads(text.decode("utf-8", "surrogatepass"))
