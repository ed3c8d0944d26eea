"""
Paths of scopes, the count of a round, and the verdict: pure functions, without a store.

A scope has a path, such as ``0 outer/2 inner``: its name, after the number of scopes that this rank
had entered before it in the same scope around it. The number is kept by the scope around, so a rank
that leaves that early has nothing to correct. A round is a stage of a scope: ``0 outer/exit``.

A scope that was entered before its group was there is found at its exit only. Its path begins with
``^``. It is around all others of the group that are entered before that exit; those entered after it
have the number of such scopes before their own: ``1.0 next``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import attrs

from .process import Place
from .records import OK, Listed, Outcome, Record, Verdict, all_well, everyone


_INTERRUPT = "RevokedInterrupt"

_HUNG_UP = re.compile(r"connection (was )?(closed|reset) by|broken pipe", re.IGNORECASE)
"""The words of an error that a rank has because its peer has closed the connection."""

ARRIVED = 1
"""A rank adds this to the count of a round when it arrives."""

REPORT = 1 << 21
"""It adds this, too, if it has something to tell."""

REVOKED = 1 << 42
"""A rank that revokes the group adds this, once a round, if no peer has told it to. 64 bits are enough for two million ranks."""

FIRST_EXIT = 1
"""The place before the first exit barrier, in the order of stages; what is greater is an exit."""

NAME_LIMIT = 200
"""Characters of a name that travel."""


def has_all(count: int, world_size: int) -> bool:
    """Whether *count* is that of a round to which all have come."""
    return count % REPORT == world_size


def is_revoked(count: int) -> bool:
    """Whether a rank has revoked the group."""
    return count >= REVOKED


def is_uneventful(count: int) -> bool:
    """Whether no rank that is in *count* had anything to tell."""
    return count < REPORT


def path_of(parent: str, number: int, name: str, late: int = 0) -> str:
    """
    Return the path of a scope.

    Args:
        parent: Path of the scope around it; empty if there is none.
        number: How many scopes this rank has entered there before.
        name: Its name.
        late: How many scopes, among those that are in no other, have found the group at their exit before.
    """
    # Characters that a key cannot hold, or that separate scopes, are written as in a Python literal.
    if "/" in name or "\\" in name or not name.isprintable():
        name = name.encode("unicode_escape").decode().replace("/", "\\x2f")
    if parent:
        return f"{parent}/{number} {name}"
    return f"{late}.{number} {name}" if late else f"{number} {name}"


def late_path(number: int, name: str) -> str:
    """Return the path of a scope that found its group at its exit, as the *number*-th that did, counted from 0."""
    return f"^{path_of('', number, name)}"


def cap(name: str) -> str:
    """Shorten a name of more than `NAME_LIMIT` characters; two that differ still do."""
    if len(name) <= NAME_LIMIT:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[: NAME_LIMIT // 2]}...{digest}...{name[-NAME_LIMIT // 4 :]}"


def name_of(path: str) -> str:
    """Return the name of the scope at *path*."""
    name = path.rpartition("/")[2].partition(" ")[2]
    return name.encode().decode("unicode_escape") if "\\" in name else name


def is_around(outer: str, inner: str) -> bool:
    """Whether the scope at path *outer* is around the one at *inner*."""
    if outer.startswith("^"):
        return not inner.startswith("^") and _number(inner) < _number(outer)
    return inner.startswith(f"{outer}/")


def scopes_around(path: str) -> list[str]:
    """Return the paths of the scopes around the one at *path*, outermost first."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


Relation = Literal["here", "behind", "within", "around", "elsewhere"]


def relation(theirs: Record, mine: Record) -> Relation:
    """
    Say where a peer is, by its latest record, seen from a rank that waits in the round of *mine*.

    Returns:
        * ``"here"``: in the same round.
        * ``"behind"``: it may still come; its record is of an earlier place.
        * ``"within"``: in a scope within this one; it will come.
        * ``"around"``: in a scope around this one. It will come only if it has not arrived or failed there.
        * ``"elsewhere"``: it has gone past this place, or is at another one instead.
    """
    if theirs.scope == mine.scope:
        here, there = _order(mine.stage), _order(theirs.stage)
        return "here" if there == here else "behind" if there < here else "elsewhere"
    if not theirs.scope:
        return "behind"
    if is_around(theirs.scope, mine.scope):
        return "around" if _order(theirs.stage) > FIRST_EXIT or not theirs.outcome.ok else "behind"
    if is_around(mine.scope, theirs.scope):
        return "within" if _order(mine.stage) > FIRST_EXIT else "elsewhere"
    pairs = zip(theirs.scope.split("/"), mine.scope.split("/"), strict=False)
    theirs_at, mine_at = next((_number(there), _number(here)) for there, here in pairs if there != here)
    return "behind" if theirs_at < mine_at else "elsewhere"


def ends_early(theirs: Record, mine: Record) -> bool:
    """Whether a peer's record shows that it will not come to the round of *mine*."""
    where = relation(theirs, mine)
    return where == "elsewhere" or (where == "around" and (theirs.arrived or not theirs.outcome.ok))


def judge(
    records: Mapping[int, Record],
    mine: Record,
    world_size: int,
    *,
    all_arrived: bool = False,
    lost: Iterable[int] = (),
    where: Mapping[int, Place] | None = None,
    timeout: float = 0.0,
    reason: str = "",
    revoked: bool = False,
) -> Verdict:
    """
    Derive the verdict of the round of *mine* from what the ranks told.

    Args:
        records: The latest record of each rank that told anything.
        mine: The record of the rank that judges.
        world_size: Number of ranks.
        all_arrived: Whether the count says that all have arrived. Then those that told nothing are well.
        lost: Ranks that are known to be gone.
        where: Where ranks are that have not arrived.
        timeout: Seconds that the rank that judges has waited.
        reason: Why the wait ends, if not because of what the records show.
        revoked: Whether the group has been revoked. Then no collective cleanup is agreed on.
    """
    ranks = everyone(world_size)
    here = {rank: r for rank, r in sorted(records.items()) if r.round == mine.round}
    lost = tuple(sorted(lost))
    arrived = tuple(rank for rank in ranks if all_arrived or (rank in here and here[rank].arrived))
    arrived = tuple(rank for rank in arrived if rank not in lost)
    outcomes = {rank: here[rank].outcome if rank in here else OK for rank in ranks if rank in here or all_arrived}
    outside: dict[int, str] = {}
    names: dict[int, str] = {}
    for rank, r in {} if all_arrived else sorted(records.items()):
        if ends_early(r, mine):
            if relation(r, mine) == "around" and not r.outcome.ok:
                outside[rank], outcomes[rank] = name_of(r.scope), r.outcome
            else:
                names[rank] = name_of(r.scope) if r.scope != mine.scope else f"{name_of(r.scope)} ({r.stage})"
    if names:
        names |= dict.fromkeys(arrived, name_of(mine.scope))
        if len(set(names.values())) == 1:  # at different calls of the same
            names = {rank: _spelled(records.get(rank, mine).scope or mine.scope) for rank in names}
    lists = {rank: here[rank].cleanups if rank in here else () for rank in arrived}
    differ = len({_to_compare(each) for each in lists.values()}) > 1 and not outside and not names
    return Verdict(
        scope=name_of(mine.scope),
        world_size=world_size,
        arrived=arrived,
        missing=tuple(rank for rank in ranks if rank not in arrived and rank not in lost),
        lost=lost,
        outcomes=dict(sorted(outcomes.items())),
        where={rank: place for rank, place in sorted((where or {}).items()) if rank not in arrived},
        names=dict(sorted(names.items())),
        outside=outside,
        cleanups={rank: tuple((n, s) for n, _, s in each) for rank, each in lists.items()} if differ else {},
        agreed=() if revoked else agree(lists.values()),
        timeout=timeout,
        reason=reason,
        stage=mine.stage,
        pending=any(lists.values()),
        revoked=revoked,
    )


def all_ok(mine: Record, world_size: int) -> Verdict:
    """Return the verdict of a round to which all have come with nothing to tell."""
    ranks, outcomes = everyone(world_size), all_well(world_size)
    return Verdict(name_of(mine.scope), world_size, ranks, outcomes=outcomes, stage=mine.stage)


def still_refused(earlier: Verdict, mine: Record) -> Verdict:
    """Return the verdict of an entry to which those that *earlier* lacks have not come back."""
    return attrs.evolve(earlier, scope=name_of(mine.scope), stage=mine.stage, names={}, cleanups={}, timeout=0.0)


def agree(lists: Iterable[tuple[Listed, ...]]) -> tuple[str, ...]:
    """
    Return the names that all *lists* share, with equal fingerprints.

    Empty if the lists have the shared names in different orders: no order
    would be right for all ranks.
    """
    compared = [_to_compare(each) for each in lists]
    shared = set.intersection(*map(set, compared)) if compared else set()
    orders = {tuple(name for name, digest in each if (name, digest) in shared) for each in compared}
    return orders.pop() if len(orders) == 1 else ()


def failures_in_order(outcomes: Mapping[int, Outcome]) -> list[tuple[int, Outcome]]:
    """
    Return the failures among *outcomes*, the one that was published first at the top.

    A rank may fail because of a peer before that tells of its own failure: a scope within has told it, or the
    peer has closed a connection on its way out. Such failures come last. But if all others have just run into a
    time limit, or heard of that, a rank whose body had to be interrupted has kept them waiting, and comes first.
    """
    failed = [(rank, outcome) for rank, outcome in outcomes.items() if not outcome.ok]
    is_hang = all(_is_echo(outcome) or "timed out" in outcome.message.lower() for _, outcome in failed)

    def key(item: tuple[int, Outcome]) -> tuple[bool, bool, bool, int, int]:
        rank, outcome = item
        is_first = is_hang and outcome.type_name.endswith(_INTERRUPT)
        return not is_first, _is_echo(outcome), not outcome.order, outcome.order, rank

    return sorted(failed, key=key)


def _is_echo(outcome: Outcome) -> bool:
    return outcome.type_name.endswith((_INTERRUPT, "PeerFailedError")) or _HUNG_UP.search(outcome.message) is not None


def _to_compare(listed: tuple[Listed, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((name, digest) for name, digest, _ in listed)


def _spelled(path: str) -> str:
    """Return the names on *path*, each with its number among the scopes entered there, counted from 1."""
    parts = [(name_of(part), *_number(part)) for part in path.split("/")]
    return " / ".join(name if number == math.inf else f"{name} (no. {number + 1})" for name, _, number in parts)


def _order(stage: str) -> int:
    if stage.startswith("exit"):
        return FIRST_EXIT + int(stage[5:] or 1)
    return {"entry": 0, "entry 2": 1}.get(stage, -1)


def _number(component: str) -> tuple[int, float]:
    """Return what orders scopes in the same one: a late scope comes after all that were entered before its exit."""
    if component.startswith("^"):
        return int(component[1:].partition(" ")[0]), math.inf
    late, _, number = component.partition(" ")[0].rpartition(".")
    return int(late or 0), int(number)
