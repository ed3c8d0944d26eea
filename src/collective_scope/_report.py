"""
Facts in, text out: messages about several ranks, in errors and in the log.

The first line of a message holds the fact and survives truncation; details
follow, indented. Guesses are in sentences that say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .agreement.locate import ANSWER_S
from .agreement.records import AFTER_REVOCATION, Outcome
from .agreement.rounds import failures_in_order, is_around
from .agreement.text import one_line


if TYPE_CHECKING:
    from .agreement.process import Place
    from .agreement.records import Verdict

MOST_RANKS = 16
"""Ranks that one line names; the rest are counted."""

MISSING_ADVICE = (
    "A missing rank is still in its body or a cleanup, is blocked in a collective that a rank which has arrived may\n"
    "  have skipped, or never came to this scope. Look first at a failure that is named above, then at its own log."
)
UNLIMITED_ADVICE = (
    "If all are stuck, the group's own time limit ends this, or kill_after, which this scope does not have."
)
LOST_ADVICE = (
    "A process that ends without an exception has often said why on its own stderr: gloo aborts it, for example, if\n"
    "  the shapes of two ranks differ. faulthandler.enable() shows the line."
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
"""Errors of a rank whose peer has failed or is gone, in the words of gloo, NCCL, UCX, MPI and this library."""


def peers_failed(verdict: Verdict) -> str:
    """Describe failures for the ranks that had none."""
    ordered = failures_in_order(verdict.outcomes)
    first, outcome = ordered[0]
    who = _ranks(verdict, sorted(verdict.failures))
    which = f", rank {first} first" if len(ordered) > 1 else ""
    what = _told(outcome)
    places = {verdict.outside.get(rank) for rank in verdict.failures}
    where = f"scope {verdict.scope!r}"
    if verdict.outside:
        around = f"scope {name!r} around it" if (name := verdict.outside.get(first)) else "one around it"
        where = f"scope {verdict.outside[first]!r}, around {where}" if len(places) == 1 else f"{where} or {around}"
    are_skips = all(each.is_skip for _, each in ordered)
    verb = "skipped and its peers did not, in" if are_skips and len(ordered) < verdict.world_size else "failed in"
    head = f"{who} of {verdict.world_size} {verb} {where}{which}: {what}"
    lines = [head, *outcome_lines(verdict)]
    if verdict.reason:
        lines.append(f"  The wait ended early: {verdict.reason}.")
    lines += _not_run(verdict)
    if outcome.traceback and not are_skips:
        lines.append(f"  rank {first}, {outcome.phase}:")
        lines += [f"    {line}" for line in outcome.traceback.rstrip().splitlines()]
    return "\n".join(lines)


def missing(verdict: Verdict) -> str:
    """Say which ranks did not come to the barrier, and where they are."""
    # An entry that is refused at once has waited for nobody, and an earlier refusal has said where the ranks are.
    is_refused_again = verdict.stage.startswith("entry") and not verdict.timeout and not verdict.reason
    still = "still " * is_refused_again
    who = "no agreement"
    if verdict.missing:
        who = f"{_ranks(verdict, verdict.missing)} of {verdict.world_size} {still}missing"
    failures = failures_in_order(verdict.outcomes)
    cause = f"; before that, rank {failures[0][0]} failed: {_told(failures[0][1])}" if failures else ""
    since = f" after {verdict.timeout:.1f} s" if verdict.timeout else ""
    head = f"{who}{_at(verdict)}{since}{cause}"
    lines = [head]
    if not is_refused_again:
        lines += [*outcome_lines(verdict), *_places(verdict, verdict.missing, "missing:")]
        lines.append(f"  {verdict.reason[0].upper()}{verdict.reason[1:]}." if verdict.reason else f"  {MISSING_ADVICE}")
    lines += [f"{line} Not every rank has left the scope before it." for line in _not_run(verdict)]
    return "\n".join(lines)


def lost(verdict: Verdict) -> str:
    """Say which ranks are gone."""
    head = f"{_ranks(verdict, verdict.lost)} of {verdict.world_size} lost{_at(verdict)} after {verdict.timeout:.1f} s"
    lines = [head, *outcome_lines(verdict), *_places(verdict, verdict.lost, "lost:   ")]
    lines += _places(verdict, verdict.missing, "missing:")
    if verdict.reason:
        lines.append(f"  {verdict.reason[0].upper()}{verdict.reason[1:]}.")
    elif not verdict.failures and any(verdict.where[rank].has_ended for rank in verdict.lost if rank in verdict.where):
        lines.append(f"  {LOST_ADVICE}")
    return "\n".join([*lines, *_not_run(verdict)])


def scopes_differ(verdict: Verdict) -> str:
    """Describe ranks that arrived at different scopes."""
    lines = ["ranks arrived at different scopes", *scope_lines(verdict), *_not_run(verdict), f"  {MISMATCH_ADVICE}"]
    return "\n".join(lines)


def scope_lines(verdict: Verdict) -> list[str]:
    """List the scopes at which the ranks are, if they are at different ones."""
    return _grouped({rank: f"scope {name!r}" for rank, name in verdict.names.items()})


def cleanups_differ(verdict: Verdict) -> str:
    """Describe ranks that have different collective cleanups left."""
    head = f"ranks disagree on the collective cleanups of scope {verdict.scope!r}"
    ran = f"what all share ran: {', '.join(verdict.agreed)}" if verdict.agreed else "none of them ran"
    lists = {
        rank: ", ".join(f"{name} [{mark}]" if mark else name for name, mark in pairs) or "none"
        for rank, pairs in verdict.cleanups.items()
    }
    return "\n".join([f"{head}; {ran}", *_grouped(lists)])


def late(verdict: Verdict, rank: int, left: float | None, said: dict[int, str], kill_after: float | None = None) -> str:
    """
    Say, while there is still time, which ranks are late, and where they are.

    Args:
        verdict: The facts so far.
        rank: The rank that speaks.
        left: For how many seconds it waits for them yet; None if no rank has come to the barrier.
        kill_after: When the process of a rank that is still in the scope is ended, in seconds from its entry, if at all.
        said: What was said of each rank before; updated. A rank that is where it was gets a few words.
    """
    ranks = sorted({*verdict.missing, rank}) if left is None else list(verdict.missing)
    since = verdict.timeout
    if left is None:
        head = f"no rank of {verdict.world_size} has come to the exit of scope {verdict.scope!r} for {since:.1f} s"
    else:
        who = f"{_ranks(verdict, ranks)} of {verdict.world_size}" if ranks else "nobody"
        is_news = any(rank not in said for rank in ranks)
        still = "" if is_news else "still "
        head = f"rank {rank} has waited {since:.1f} of {since + left:.1f} s{_at(verdict)}; {who} {still}missing"
    texts = {each: _key(verdict.where[each]) for each in ranks if each in verdict.where}
    same = {each for each, text in texts.items() if said.get(each) == text}
    said |= dict.fromkeys(ranks, "") | texts
    lines = [head]
    if not same:
        lines += outcome_lines(verdict)
    lines += _places(verdict, [each for each in ranks if each not in same], "where:  " if left is None else "missing:")
    if same:
        lines.append(f"  {_ranks(verdict, sorted(same))}: still where {'it was' if len(same) == 1 else 'they were'}")
    if left is None and not same:
        limit = UNLIMITED_ADVICE if kill_after is None else f"kill_after ends this {kill_after:.1f} s after the entry."
        lines.append(f"  {limit}")
        if _are_apart(rank, verdict.where):
            lines.append(f"  The ranks are in different scopes. {MISMATCH_ADVICE}")
    return "\n".join(lines)


def _are_apart(rank: int, where: Mapping[int, Place]) -> bool:
    """Whether a rank is in a scope that is neither that of *rank*, nor around it, nor within it."""
    mine = where[rank].scope if rank in where else ""
    others = {place.scope for place in where.values()} - {mine, ""}
    return bool(mine) and any(not is_around(mine, each) and not is_around(each, mine) for each in others)


def gone(verdict: Verdict, rank: int) -> str:
    """Say, to a rank that is in its body, which of its peers are gone."""
    who = _ranks(verdict, verdict.lost)
    place = f"in scope {verdict.scope!r} for {verdict.timeout:.1f} s"
    head = f"{who} of {verdict.world_size} lost while rank {rank} has been {place}"
    return "\n".join([head, *_places(verdict, verdict.lost, "lost:   ")])


def out_of_patience(scope: str, seconds: float, places: Mapping[int, Place], rank: int) -> str:
    """Say where every rank is when a scope should have been left."""
    lines = [f"scope {scope!r} was not left within kill_after={seconds:.1f} s; this process is ended now"]
    for each, place in sorted(places.items()):
        this = " (this one)" if each == rank else ""
        lines.append(f"  rank {each}{this}: {_place(place)}")
        lines += [f"      {line}" for line in place.frames.splitlines()]
    return "\n".join(lines)


def _told(outcome: Outcome) -> str:
    return one_line(outcome.type_name, outcome.message)


def _at(verdict: Verdict) -> str:
    return f" at the {verdict.stage.split()[0]} of scope {verdict.scope!r}"


def _not_run(verdict: Verdict) -> list[str]:
    return ["  The body of this scope was not run."] if verdict.stage.startswith("entry") else []


def _ranks(verdict: Verdict, ranks: Iterable[int]) -> str:
    names = [
        f"{rank} (global rank {verdict.global_ranks[rank]})" if verdict.global_ranks else str(rank) for rank in ranks
    ]
    if len(names) == 1:
        return f"rank {names[0]}"
    if len(names) > MOST_RANKS:
        return f"ranks {', '.join(names[:MOST_RANKS])} and {len(names) - MOST_RANKS} more"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def numbers(ranks: Iterable[int]) -> str:
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


def outcome_lines(verdict: Verdict) -> list[str]:
    """List what arrived ranks say of themselves, the failure published first at the top."""
    failures = failures_in_order(verdict.outcomes)
    # Of a rank that is gone, even the first failure is likely a consequence.
    later = {rank for rank, _ in (failures if verdict.lost else failures[1:])}
    ordered = failures + [(rank, outcome) for rank, outcome in sorted(verdict.outcomes.items()) if outcome.ok]
    told: dict[int, str] = {}
    for rank, outcome in ordered:
        told[rank] = str(outcome)
        if rank in later and is_like_a_consequence(outcome):
            told[rank] += "; likely a consequence"
        if outcome.also:
            told[rank] += f"; then {'; '.join(outcome.also)}"
    arrived = {rank: text for rank, text in told.items() if rank in verdict.arrived}
    failed = {rank: told[rank] for rank, _ in failures if rank not in verdict.arrived}
    return _grouped(arrived, "arrived:") + _grouped(failed, "told:   ")


def is_like_a_consequence(outcome: Outcome) -> bool:
    """Whether a failure reads like one that another rank's has caused."""
    # The assertion of a test is about itself, also where it speaks of timeouts.
    words = _CONSEQUENCE.search(f"{outcome.type_name}: {outcome.message}")
    if outcome.phase.endswith(AFTER_REVOCATION):
        return True
    return words is not None and outcome.type_name != "AssertionError"


def _places(verdict: Verdict, ranks: Iterable[int], title: str) -> list[str]:
    ranks = list(ranks)
    lines: list[str] = []
    nowhere = [rank for rank in ranks if rank not in verdict.where]
    if nowhere:
        lines.append(f"  {title}  {numbers(nowhere)}")
    for rank in ranks[:MOST_RANKS]:
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
        since = f" for {place.seconds:.1f} s" if place.seconds else ""
        return f"{place.process}, {place.phase}{since}{state}"
    if state and place.silence < ANSWER_S:  # of this machine, and asked a moment ago, or not at all
        return f"{place.process}{state}"
    held = "; its interpreter is held by native code, or the machine cannot be reached"
    return f"{place.process}, no answer for {place.silence:.1f} s{state}{held * (place.state != 'stopped')}"


def _key(place: Place) -> str:
    """Return what is the same as long as a rank does not move."""
    state = "" if place.state in ("running", "sleeping") else place.state  # one that polls does both in turn
    return f"{state} {place.phase} {place.frames}"


def _grouped(texts: Mapping[int, str], title: str = "ranks:  ") -> list[str]:
    """Write a line per text, with all the ranks that share it."""
    groups: dict[str, list[int]] = {}
    for rank, text in texts.items():
        groups.setdefault(text, []).append(rank)
    lines = [f"{numbers(sorted(ranks))} ({text})" for text, ranks in groups.items()]
    return [f"  {title if not number else ' ' * len(title)}  {line}" for number, line in enumerate(lines)]
