"""The control thread looks for these while a scope lasts: missing, failed and lost ranks, deadlines, silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Literal, Protocol

import attrs

from .clock import monotonic, warning_times
from .locate import ANSWER_S, Locator
from .losses import BEATS_S, find_lost
from .part import Part
from .process import Place
from .records import Record, Verdict
from .revocation import Revocation
from .rounds import REPORT, REVOKED, has_all, is_around, judge, relation
from .wait import FIRST_LOOK_S, GRACE_S, Decided, Wait


if TYPE_CHECKING:
    from torch.distributed import Store

READ_AT_ONCE = 4
"""Records of other ranks that are read at each look, in turn, so that large groups do not flood the store."""

STAGGER_S = 0.002
"""How much later each rank decides than the one before it, so that not all read all records at once."""

IN_BODY = "in the body of"
"""The phase in which a rank runs its own program, and may be interrupted."""


class Desk(Protocol):
    """The control thread as a span needs it."""

    spans: dict[int, Span]
    left: str
    calm_at: float

    def place(self, span: Span | None) -> Place:
        """Say where the thread is that entered *span*."""


What = Literal["waiting", "working", "lost"]

Speak = Callable[[What, Verdict, float | None], object]
"""Given what there is to say, the facts so far, and the seconds until this rank's wait ends; None if it is at work."""


@attrs.define(eq=False)
class Span:
    """
    One scope of one rank, from entry to exit, as the control thread sees it.

    Args:
        control: What owns the thread that looks.
        part: The rank's part in the rounds of its group.
        name: Name of the scope.
        thread: Identifier of the thread that entered it.
        body: The code that entered it.
        warn_after: Seconds until this rank first speaks of ranks that are late; None if it never does.
        silence: Seconds without a heartbeat after which a rank on another machine counts as lost.
        speak: Called on the control thread when there is something to say.
        revocation: What frees the rank, if its group can be revoked.

    Attributes:
        path: Path of the scope.
        stage: The round that the rank comes to next.
        phase: Where the rank is: ``"in the body of"``, ``"at the barrier of"``, ...
        since: When it came there, on the monotonic clock.
        stirred: When it last went somewhere, be it out of a scope within this one.
        wait: Its wait at the barrier, if it does wait.
        has_failed: Whether the rank itself has failed.
        past: Ranks whose failure leaves no rank stuck: all have come to a barrier since.
        history: Phases, and what happened in them, each with the time at which it began; None if that is not kept.
        is_left: Whether the rank has left the scope, though a wait of it is still to be ended.
    """

    control: Desk
    part: Part
    name: str
    thread: int
    body: CodeType | None
    warn_after: float | None
    silence: float
    speak: Speak
    revocation: Revocation | None = None
    path: str = ""
    stage: str = "exit"
    phase: str = ""
    since: float = 0.0
    stirred: float = 0.0
    wait: Wait | None = None
    has_failed: bool = False
    past: set[int] = attrs.field(factory=set)
    history: list[tuple[float, str]] | None = None
    is_left: bool = False
    # The rest is the control thread's own.
    _matter: float = attrs.field(default=-1.0, init=False)
    """When the rank had last gone somewhere, at the latest look."""
    _has_told: bool = attrs.field(default=False, init=False)
    _locator: Locator = attrs.field(default=attrs.Factory(lambda self: Locator(self.part), takes_self=True), init=False)
    _turn: int = attrs.field(default=0, init=False)
    _warnings: Iterator[float] = attrs.field(factory=lambda: iter(()), init=False)
    _warn_at: float = attrs.field(default=float("inf"), init=False)
    _mourned: set[int] = attrs.field(factory=set, init=False)

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for what the control thread finds."""
        return self.wait is None or self.wait.over

    def enter(self, phase: str) -> None:
        """Note, on the rank's thread, that the rank goes into *phase* now."""
        self.phase, self.since = phase, monotonic()
        self.stirred = self.since
        if self.history is not None:
            self.history.append((self.since, phase))

    def look(self, store: Store, now: float, failed: set[int]) -> None:
        """Look, on the control thread, at what this rank has to know, and act on it."""
        if not self.part.life:
            return  # the store thread has not joined yet
        wait = None if self.is_idle else self.wait
        if self.stirred != self._matter:
            self._begin()
        if wait is not None and not self._has_told and now >= wait.start + FIRST_LOOK_S * 0.8:
            self._tell(store, wait)
        self._read(store, wait, failed)
        is_long = wait is not None and now >= wait.start + BEATS_S
        lost = find_lost(self.part, store, now, self._missing(wait)[:READ_AT_ONCE] if is_long else (), self.silence)
        if self.revocation is not None and not self.is_left:
            self._free(store, now, self.revocation)
        if wait is not None:
            self._look_at_wait(store, now, wait, lost)
        self._speak_of_lost(lost - self._mourned, now)
        if now >= self._warn_at - ANSWER_S:
            self._locator.ask(store, now, self.round_of_wait)
        if now >= self._warn_at and not self._locator.has_time(now, self.control.calm_at):
            self._warn(store, now, wait)
            self._warn_at = next(self._warnings)

    def survey(self, store: Store, meanwhile: Callable[[], object]) -> dict[int, Place]:
        """Return where all ranks are, having asked them; call *meanwhile* while they answer."""
        return self._locator.survey(store, self._others(), meanwhile) | {self.part.rank: self.control.place(self)}

    @property
    def round_of_wait(self) -> str:
        """The round at which the rank waits; empty if it does not."""
        wait = self.wait
        return "" if wait is None or wait.over else wait.record.round

    @property
    def _inner(self) -> list[Span]:
        """The scopes within this one."""
        spans = list(self.control.spans.values())
        if self not in spans:  # the rank has just left it
            return []
        return [span for span in spans[spans.index(self) + 1 :] if span.thread == self.thread]

    def _begin(self) -> None:
        self._matter = self.stirred
        self._has_told, self._turn = False, 0
        self._locator.forget()
        if self.warn_after is not None:
            self._warnings = warning_times(self.stirred, self.warn_after)
            self._warn_at = next(self._warnings)

    def _mine(self, wait: Wait | None) -> Record:
        return wait.record if wait is not None else Record(self.path, self.stage)

    def _others(self) -> list[int]:
        """Return all other ranks, beginning with the one after this."""
        size = self.part.world_size
        return [(self.part.rank + each) % size for each in range(1, size)]

    def _missing(self, wait: Wait | None) -> list[int]:
        """Return the other ranks that are not known to have come to this rank's round."""
        mine, records = self._mine(wait).round, self.part.records
        return [r for r in self._others() if r not in records or not records[r].arrived or records[r].round != mine]

    def _tell(self, store: Store, wait: Wait) -> None:
        """Tell that this rank waits; one that had nothing to report has told nothing so far."""

        def tell(record: Record) -> Record | None:
            is_told = record.round == wait.record.round and record.arrived
            if wait.over or is_told:
                return None
            return attrs.evolve(wait.record, arrived=wait.counted, place=record.place, answered=record.answered)

        if wait.counted:
            self._has_told = self.part.tell_more(store, tell) or wait.record.has_something_to_tell

    def _read(self, store: Store, wait: Wait | None, failed: set[int]) -> None:
        """Refresh the records that matter: of ranks that failed, and in turn of those that are missing, or unknown."""
        ranks = self._missing(wait) if wait is not None else [r for r in self._others() if r not in self.part.records]
        start = self._turn % max(1, len(ranks))
        chosen = (ranks[start:] + ranks[:start])[:READ_AT_ONCE]
        self._turn = start + READ_AT_ONCE
        self.part.read(store, {*chosen, *(failed - {self.part.rank})})

    def _free(self, store: Store, now: float, revocation: Revocation) -> None:
        """Revoke the group if a rank has failed and not all have come; see `Revocation`."""
        mine, part = self._mine(None), self.part
        failures = [(rank, r) for rank, r in list(part.records.items()) if not r.outcome.ok]
        failed = {rank for rank, r in failures if relation(r, mine) in ("here", "around")}
        failed = (failed | {part.rank} if self.has_failed else failed) - self.past
        if failed:
            revocation.note_failure(now)
        else:
            revocation.postpone()
        is_told = any(path == self.path or is_around(path, self.path) for path in part.revoked)
        inner = self._inner
        is_free = all(span.phase == IN_BODY for span in (self, *inner))
        is_at_work = self.wait is None or self.wait.record.round != mine.round
        if revocation.is_begun:
            for span in inner:
                if span.wait is not None and not span.wait.over and not span.wait.reason:
                    span.wait.reason, span.wait.deadline = "the group around it was revoked", now
            revocation.look(now, is_free=is_free)
        elif is_told:
            revocation.begin(now, is_at_work=is_at_work, is_free=is_free)
        elif revocation.is_due(now):
            # Before it is done: a rank that comes after this knows that the group has been revoked.
            if has_all(store.add(f"{part.key(mine.round)}/n", REVOKED), part.world_size):
                self.past |= failed
            else:
                part.announce(store, f"revoked {part.life} {self.path}")
                revocation.begin(now, is_at_work=is_at_work, is_free=is_free)

    def _look_at_wait(self, store: Store, now: float, wait: Wait, lost: set[int]) -> None:
        """End the wait of this rank, and of all, if there is a reason."""
        is_split = self.part.hasten(wait, now)
        deadline = wait.deadline + min(ANSWER_S, STAGGER_S * self.part.rank)
        if not is_split and not lost and now < deadline:
            if now >= wait.deadline - 2 * ANSWER_S:
                self._locator.ask(store, now, self.round_of_wait)
            return
        missing = self._missing(wait)
        if not is_split and not wait.reason and not lost:
            self._locator.ask(store, now, self.round_of_wait)
            if not self._locator.have_answered(store, missing) and self._locator.has_time(now, self.control.calm_at):
                return
        self._mourned |= lost  # the verdict says it
        for span in list(self.control.spans.values()):
            if span.part.life == self.part.life and span.wait is not None and not span.wait.over:
                span._tell(store, span.wait)  # noqa: SLF001  (so that the decision does not wait for it)
        text = self.part.decide(wait, store, lost, self._locator.where(now, {*missing, *lost}))
        self._free_missing(store, wait, text)
        if wait.over:  # it ended meanwhile, and the keys of the round may be gone
            return
        if wait.reason or now > wait.deadline + GRACE_S:
            wait.replies.put(Decided(wait, self.part.verdict(wait, store)))
        if wait.reason:
            wait.over = True

    def _free_missing(self, store: Store, wait: Wait, text: bytes) -> None:
        """Have the ranks freed that did not come to an exit, by the verdict that is written in *text*, if any is."""
        is_exit = wait.record.stage.startswith("exit")
        if self.revocation is not None and is_exit and text and self.part.read_verdict(text, wait).missing:
            self.part.announce(store, f"revoked {self.part.life} {self.path}")

    def _facts(self, now: float, wait: Wait | None, lost: Iterable[int], where: dict[int, Place]) -> Verdict:
        mine, size = self._mine(wait), self.part.world_size
        records = {**self.part.records, self.part.rank: mine}
        return judge(records, mine, size, lost=lost, where=where, timeout=now - self.since)

    def _speak_of_lost(self, ranks: set[int], now: float) -> None:
        """Say at once which ranks are gone. A rank that waits is told by the verdict."""
        if ranks and self.is_idle and self.warn_after is not None:
            self._mourned |= ranks
            self.speak("lost", self._facts(now, None, ranks, self._locator.where(now, ranks)), None)

    def _warn(self, store: Store, now: float, wait: Wait | None) -> None:
        """Say which ranks are late and where they are: each rank that waits, or one for all that are at work."""
        if wait is None and (self._inner or not self._speaks_for_all(store)):
            return
        self._locator.have_answered(store, self._missing(wait))
        if wait is not None and (wait.over or not self._missing(wait)):
            return  # those that were missing may have come while they were asked
        where = self._locator.where(now, self._missing(wait))
        if wait is None:
            where[self.part.rank] = self.control.place(self)
        left = None if wait is None else max(0.0, wait.deadline - now)
        self.speak("working" if wait is None else "waiting", self._facts(now, wait, self.part.lost, where), left)

    def _speaks_for_all(self, store: Store) -> bool:
        """Whether no rank has come to the end of the body, and this is the lowest of those that are alive and in it."""
        if store.add(f"{self.part.key(self._mine(None).round)}/n", 0) % REPORT > 0:
            return False
        for rank in range(self.part.rank):
            self.part.read(store, [rank])
            answer = self._locator.answer_of(rank)
            if rank not in self.part.lost and answer is not None and answer.scope.startswith(self.path):
                return False
        return True
