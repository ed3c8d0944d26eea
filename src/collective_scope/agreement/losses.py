"""The ranks of a group that are gone: their processes have ended, or another machine has been silent for long."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from .life import ROOT
from .part import Part
from .process import NOBODY, Process, me
from .store_thread import peek


if TYPE_CHECKING:
    from torch.distributed import Store

BEATS_S = 3.0
"""How long a rank waits before it looks at the heartbeats of other machines."""

LOOK_S = 0.2
"""Seconds that count at most as silence between two looks at a heartbeat: if there are more, the store has been silent."""


def find_lost(part: Part, store: Store, now: float, awaited: Collection[int], silence: float) -> set[int]:
    """
    Return the ranks that are gone, and tell the peers of those that nobody has told of. On the control thread.

    Args:
        part: This rank's part in the rounds of its group.
        store: The root of the store.
        now: The time, on the monotonic clock.
        awaited: Ranks that this one waits for, and whose silence says something.
        silence: Seconds without a heartbeat after which a rank on another machine counts as lost.
    """
    known = part.lost
    for rank, record in list(part.records.items()):
        process = record.process
        if rank in known:
            if not process.has_ended if process.is_here else _has_beaten(part, store, now, rank, process):
                known.discard(rank)  # it was cut off, or the rank that told of it, and is back
            continue
        if rank == part.rank or process in (NOBODY, me()) or (record.last_word and not process.is_here):
            continue
        if process.is_here:
            is_gone = process.has_ended
        else:
            is_quiet = rank in awaited and not _has_beaten(part, store, now, rank, process)
            is_gone = is_quiet and part.beats[rank][1] > silence
        if is_gone:
            known.add(rank)
            part.announce(store, f"lost {part.life} {rank}")
    return set(known)


def _has_beaten(part: Part, store: Store, now: float, rank: int, process: Process) -> bool:
    """Whether there is another heartbeat than at the look before; if not, note for how long."""
    beat = peek(store, f"{ROOT}/beat/{process.key}")
    before, silence, looked_at = part.beats.get(rank, (beat, 0.0, now))
    has_beaten = beat != before
    part.beats[rank] = (beat, 0.0 if has_beaten else silence + min(now - looked_at, LOOK_S), now)
    return has_beaten
