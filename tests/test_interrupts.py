"""
An interrupt, or an error, at every line of the library in turn, on one rank of two.

The ranks are threads; a trace function raises in the thread of rank 0 when it comes to the line. Lines
where the other threads work are not among them: a signal interrupts the rank's own thread.
"""

from __future__ import annotations

import linecache
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import pytest
import torch.distributed as dist

import collective_scope as package
from collective_scope import CollectiveScope, collective_scope
from collective_scope._groups import find
from tests.stores import RankGroup


_FOLDER = str(Path(package.__file__).parent)

TIMEOUT_S = 5.0
"""How long a rank waits for the other; only a lost rank takes so long."""

LANES = 6
"""How many pairs of ranks are played with at a time."""

SCOPES = 4
"""How many scopes each rank goes through: the one that is interrupted, and others."""

Line = tuple[str, int, int]
"""File, line, and how often it had been executed before."""

_EDGES = {
    "__enter__": ("if self._state", "try:"),
    "__exit__": ("try:", "surfaced, self._surfaced", "if surfaced is not None", "raise surfaced", "del surfaced"),
}
"""
Lines of `_scope.py` at which an interrupt is one of the ``with`` statement: before the library has begun, and after
it is through. The interpreter does not call ``__exit__`` again.
"""


class Injected(Exception):  # noqa: N818  (it is an event)
    """Raised in the middle of the library."""


@attrs.define
class Tracer:
    """
    Counts the library's lines on one thread, and raises at one of them.

    Attributes:
        error: Type to raise; None to record only.
        at: Where to raise it.
        lines: The lines that were executed, in order.
        raised: Whether it was raised.
    """

    error: type[BaseException] | None = None
    at: Line | None = None
    lines: list[Line] = attrs.field(factory=list)
    counts: dict[tuple[str, int], int] = attrs.field(factory=dict)
    raised: bool = False

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> Any:
        """Trace one event."""
        file = frame.f_code.co_filename
        if not file.startswith(_FOLDER):
            return None
        if event == "line":
            text = linecache.getline(file, frame.f_lineno).strip()
            if not text.startswith(_EDGES.get(frame.f_code.co_name, ())) or not _EDGES.get(frame.f_code.co_name):
                self._come_to(Path(file).name, frame.f_lineno)
        return self

    def _come_to(self, file: str, number: int) -> None:
        count = self.counts.get((file, number), 0)
        self.counts[file, number] = count + 1
        line = (file, number, count)
        self.lines.append(line)
        if self.error is not None and line == self.at and not self.raised:
            self.raised = True
            msg = f"at {line}"
            raise self.error(msg)


@attrs.define
class Seen:
    """
    One rank's view.

    Attributes:
        surfaced: Error of the scope.
        ran: Names of the cleanups that ran, in order.
        entered: Whether the body ran.
        following: Whether the next scopes worked.
    """

    surfaced: BaseException | None = None
    ran: list[str] = attrs.field(factory=list)
    entered: bool = False
    following: bool = False


def _register(scope: CollectiveScope, ran: list[str]) -> None:
    scope.cleanup(ran.append, "first")
    scope.collective_cleanup(ran.append, "collective", name="collective")
    scope.cleanup(ran.append, "last")
    scope.after_barrier(ran.append, "after", even_if_missing=True)


def _play(group: RankGroup, seen: Seen, tracer: Tracer | None, *, fails: bool) -> None:
    barrier = find(group)[0].barrier
    goal = barrier.entered + SCOPES
    scope = collective_scope(
        group,
        name="cell",
        cleanups=[lambda: seen.ran.append("given")],
        timeout=TIMEOUT_S,
        failure_timeout=TIMEOUT_S,
    )
    try:
        sys.settrace(tracer)
        try:
            with scope:
                sys.settrace(None)
                seen.entered = True
                _register(scope, seen.ran)
                sys.settrace(tracer)
                if fails:
                    raise ValueError
        finally:
            sys.settrace(None)
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        seen.surfaced = error
    # The ranks may have to meet again. One that was interrupted on its way into the scope was not in it.
    while barrier.entered < goal:
        try:
            with collective_scope(group, name="next", timeout=TIMEOUT_S, failure_timeout=TIMEOUT_S) as following:
                pass
            seen.following = following.verdict is not None and following.verdict.ok
        except package.CollectiveScopeError:
            seen.following = False


def _play_both(groups: list[RankGroup], tracer: Tracer, *, fails: bool) -> list[Seen]:
    seen = [Seen(), Seen()]
    # Traced from the frame that calls the scope: a trace function set within a function does not trace that one.
    threads = [
        threading.Thread(target=_play, args=(groups[0], seen[0], tracer), kwargs={"fails": fails}, daemon=True),
        threading.Thread(target=_play, args=(groups[1], seen[1], None), kwargs={"fails": False}, daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6 * TIMEOUT_S)
        assert not thread.is_alive(), f"a rank hangs after {tracer.error} at {tracer.at}"
    return seen


def _groups() -> list[RankGroup]:
    store = dist.HashStore()
    return [RankGroup(store, rank, 2) for rank in (0, 1)]


def _defects(seen: list[Seen], tracer: Tracer, logged: list[str]) -> list[str]:
    defects = []
    for rank, each in enumerate(seen):
        expected = ["last", "first", "given"] if each.entered else ["given"]
        ran = [name for name in each.ran if name in ("last", "first", "given")]
        if ran != expected:
            defects.append(f"rank {rank} ran {each.ran}")
        if len(each.ran) != len(set(each.ran)):
            defects.append(f"rank {rank} ran something twice: {each.ran}")
        if not each.following:
            defects.append(f"after it, rank {rank} cannot go on")
    first = seen[0].surfaced
    known = [first, *getattr(first, "collective_scope_errors", ()), *getattr(first, "exceptions", ())]
    texts = (*getattr(first, "__notes__", ()), str(seen[1].surfaced), *logged)
    is_told = any(f"at {tracer.at}" in text or "raised tests.test_interrupts.Injected" in text for text in texts)
    if tracer.raised and not any(isinstance(error, tracer.error or ()) for error in known) and not is_told:
        defects.append(f"it does not surface: {first!r}")
    if isinstance(seen[1].surfaced, package.BarrierTimeoutError) and "store" not in str(seen[1].surfaced):
        defects.append(f"its peer was not told: {seen[1].surfaced}")
    return defects


@pytest.mark.parametrize("fails", [False, True], ids=["body-ok", "body-fails"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Injected], ids=["interrupt", "error"])
def test_scope_interrupted_at_any_line_runs_each_cleanup_once_and_tells_its_peer(
    error: type[BaseException], *, fails: bool, subtests: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Each local cleanup runs once, the peer has a verdict in time, the interrupt surfaces, and the next scope works."""
    groups = _groups()
    recorder = Tracer()
    assert not _defects(_play_both(groups, recorder, fails=fails), recorder, [])
    # The first and the last time that each line is executed.
    firsts = {line[:2]: line for line in reversed(recorder.lines)}
    lasts = {line[:2]: line for line in recorder.lines}
    lines = sorted({*firsts.values(), *lasts.values()})
    assert len(lines) > 100
    own = threading.local()

    def defects_at(at: Line) -> list[str]:
        tracer = Tracer(error, at)
        own.groups = getattr(own, "groups", None) or _groups()
        seen = _play_both(own.groups, tracer, fails=fails)
        defects = _defects(seen, tracer, [record.getMessage() for record in caplog.records])
        if defects:
            own.groups = None
        return defects

    # Each spends most of its time waiting.
    with ThreadPoolExecutor(LANES) as executor:
        for at, defects in zip(lines, executor.map(defects_at, lines), strict=True):
            if defects:
                with subtests.test(at=at):
                    pytest.fail("\n".join(map(str, (at, *defects))))
