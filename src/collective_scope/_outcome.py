"""
What happened: on one rank (`Outcome`), in one round (`Record`), to all (`Verdict`).

Everything here travels through a store as JSON text. Exceptions travel as
text too, never as pickles: whatever a foreign exception holds or needs to be
constructed, its type, message and traceback arrive. Knows nothing of torch.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from ._process import NOBODY, Place, Process


MESSAGE_LIMIT = 16_384
"""Characters of an exception's message that travel."""

TRACEBACK_LIMIT = 65_536
"""Characters of a traceback that travel."""


def _strings(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)  # JSON has lists


def _ranks(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


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
            Place in the order in which the ranks' failures were published,
            counted from 1. 0 for a failure that was not published on its own.

        also: Later errors of the same rank, one line each.
    """

    phase: str = ""
    type_name: str = ""
    message: str = ""
    traceback: str = ""
    order: int = 0
    also: tuple[str, ...] = attrs.field(default=(), converter=_strings)

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong on this rank."""
        return not self.phase

    def __str__(self) -> str:
        return f"{self.phase} failed: {one_line(self.type_name, self.message)}" if self.phase else "ok"

    @classmethod
    def of(cls, exc: BaseException, phase: str, order: int = 0) -> Outcome:
        """Describe *exc*, whatever its ``__str__`` does."""
        text = "".join(traceback.format_exception(exc))
        return cls(
            phase=phase,
            type_name=type_name(exc),
            message=shorten(message_of(exc), MESSAGE_LIMIT),
            traceback=shorten(text, TRACEBACK_LIMIT),
            order=order,
        )


OK = Outcome()


@attrs.define
class Record:
    """
    What one rank tells its peers in one round.

    Not frozen, which makes it twice as fast to make: every exit waits for this.

    Attributes:
        round: Number of the round, counted from 0 in the life of a group.
        stage: Which round of its scope this is: ``"entry"``, ``"exit"``, ``"exit 2"``, ...
        scope: Name of the scope.
        sequence: How many scopes this rank had entered on the group before this one.
        outcome: What happened on the rank so far.
        cleanups: Collective cleanups left: name and fingerprint, in the order they would run.
        arrived: False if the rank tells something and has not arrived yet.
        process: Which process the rank is.
        enclosing: Sequence and name of the scopes around this one on the same group, innermost first.
    """

    round: int
    stage: str
    scope: str
    sequence: int
    outcome: Outcome = OK
    cleanups: tuple[tuple[str, str], ...] = ()
    arrived: bool = True
    process: Process = NOBODY
    enclosing: tuple[tuple[int, str], ...] = ()

    @property
    def id(self) -> tuple[int, str]:
        """What tells the scope from those around it, before it and after it."""
        return self.sequence, self.scope

    @property
    def place(self) -> tuple[str, int, str]:
        """Where in the program the rank is; the same for all ranks, if nothing is amiss."""
        return self.stage, self.sequence, self.scope

    def encode(self) -> str:
        outcome = None if self.outcome.ok else attrs.astuple(self.outcome)
        # By hand: attrs.asdict takes three times as long, and every exit waits for this.
        p = self.process
        process = (p.host, p.pid, p.start, p.machine)
        return json.dumps(
            (
                self.round,
                self.stage,
                self.scope,
                self.sequence,
                outcome,
                self.cleanups,
                self.arrived,
                process,
                self.enclosing,
            )
        )

    @classmethod
    def decode(cls, text: str | bytes) -> Record:
        """Read what `encode` wrote."""
        t, stage, scope, sequence, outcome, cleanups, arrived, process, enclosing = json.loads(text)
        outcome = Outcome(*outcome) if outcome else OK
        process = Process(*process)
        return cls(t, stage, scope, sequence, outcome, _pairs(cleanups), arrived, process, _ids(enclosing))


NOWHERE: Mapping[int, Place] = {}


@attrs.frozen
class Verdict:
    """
    What every rank did in one scope; the same on every rank.

    Attributes:
        scope: Name of the scope.
        sequence:
            Serial number of the scope on its group, counted from 0. Scopes within a scope that has been left do
            not count.
        world_size: Number of ranks of the group.
        stage: The round that was decided last, ``"exit"`` for most scopes.
        outcomes: What happened, by rank, for each rank that said so.
        arrived: Ranks that had arrived when the verdict was decided, sorted.
        missing: Ranks that were not seen at the barrier when the timeout ran out, sorted.
        lost: Ranks whose process, or whose store, is known to be gone, sorted.
        names: By rank: scope name and sequence, if the ranks were at different scopes.
        outside: By rank: name of a scope around this one, if ranks said that they failed there: they never come to this one.
        cleanups: By rank: names and fingerprints of the collective cleanups, if the ranks disagreed.
        agreed: Collective cleanups that every rank has left, in the order they run.
        pending: Whether some rank has collective cleanups left, so that a further round follows.
        timeout: Seconds that the rank which ended the wait had waited.
        where: Where the missing and lost ranks are, as far as they or their host could be asked.
        reason: Why the round ended before its time (the store did not answer, ...); empty otherwise.
        global_ranks: What ranks 0, 1, ... are called in the default group; empty if the same.
        enclosing: Sequence and name of the scopes around this one on the same group, innermost first.
    """

    scope: str
    sequence: int
    world_size: int
    stage: str = "exit"
    outcomes: Mapping[int, Outcome] = attrs.field(factory=dict)
    arrived: tuple[int, ...] = attrs.field(default=(), converter=_ranks)
    missing: tuple[int, ...] = attrs.field(default=(), converter=_ranks)
    lost: tuple[int, ...] = attrs.field(default=(), converter=_ranks)
    names: Mapping[int, tuple[str, int]] = attrs.field(factory=dict)
    outside: Mapping[int, str] = attrs.field(factory=dict)
    cleanups: Mapping[int, tuple[tuple[str, str], ...]] = attrs.field(factory=dict)
    agreed: tuple[str, ...] = attrs.field(default=(), converter=_strings)
    pending: bool = False
    timeout: float = 0.0
    where: Mapping[int, Place] = NOWHERE
    reason: str = ""
    global_ranks: tuple[int, ...] = attrs.field(default=(), converter=_ranks)
    enclosing: tuple[tuple[int, str], ...] = ()

    @property
    def id(self) -> tuple[int, str]:
        """What tells the scope from those around it, before it and after it."""
        return self.sequence, self.scope

    @property
    def complete(self) -> bool:
        """Whether every rank arrived at the same place."""
        return not (self.missing or self.lost or self.names or self.reason or self.outside)

    @property
    def failures(self) -> dict[int, Outcome]:
        """Outcomes of the ranks on which something went wrong, by rank."""
        return {rank: outcome for rank, outcome in self.outcomes.items() if not outcome.ok}

    @property
    def ok(self) -> bool:
        """Whether every rank arrived and nothing went wrong anywhere."""
        return self.complete and not self.cleanups and not self.failures

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

    def encode(self) -> str:
        return json.dumps(attrs.asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Verdict:
        fields = json.loads(text)
        # JSON has neither integer keys nor tuples.
        fields["outcomes"] = {int(rank): Outcome(**o) for rank, o in fields["outcomes"].items()}
        fields["names"] = {int(rank): (str(n), int(s)) for rank, (n, s) in fields["names"].items()}
        fields["outside"] = {int(rank): name for rank, name in fields["outside"].items()}
        fields["enclosing"] = _ids(fields["enclosing"])
        fields["where"] = {int(rank): Place.of(place) for rank, place in fields["where"].items()}
        fields["cleanups"] = {int(rank): _pairs(c) for rank, c in fields["cleanups"].items()}
        return cls(**fields)


def judge(
    records: Mapping[int, Record],
    mine: Record,
    world_size: int,
    *,
    timeout: float = 0.0,
    reason: str = "",
    lost: tuple[int, ...] = (),
    where: Mapping[int, Place] = NOWHERE,
) -> Verdict:
    """
    Derive the verdict of *mine*'s round from what the ranks told.

    Args:
        records: The latest record of each rank that has told anything.
        mine: The record of the rank that judges.
        world_size: Number of ranks.
        timeout: Seconds that this rank has waited.
        reason: Why the round ends before all have arrived, if not for a timeout.
        lost: Ranks that are known to be gone.
        where: Where missing and lost ranks are.
    """
    told = {rank: r for rank, r in sorted(records.items()) if r.round == mine.round}
    arrived = {rank: r for rank, r in told.items() if r.arrived}
    ended, mismatch = split(told.values(), mine)
    if reason:
        ended = None  # a rank ends its own scope: it does not come again, and those within that are over, too
    outside = {rank: r.scope for rank, r in told.items() if r.id != ended.id} if ended is not None else {}
    mine = ended or mine
    lists = {rank: r.cleanups for rank, r in arrived.items()}
    agreed = agree(lists.values())
    return Verdict(
        scope=mine.scope,
        sequence=mine.sequence,
        world_size=world_size,
        stage=mine.stage,
        # A rank that published a failure and is still cleaning up has an outcome, and is missing.
        outcomes={rank: r.outcome for rank, r in told.items()},
        arrived=arrived,
        # At a mismatch, a loss or an interrupt, nobody waited for the ranks that are not here yet.
        missing=()
        if mismatch or outside or lost or reason
        else [rank for rank in range(world_size) if rank not in arrived],
        lost=lost,
        where={rank: place for rank, place in where.items() if rank in lost or rank not in arrived},
        names={rank: (_place(r, told.values()), r.sequence) for rank, r in arrived.items()} if mismatch else {},
        outside=outside,
        cleanups=lists if len(set(lists.values())) > 1 and not outside else {},
        agreed=agreed,
        pending=any(lists.values()),
        timeout=timeout,
        reason=reason,
        enclosing=mine.enclosing,
    )


def split(told: Iterable[Record], mine: Record) -> tuple[Record | None, bool]:
    """
    Find out, from what is *told* in one round, whether the ranks can still meet in it.

    Returns:
        A record of the innermost scope in which a rank is, if a rank has failed in a scope around that one: it will
        not come to it, and the round is the inner scope's, which ends with it. None otherwise.
        And whether the ranks are at different scopes for no such reason.
    """
    told = [mine, *told]
    # Not by the sequence alone: a scope that was entered without a group starts from 0, like those within it.
    surrounding = {each for r in told for each in r.enclosing}
    last = max((r for r in told if r.id not in surrounding), key=lambda r: r.sequence, default=mine)
    around = [r for r in told if r.id in last.enclosing]
    places = {r.place for r in told if r.arrived}
    if any(not r.outcome.ok for r in around) and places <= {last.place, *(r.place for r in around)}:
        return last, False
    return None, len(places) > 1


def _place(record: Record, records: Iterable[Record]) -> str:
    """Name where a rank arrived: its scope, and the stage where that is what tells ranks apart."""
    stages = {each.stage for each in records}
    return record.scope if len(stages) == 1 else f"{record.scope} ({record.stage})"


def agree(lists: Iterable[tuple[tuple[str, str], ...]]) -> tuple[str, ...]:
    """
    Return the names that all *lists* share, with equal fingerprints.

    Empty if the lists have the shared names in different orders: no order
    would be right for all ranks.
    """
    lists = list(lists)
    shared = set.intersection(*map(set, lists)) if lists else set()
    orders = {tuple(name for name, mark in each if (name, mark) in shared) for each in lists}
    return orders.pop() if len(orders) == 1 else ()


def type_name(exc: BaseException) -> str:
    """Name the class of *exc* as a traceback does."""
    cls = type(exc)
    module = "" if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}."
    return f"{module}{cls.__qualname__}"


def message_of(exc: BaseException) -> str:
    """Return ``str(exc)``, or why there is none."""
    try:
        return str(exc)
    except BaseException as broken:
        return f"<its str() raised {type_name(broken)}>"


def one_line(kind: str, message: str) -> str:
    """Return ``kind: message`` on one line of readable length."""
    text = " ".join(message.split())
    return shorten(f"{kind}: {text}" if text else kind, 200)


def shorten(text: str, limit: int) -> str:
    """Cut the middle out of a *text* of more than *limit* characters, and say so."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... ({len(text)} characters in all) ... {text[-half:]}"


def _pairs(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple((str(name), str(mark)) for name, mark in value)


def _ids(value: Any) -> tuple[tuple[int, str], ...]:
    return tuple((int(sequence), str(name)) for sequence, name in value)
