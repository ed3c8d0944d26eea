"""A verdict as text in the store, of bounded length."""

from __future__ import annotations

import attrs

from .process import Place, Process
from .records import OK, Outcome, Record, Verdict, dump, load
from .rounds import all_ok
from .text import MESSAGE_LIMIT, TRACEBACK_LIMIT, shorten


ALL_OK = b"ok"
"""The verdict of a round of which nobody has anything to tell."""

VERDICT_LIMIT = 4 * 2**20
"""Bytes of a verdict. A TCPStore refuses values over 8 MiB."""


def encode_verdict(verdict: Verdict) -> bytes:
    """Write *verdict* for the store, in at most `VERDICT_LIMIT` bytes: the longer it is, the shorter what is in it."""
    for limit in (MESSAGE_LIMIT + TRACEBACK_LIMIT, 8_192, 1_024, 64, 0):
        outcomes = {rank: o if o.ok else _shorten_outcome(o, limit) for rank, o in verdict.outcomes.items()}
        where = {rank: place for rank, place in verdict.where.items() if limit >= 64 * len(verdict.where) // 16}
        cleanups = {
            rank: tuple((name, shorten(shown, limit)) for name, shown in each)
            for rank, each in verdict.cleanups.items()
        }
        short = attrs.evolve(verdict, outcomes={}, where=where, cleanups=cleanups)
        fields = attrs.asdict(short)
        # Most ranks are well, and there may be many.
        fields["outcomes"] = {rank: 0 if outcome.ok else attrs.astuple(outcome) for rank, outcome in outcomes.items()}
        text = dump(fields)
        if len(text) <= VERDICT_LIMIT:
            break
    return text


def _shorten_outcome(outcome: Outcome, limit: int) -> Outcome:
    return attrs.evolve(
        outcome,
        message=shorten(outcome.message, limit),
        traceback=shorten(outcome.traceback, limit),
        also=[shorten(line, limit) for line in outcome.also[: limit // 64]],
    )


def decode_verdict(text: bytes, record: Record, world_size: int) -> Verdict:
    """Read what `encode_verdict` wrote, or `ALL_OK`, for the rank that came to the round with *record*."""
    if text == ALL_OK:
        return all_ok(record, world_size)
    fields = load(text)
    # JSON has neither integer keys nor tuples.
    for name in ("arrived", "missing", "lost", "agreed", "global_ranks"):
        fields[name] = tuple(fields[name])
    for name in ("names", "outside"):
        fields[name] = {int(rank): text for rank, text in fields[name].items()}
    fields["outcomes"] = {int(rank): Outcome(*o) if o else OK for rank, o in fields["outcomes"].items()}
    fields["where"] = {
        int(rank): Place(**{**place, "process": Process(**place["process"])}) for rank, place in fields["where"].items()
    }
    fields["cleanups"] = {int(rank): tuple(map(tuple, each)) for rank, each in fields["cleanups"].items()}
    return Verdict(**fields)
