"""Where the ranks of a group are: ask them, and read what they or the system say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import attrs

from .clock import monotonic, sleep
from .part import POLL_S, Part
from .process import NOBODY, Place


if TYPE_CHECKING:
    from torch.distributed import Store

ANSWER_S = 0.5
"""How long a rank that is asked where it is has to answer: one that has not done so by then will not."""


@attrs.define(eq=False)
class Locator:
    """
    What one rank knows of where the others are. Belongs to the control thread.

    Args:
        part: The rank's part in the rounds of its group.

    Attributes:
        asked_at: When the ranks were last asked, on the monotonic clock; 0 if they were not.
    """

    part: Part
    asked_at: float = attrs.field(default=0.0, init=False)
    _number: int = attrs.field(default=0, init=False)

    def forget(self) -> None:
        """Take earlier answers for old."""
        self.asked_at, self._number = 0.0, 0

    def ask(self, store: Store, now: float, round_: str) -> None:
        """Ask all ranks that are not in *round_*, unless that has been done a moment ago."""
        if now <= self.asked_at + 2 * ANSWER_S + POLL_S:
            return
        number, heard_at, but = self.part.asked
        if but == round_ and now < heard_at + ANSWER_S / 2:  # another rank has just asked the same
            self._number, self.asked_at = number, heard_at
        else:
            self._number, self.asked_at = self.part.announce(store, f"asked {self.part.life} {round_}"), now

    def has_time(self, now: float, calm_at: float = 0.0) -> bool:
        """Whether an answer may still come: until *calm_at* at least, if this process has stood still meanwhile."""
        return now < max(self.asked_at + ANSWER_S, calm_at)

    def have_answered(self, store: Store, ranks: list[int]) -> bool:
        """Read the records of *ranks*; return whether all that can answer have."""
        self.part.read(store, ranks)
        known = [self.part.records[rank] for rank in ranks if rank in self.part.records]
        return all(record.answered >= self._number or record.last_word for record in known)

    def answer_of(self, rank: int) -> Place | None:
        """Return where *rank* said that it is, when it was last asked."""
        record = self.part.records.get(rank)
        return record.place if record is not None and record.answered >= self._number > 0 else None

    def where(self, now: float, ranks: Iterable[int]) -> dict[int, Place]:
        """Return where *ranks* are, by their own account or, failing that, by the system's."""
        places = {}
        for rank in ranks:
            record = self.part.records.get(rank)
            if record is None or record.process == NOBODY:
                continue
            state, answer = record.process.state(), self.answer_of(rank)
            if record.last_word:  # after that, it has answered nothing
                places[rank] = Place(record.process, state, phase=record.last_word)
            elif answer is not None:
                seconds = answer.seconds and answer.seconds + now - self.asked_at
                places[rank] = attrs.evolve(answer, state=state, seconds=seconds)
            else:
                places[rank] = Place(record.process, state, silence=now - (self.asked_at or now))
        return places

    def survey(self, store: Store, ranks: list[int], meanwhile: Callable[[], object]) -> dict[int, Place]:
        """Ask *ranks*, whatever they do, and return where they are a moment later; they may be asking, too."""
        self.forget()
        self.ask(store, monotonic(), "")
        while self.has_time(monotonic()) and not self.have_answered(store, ranks):
            meanwhile()
            sleep(POLL_S / 2)
        return self.where(monotonic(), ranks)
