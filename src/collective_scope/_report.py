"""
Facts in, text out: every sentence a user reads.

The first line of a message holds the fact and survives truncation; details
follow, indented. Guesses are in sentences that say so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ._outcome import Outcome, message_of, one_line, type_name


if TYPE_CHECKING:
    from ._outcome import Verdict
    from ._process import Place

MOST_RANKS = 16
"""Ranks that one line names; the rest are counted."""

MISSING_ADVICE = (
    "A missing rank is still in its body or a cleanup, is blocked in a collective, or never came to this scope.\n"
    "  Look first at the earliest failure above, then at that rank's own log."
)
MISMATCH_ADVICE = (
    "All ranks of a group must go through the same scopes in the same order. Usual causes: a scope under a\n"
    "  condition that differs between ranks, a loop that is shorter on one rank, an error caught on one rank only."
)

_CONSEQUENCE = re.compile(
    r"connection (was |is |likely )*(closed|reset|refused|aborted)|broken pipe|timed? ?out|revoked"
    r"|closed by (peer|remote)|remote (process|peer|error)|abort(ed|ing)|Peer(Failed|Lost)Error",
    re.IGNORECASE,
)
"""What a rank raises because another has failed or is gone, in the words of gloo, NCCL, UCX, MPI and this library."""

NO_STORE = "The group has a barrier but no store, so any of the ranks named may have been there."


def peers_failed(verdict: Verdict) -> str:
    """Describe failures for the ranks that had none."""
    ordered = _by_order(verdict.failures)
    first, outcome = ordered[0]
    who = _ranks(verdict, sorted(verdict.failures))
    which = f", rank {first} first" if len(ordered) > 1 else ""
    what = one_line(outcome.type_name, outcome.message)
    places = {verdict.outside.get(rank) for rank in verdict.failures}
    where = f"scope {verdict.scope!r}"
    if verdict.outside:
        around = f"scope {name!r} around it" if (name := verdict.outside.get(first)) else "one around it"
        where = f"scope {verdict.outside[first]!r}, around {where}" if len(places) == 1 else f"{where} or {around}"
    head = f"{who} of {verdict.world_size} failed in {where}{which}: {what}"
    lines = [head, *_outcomes(verdict)]
    if verdict.reason:
        lines.append(f"  {verdict.reason}")
    if verdict.stage == "entry":
        lines.append("  The body of this scope was not run.")
    lines.append(f"  rank {first}, {outcome.phase}:")
    lines += [f"    {line}" for line in outcome.traceback.rstrip().splitlines()]
    return "\n".join(lines)


def missing(verdict: Verdict) -> str:
    """Describe who did not come to the barrier, and where they are."""
    who = f"{_ranks(verdict, verdict.missing)} of {verdict.world_size} missing" if verdict.missing else "no agreement"
    head = f"{who}{_at(verdict)} after {verdict.timeout:.1f} s"
    lines = [head, *_outcomes(verdict), *_places(verdict, verdict.missing, "missing:")]
    lines.append(f"  {verdict.reason or MISSING_ADVICE}")
    if verdict.stage == "entry":
        lines.append("  The body of this scope was not run: not every rank has left the scope before it.")
    return "\n".join(lines)


def lost(verdict: Verdict) -> str:
    """Describe who is gone."""
    who = _ranks(verdict, verdict.lost)
    lines = [f"{who} of {verdict.world_size} lost{_at(verdict)} after {verdict.timeout:.1f} s", *_outcomes(verdict)]
    lines += _places(verdict, verdict.lost, "lost:   ")
    if verdict.missing:
        lines.append(f"  missing:  {_numbers(verdict.missing)}")
    if verdict.reason:
        lines.append(f"  {verdict.reason}")
    if verdict.stage == "entry":
        lines.append("  The body of this scope was not run.")
    return "\n".join(lines)


def stacks(rank: int, place: Place) -> str:
    """Show, in the log, all that a rank says of its threads."""
    return f"rank {rank} ({place.process}) is {place.phase} for {place.seconds:.1f} s; its stacks:\n{place.stacks}"


def deadline(scope: str, seconds: float, here: Place, places: Mapping[int, Place]) -> str:
    """Say where everybody is when a scope should have been left."""
    lines = [f"scope {scope!r} was not left within its deadline of {seconds:.1f} s; this rank: {_place(here)}"]
    lines += [f"  rank {rank}: {_place(place)}" for rank, place in sorted(places.items())]
    return "\n".join(lines)


def scopes_differ(verdict: Verdict) -> str:
    """Describe ranks that arrived at different scopes."""
    lines = ["ranks arrived at different scopes"]  # one of which is the verdict's, on all ranks: that of who decided
    lines += _grouped(
        {rank: f"scope {name!r}, sequence {sequence}" for rank, (name, sequence) in verdict.names.items()}
    )
    return "\n".join([*lines, f"  {MISMATCH_ADVICE}"])


def cleanups_differ(verdict: Verdict) -> str:
    """Describe ranks that have different collective cleanups left."""
    head = f"ranks disagree on the collective cleanups of scope {verdict.scope!r}"
    ran = f"what all share ran: {', '.join(verdict.agreed)}" if verdict.agreed else "none of them ran"
    lines = [f"{head}; {ran}"]
    lists = {
        rank: ", ".join(f"{name} [{mark}]" if mark else name for name, mark in pairs) or "none"
        for rank, pairs in verdict.cleanups.items()
    }
    return "\n".join([*lines, *_grouped(lists)])


def failed_here(rank: int, world_size: int, scope: str, phase: str) -> str:
    """Introduce the traceback in the log of the rank that failed."""
    told = (
        "after the barrier, so its peers are not told"
        if phase.startswith("after_barrier")
        else "its peers are told now"
    )
    return f"rank {rank} of {world_size} failed in scope {scope!r}, {phase}; {told}"


def attached(exc: BaseException, phase: str, *, in_full: bool = True) -> str:
    """Mention a later error on the one that is raised."""
    kind, message = type_name(exc), message_of(exc)
    return f"In addition, {phase}: {f'{kind}: {message}' if in_full else one_line(kind, message)}"


def skipped(cleanups: Iterable[object]) -> str:
    """Mention collective cleanups that nobody may run alone."""
    return "Not run, because the ranks could not agree to run it together: " + ", ".join(map(str, cleanups))


def not_entered(scope: str) -> str:
    """Say that a scope was refused because one around it is over."""
    return f"The body of scope {scope!r} was not run."


def stopped_waiting(rank: int, exc: BaseException) -> str:
    """Say why a round ended before all had arrived."""
    return f"rank {rank} stopped waiting at the barrier: {one_line(type_name(exc), message_of(exc))}"


def store_trouble(server: int | None, silence: float, error: Exception | None) -> str:
    """Say that the store cannot be reached, and which rank hosted it, if one did."""
    host = f"hosted by rank {server}" if server is not None else "hosted outside of the group"
    if error is None:
        return (
            f"The group's store ({host}) has not answered for {silence:.1f} s: its process is stopped, slow, or cut off.\n"
            "  Nothing is known of the other ranks."
        )
    return f"The group's store ({host}) is gone: {one_line(type_name(error), message_of(error))}"


def waiting(verdict: Verdict, rank: int, waited: float) -> str:
    """Say, while there is still time, who is not here yet."""
    who = _ranks(verdict, verdict.missing) if verdict.missing else "nobody"
    head = f"rank {rank} has waited {waited:.1f} s{_at(verdict)}; {who} of {verdict.world_size} missing"
    return "\n".join([head, *_outcomes(verdict), *_places(verdict, verdict.missing, "missing:")])


def waiting_blindly(scope: str, rank: int, waited: float, why: str) -> str:
    """Say that nobody tells who is not here yet."""
    return f"rank {rank} has waited {waited:.1f} s in scope {scope!r}; {why}, so nobody can be named"


def _at(verdict: Verdict) -> str:
    place = verdict.stage.split()[0]
    return f" at the {place} of scope {verdict.scope!r}"


def _ranks(verdict: Verdict, ranks: Iterable[int]) -> str:
    names = [
        f"{rank} (global rank {verdict.global_ranks[rank]})" if verdict.global_ranks else str(rank) for rank in ranks
    ]
    if len(names) == 1:
        return f"rank {names[0]}"
    if len(names) > MOST_RANKS:
        return f"ranks {', '.join(names[:MOST_RANKS])} and {len(names) - MOST_RANKS} more"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def _numbers(ranks: Iterable[int]) -> str:
    """Write sorted ranks with runs folded: ``0, 2-5, 9``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if run[2:] else ", ".join(map(str, run)) for run in runs]
    more = [f"and {len(texts) - MOST_RANKS} more"] if len(texts) > MOST_RANKS else []
    return ", ".join(texts[:MOST_RANKS] + more)


def _outcomes(verdict: Verdict) -> list[str]:
    """List what arrived ranks say of themselves, the failure published first at the top."""
    failures = _by_order(verdict.failures)
    # Of a rank that is gone, even the first failure is likely a consequence.
    later = [rank for rank, _ in (failures if verdict.lost else failures[1:])]
    told: dict[int, str] = {}
    for rank, outcome in _by_order(verdict.outcomes):
        told[rank] = str(outcome)
        if rank in later and _is_like_a_consequence(outcome):
            told[rank] += "; likely a consequence"
        if outcome.also:
            told[rank] += f"; then {'; '.join(outcome.also)}"
    arrived = {rank: text for rank, text in told.items() if rank not in verdict.missing}
    failed = {rank: told[rank] for rank, _ in failures if rank in verdict.missing}
    return _grouped(arrived, "arrived:") + _grouped(failed, "told:   ")


def _is_like_a_consequence(outcome: Outcome) -> bool:
    # What a test asserts is about itself, also where it speaks of timeouts.
    words = _CONSEQUENCE.search(f"{outcome.type_name}: {outcome.message}")
    return words is not None and outcome.type_name != "AssertionError"


def _places(verdict: Verdict, ranks: Iterable[int], title: str) -> list[str]:
    lines: list[str] = []
    nowhere = [rank for rank in ranks if rank not in verdict.where]
    if nowhere:
        lines.append(f"  {title}  {_numbers(nowhere)}")
    for rank in list(ranks)[:MOST_RANKS]:
        if rank in verdict.where:
            place = verdict.where[rank]
            lead = title if not lines else " " * len(title)
            lines.append(f"  {lead}  {rank}  {_place(place)}")
            lines += [f"              {line}" for line in place.frames.splitlines()]
    return lines


def _place(place: Place) -> str:
    if place.has_ended:
        return f"{place.process}, {place.state}"
    state = f" ({place.state})" if place.state else ""
    if place.phase:
        return f"{place.process}, {place.phase} for {place.seconds:.1f} s{state}"
    why = (
        "" if place.state == "stopped" else "; its interpreter is held by native code, or the machine cannot be reached"
    )
    return f"{place.process}, no answer for {place.silence:.1f} s{state}{why}"


def _grouped(texts: Mapping[int, str], title: str = "ranks:  ") -> list[str]:
    """Write a line per text, with all the ranks that share it."""
    groups: dict[str, list[int]] = {}
    for rank, text in texts.items():
        groups.setdefault(text, []).append(rank)
    lines = [f"{_numbers(sorted(ranks))} ({text})" for text, ranks in groups.items()]
    return [f"  {title if not number else ' ' * len(title)}  {line}" for number, line in enumerate(lines)]


def _by_order(outcomes: Mapping[int, Outcome]) -> list[tuple[int, Outcome]]:
    return sorted(outcomes.items(), key=lambda item: (item[1].order or math.inf, item[0]))
