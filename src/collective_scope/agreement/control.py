"""
The control thread: the one thread of a process that looks, answers and warns.

There is one for each store, with a connection of its own. It works while the thread of a rank is
blocked in native code that has released the GIL. Several times a second it

* shows a heartbeat,
* reads the news: which rank failed, which is gone, which are asked where they are,
* and has each `Span`, a scope that this process is in, look after itself.

==================  =======================================  ==============================
field               written by                               read by
==================  =======================================  ==============================
spans               the ranks' threads, one entry a scope;   the control thread
                    the control thread removes those left
groups              the ranks' threads, one entry a group    the control thread
_surveys            the threads that end a process: scopes   the control thread removes them
                    of which all must be located
left                the ranks' threads                       the control thread
items               the store and control threads            the control thread
heard_at, calm_at   the control and store threads            the ranks' threads; calm_at the
                                                             control thread, too
broken              the control thread                       the ranks' threads
==================  =======================================  ==============================
"""

from __future__ import annotations

import functools
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

import attrs
from torch.distributed import Store

from .clock import monotonic, sleep
from .life import ROOT
from .part import Part
from .peers import CONTROL, NEWS
from .process import NOBODY, Place, Process, me
from .stacks import where_is
from .store_thread import ABSENT, Failed, next_reply, peek, start_thread, unbounded
from .wait import GRACE_S
from .watch import Span


WAITING_S = 0.05
"""How often the control thread looks while a rank of its process waits; longer in large groups."""

IDLE_S = 0.25
"""How often it looks otherwise."""

BEAT_S = 1.0

NEWS_S = 30.0
"""How long an item stays in the news."""

LATE_S = 2.0
"""How long an item may be announced and not there."""

CLOSING_S = 5.0
"""How long the control thread of the process that serves the store waits for those of others to stop."""

CLOSE_S = 0.5
"""How long a rank that destroys its last group waits for its control thread."""

THAW_S = 0.3
"""How long a rank needs to say that it gave up, once the store answers again."""

SURVEY_S = 2.0
"""How long a process that is about to end waits to learn where all ranks are."""

OLD_NEWS = 64
"""Items that a new control thread reads although they are older than it."""


class Control:
    """
    What looks, answers and warns for this process over one store.

    Args:
        connect: Returns a client of the store, for use on one thread.
        kept: A store object that has to stay until the control threads of others have stopped.
        serves: Whether this process serves the store.
    """

    def __init__(self, connect: Callable[[], Store], kept: Store | None = None, *, serves: bool = False) -> None:
        self.spans: dict[int, Span] = {}
        self.groups: dict[int, Part | None] = {}
        """The groups of this process, by a number; None for one that is not used, and keeps the thread."""
        self.items: deque[tuple[int, float]] = deque()
        """Numbers of the news that this process wrote, and when."""
        self.left = ""
        """Name of the scope that was left last."""
        self.heard_at = monotonic()
        """When the store was last heard of."""
        self.calm_at = 0.0
        """When all have had the time to say what they decided while the store stood still."""
        self.broken: BaseException | None = None
        """Why there is no control thread any more."""
        self.pid = os.getpid()
        self.serves = serves
        self._connect, self._kept = connect, kept
        self._wake, self._stop = threading.Event(), threading.Event()
        self._seen = -1
        self._late: dict[int, float] = {}
        self._surveys: deque[tuple[Span, SimpleQueue[dict[int, Place]]]] = deque()
        self._is_closing = False
        self._next_beat = 0.0
        self._processes: set[Process] = set()
        """The processes of all groups, if this one serves the store."""
        self._thread: threading.Thread | None = None
        try:
            self._thread = start_thread("collective_scope-control", self._run, stop=weakref.WeakMethod(self.stop))
        except RuntimeError as error:  # the system has no thread to give: ranks end their waits themselves
            self.broken = error

    # Called by the ranks' threads.

    def wake(self) -> None:
        """Have the control thread look now."""
        self._wake.set()

    def stop(self) -> None:
        """Let the control thread end."""
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """End the control thread, which keeps the store until it ends. If that takes long, it goes on by itself."""
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)

    def survey(self, span: Span, timeout: float = SURVEY_S) -> dict[int, Place]:
        """Return where all ranks of *span*'s group are, as far as that can be said in time."""
        done: SimpleQueue[dict[int, Place]] = SimpleQueue()
        self._surveys.append((span, done))
        self.wake()
        places: dict[int, Place] | None = next_reply(done, monotonic() + timeout)
        return {span.part.rank: self.place(span)} if places is None else places  # the store may not answer

    def heard(self) -> None:
        """Note that the store has answered."""
        now = monotonic()
        if now > self.heard_at + GRACE_S:  # it, or this process, has stood still
            self.calm_at = now + THAW_S
        self.heard_at = now

    # Run on the control thread.

    def _run(self) -> None:
        try:
            store = unbounded(self._connect())
            store.add(NEWS, CONTROL)
            while not self._stop.is_set() and not (self._is_closing and self._is_idle()):
                self._wake.clear()
                self._look(store)
                self._wake.wait(self._pause())
            self._take_leave(store)
        except RuntimeError as error:  # one of torch's store errors: the ranks' own calls meet it too
            self.broken = error
        except BaseException as error:
            self.broken = error
            for span in list(self.spans.values()):
                if span.wait is not None:
                    span.wait.replies.put(Failed(error))
            raise
        finally:
            self._kept = None

    def _is_idle(self) -> bool:
        return all(span.is_idle for span in list(self.spans.values()))

    def _pause(self) -> float:
        spans = list(self.spans.values())
        sizes = [span.part.world_size for span in spans if not span.is_idle]
        if sizes:
            return min(WAITING_S + max(sizes) / 1000, GRACE_S / 2)  # a pause is no silence of the store
        return 2 * WAITING_S if any(span.revocation is not None for span in spans) else IDLE_S

    def _look(self, store: Store) -> None:
        self._note_processes()
        fresh = self._read_news(store)
        now = monotonic()
        for key, span in list(self.spans.items()):
            span.look(store, now, fresh.get(span.part.life, set()))
            if span.is_left and span.is_idle:
                self.spans.pop(key, None)
        while self._surveys:
            span, done = self._surveys.popleft()
            done.put(span.survey(store, functools.partial(self._read_news, store)))
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            store.set(f"{ROOT}/beat/{me().key}", str(now))
        self._remove_news(store, now - NEWS_S)
        for part in self._parts():
            part.remove_spent(store)

    def _read_news(self, store: Store) -> dict[str, set[int]]:
        """Act on the news; return the ranks that have failed, by the life of their group."""
        count, now = store.add(NEWS, 0) % CONTROL, monotonic()
        self.heard()
        is_first = self._seen < 0
        self._seen = max(count - OLD_NEWS, 0) if is_first else self._seen
        fresh: dict[str, set[int]] = {}
        for number in [*self._late, *range(self._seen + 1, count + 1)]:
            item = peek(store, f"{NEWS}/{number}")
            since = self._late.pop(number, now)
            if item == ABSENT:
                if not is_first and now < since + LATE_S:
                    self._late[number] = since
                continue
            what, life, *words = item.decode().split(" ")
            rest = " ".join(words)
            if what == "closing":
                self._is_closing = self._is_closing or not is_first
            elif what == "asked":
                if not self._answer(store, life, rest, number, now) and now < since + LATE_S:
                    self._late[number] = since
            elif what == "failed":
                fresh.setdefault(life, set()).add(int(rest))
            else:
                for part in self._parts(life):
                    part.hear(what, rest)
        self._seen = count
        return fresh

    def _parts(self, life: str = "") -> list[Part]:
        return [each for each in list(self.groups.values()) if each is not None and life in ("", each.life)]

    def _remove_news(self, store: Store, until: float) -> None:
        """Remove what this process wrote until then."""
        while self.items and self.items[0][1] < until:
            store.delete_key(f"{NEWS}/{self.items.popleft()[0]}")

    def _answer(self, store: Store, life: str, round_: str, number: int, now: float) -> bool:
        """Tell where this process's ranks are, but those that wait in the round of the one that asks; return whether."""
        has_told = True
        for part in self._parts(life):
            part.asked = number, now, round_
            spans = list(self.spans.values())
            span = next((each for each in reversed(spans) if each.part is part), None)
            if span is None or not round_ or span.round_of_wait != round_:
                answer = functools.partial(attrs.evolve, place=self.place(span), answered=number)
                has_told &= part.tell_more(store, answer)
        return has_told

    def place(self, span: Span | None) -> Place:
        """Say where the thread is that entered *span*: perhaps in a scope of another group by now."""
        spans = [each for each in list(self.spans.values()) if span is None or each.thread == span.thread]
        if not spans:
            after = f", after scope {self.left!r}" if self.left else ""
            main = threading.main_thread().ident
            return Place(me(), phase=f"outside of any scope{after}", frames=where_is(main) if main else "")
        inner, seconds = spans[-1], monotonic() - spans[-1].since
        frames = where_is(inner.thread, inner.body)
        return Place(me(), "", inner.path, f"{inner.phase} scope {inner.name!r}", seconds, frames)

    def _take_leave(self, store: Store) -> None:
        """Leave the store; if this process serves it, as the last one, for a while."""
        self._note_processes()
        self._remove_news(store, math.inf)
        store.delete_key(f"{ROOT}/beat/{me().key}")
        others = store.add(NEWS, -CONTROL) // CONTROL
        if self.serves and others:
            store.set(f"{NEWS}/{store.add(NEWS, 1) % CONTROL}", "closing *")
            deadline = monotonic() + CLOSING_S
            while others > self._ended(store) and monotonic() < deadline:
                sleep(WAITING_S / 5)
                others = store.add(NEWS, 0) // CONTROL
        self.broken = self.broken or RuntimeError("the process that serves the group's store has left")

    def _note_processes(self) -> None:
        if self.serves:
            records = [record for part in self._parts() for record in list(part.records.values())]
            self._processes |= {record.process for record in records if record.process != NOBODY}

    def _ended(self, store: Store) -> int:
        """Return how many processes are known to have ended without taking leave: their heartbeats are still there."""
        return sum(p.has_ended and store.check([f"{ROOT}/beat/{p.key}"]) for p in self._processes)
