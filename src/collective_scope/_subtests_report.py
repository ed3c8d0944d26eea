"""The output of a loop of subtests: progress, summary, JUnit XML, a trace."""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ._failures import errors_of
from ._kill import KILL_PHASE
from ._notes import NOT_RUN
from ._report import is_like_a_consequence, scope_lines
from ._subtest_result import told
from .agreement.clock import monotonic, sleep
from .agreement.part import POLL_S
from .agreement.rounds import failures_in_order
from .agreement.store_thread import ABSENT, base_of, peek
from .agreement.text import message_of, one_line, type_name


if TYPE_CHECKING:
    from ._subtest_result import Status, SubtestResult
    from .agreement.barrier import Barrier
    from .agreement.records import Outcome

logger = logging.getLogger("collective_scope")

MARKS: dict[Status, str] = {"passed": ".", "failed": "F", "skipped": "s", "xfailed": "x", "not run": "-"}

MOST_SLOW = 3
"""Slowest subtests that the summary names."""

COLLECT_S = 30.0
"""How long rank 0 waits for the traces of the others."""

_WIDTH = 72

_HAPPENED = ("failed", "revoked")
"""One moment of a phase."""


class Output:
    """
    A file of which a failure neither ends a loop nor hides what has failed in it.

    Args:
        file: Where to write; None if there is no such place.
    """

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)  # tqdm looks for some

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._file is not None and self._file.isatty()
        except (OSError, ValueError):  # it is closed
            return False

    def write(self, text: str) -> None:
        """Write in one piece, as other ranks may write to the same place; escape what the encoding lacks."""
        if self._file is None:
            return
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        try:
            self._file.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._file.flush()
        except (OSError, ValueError) as error:  # closed, or nobody reads it
            logger.debug("this could not be written: %r", text, exc_info=error)

    def flush(self) -> None:
        """Do nothing: all is written at once."""


class Progress:
    """
    A character or a line for each subtest.

    Args:
        output: Where to print. On a terminal, tqdm's bar, if that is installed.
        verbose: Whether to print lines.
    """

    def __init__(self, output: Output, *, verbose: bool) -> None:
        self._output, self._verbose, self._column = output, verbose, 0
        self._bar: Any = None
        if output.isatty() and not verbose:
            try:
                self._bar = importlib.import_module("tqdm").tqdm(unit="subtest", file=output)
            except ImportError:
                self._bar = None

    def note(self, result: SubtestResult) -> None:
        """Print what became of a subtest."""
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(result.id)
        elif self._verbose:
            reason = f" ({result.reason})" if result.reason else ""
            self._output.write(f"{result.id} {result.status.upper()}{reason} {result.seconds:.2f} s\n")
        else:
            self._column += 1
            end = "\n" if self._column % _WIDTH == 0 else ""
            self._output.write(f"{MARKS[result.status]}{end}")

    def end(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()
        elif not self._verbose and self._column % _WIDTH:
            self._output.write("\n")


def summary(results: Sequence[SubtestResult], seconds: float, rerun: str, ended: str = "") -> str:
    """Say what failed, the cause first, and count the rest; if the loop has *ended* early, say where."""
    lines: list[str] = []
    for result in results:
        if result.status == "failed":
            lines += _failure(result, rerun)
    lines += _not_run([result for result in results if result.status == "not run"])
    if ended:
        lines.append(f"the loop ended {ended}: later subtests have not run, and are not counted")
    slow = sorted(results, key=lambda result: -result.seconds)[:MOST_SLOW]
    if len(results) > MOST_SLOW:
        lines.append("slowest: " + ", ".join(f"{result.id} {result.seconds:.2f} s" for result in slow))
    waited = Counter[int]()
    for result in results:
        for rank in result.verdict.missing if result.verdict is not None and round(result.waited) else ():
            waited[rank] += round(result.waited)
    if waited:
        lines.append("waited for: " + ", ".join(f"rank {rank} {took} s" for rank, took in sorted(waited.items())))
    counts = Counter(result.status for result in results)
    text = ", ".join(f"{counts[status]} {status}" for status in MARKS if counts[status]) or "no subtests"
    return "\n".join([*lines, f"{text} in {seconds:.2f} s"])


def _not_run(results: list[SubtestResult]) -> list[str]:
    """Count what did not run by its reason; say where the ranks were at the first of those, if they were apart."""
    lines = []
    for reason, count in Counter(result.reason for result in results).items():
        lines.append(f"not run: {count} subtest{'s' * (count > 1)}, because {reason}")
        first = next(result.verdict for result in results if result.reason == reason)
        lines += [] if first is None else scope_lines(first)
    return lines


def _failure(result: SubtestResult, rerun: str) -> list[str]:
    lines = [f"FAILED {result.id}{f': {result.reason}' if result.reason else ''}"]
    ordered = failures_in_order(result.failures)
    is_of_lost = result.verdict is not None and bool(result.verdict.lost)
    for place, (rank, outcome) in enumerate(ordered):
        line = f"  {told(rank, outcome)}"
        if (place or is_of_lost) and is_like_a_consequence(outcome):
            line += " (a consequence)"
        lines.append(line)
        where = _place(outcome)
        if where and (not place or outcome.phase == KILL_PHASE):
            lines.append(f"    {where}")
    if (verdict := result.verdict) is not None and ordered:  # a rank that is gone has told nothing, and is the cause
        gone = [f"  rank {rank} is gone" for rank in verdict.lost]
        late = [f"  rank {rank} did not come" for rank in verdict.missing if rank not in result.failures]
        lines[1:] = [*gone, *lines[1:], *late]
    if not ordered and result.error is not None:  # what the verdict says comes first: it has the ranks
        errors = [] if verdict is None else errors_of(verdict, -1)
        texts, mine = [message_of(error) for error in errors], message_of(result.error)
        if mine not in texts:
            texts.append(one_line(type_name(result.error), mine) if texts else mine)
        lines += [f"  {line}" for text in texts for line in text.splitlines()]
    notes = getattr(result.error, "__notes__", ())
    lines += [f"  {note}" for note in notes if note.startswith(NOT_RUN)]
    if rerun:
        lines.append(f"  again: {rerun.format(id=result.id)}")
    return lines


def _place(outcome: Outcome) -> str:
    """Return file and line of the innermost frame in a traceback that is not torch's or Python's own."""
    # Frames stand two spaces from the left, in a group after its bar; those in notes stand further off.
    places = re.findall(r'^(?: *\| )?  File "(.+)", line (\d+), in', outcome.traceback, re.MULTILINE)
    users = [place for place in places if "site-packages" not in place[0] and "/lib/python3" not in place[0]]
    return ":".join((users or places)[-1]) if places else ""


def write_junit(results: Sequence[SubtestResult], path: str, name: str) -> None:
    """Write the format that CI servers read."""
    from xml.etree import ElementTree as ET  # noqa: PLC0415  (few need it, and it is slow to import)

    counts = Counter(result.status for result in results)
    # If nothing has failed, and yet not all have run, a reader of failures and errors must see it.
    errors = [result for result in results if result.status == "not run" and not counts["failed"]][:1]
    suite = ET.Element(
        "testsuite",
        name=_printable(name),
        tests=str(len(results)),
        failures=str(counts["failed"]),
        errors=str(len(errors)),
        skipped=str(counts["skipped"] + counts["xfailed"] + counts["not run"] - len(errors)),
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        case = ET.SubElement(suite, "testcase", classname=_printable(name), name=_printable(result.id))
        case.set("time", f"{result.seconds:.3f}")
        if result.status == "failed":
            lines = _failure(result, "")
            failure = ET.SubElement(case, "failure", message=_printable("\n".join(lines[:2])))
            tracebacks = [outcome.traceback for _, outcome in failures_in_order(result.failures)]
            failure.text = _printable("\n".join([*lines, *tracebacks]))
        elif result.status != "passed":
            kind = "error" if result in errors else "skipped"
            ET.SubElement(case, kind, message=_printable(f"{result.status}: {result.reason}"))
    root = ET.Element("testsuites")
    root.append(suite)
    ET.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """Leave out what XML has no way to say."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())


def lost(results: Sequence[SubtestResult]) -> set[int]:
    """Return the ranks that are gone."""
    return {rank for result in results if result.verdict is not None for rank in result.verdict.lost}


def write_trace(results: Sequence[SubtestResult], path: str, barrier: Barrier | None) -> None:
    """Write a Chrome trace of all ranks, on rank 0; the others hand theirs over."""
    rank = 0 if barrier is None else barrier.rank
    # All clocks of a machine agree; those of others are as far off as their wall clocks are.
    offset = time.time() - monotonic()
    events = [_event(rank, *phase) for result in results for phase in _phases(result, offset)]
    everyone = [events] if barrier is None else _collect(barrier, events, lost(results))
    if rank == 0:
        names = [
            {"ph": "M", "name": "process_name", "pid": each, "tid": 0, "args": {"name": f"rank {each}"}}
            for each in range(len(everyone))
        ]
        start = min((event["ts"] for each in everyone for event in each), default=0.0)
        moved = [{**event, "ts": event["ts"] - start} for each in everyone for event in each]
        Path(path).write_text(json.dumps({"traceEvents": [*names, *moved]}))


def _phases(result: SubtestResult, offset: float) -> Iterable[tuple[str, str, float, float]]:
    """Return name, kind, start and end of each phase, of which one ends where the next begins; then what happened."""
    if result.status == "not run":
        return
    happened = [(at + offset, what) for at, what in result.history if what in _HAPPENED]
    history = [each for each in result.history if each[1] not in _HAPPENED]
    history = history or [(result.began, "in the body of")]  # a rank without peers keeps none
    ends = [began for began, _ in history[1:]]
    for (began, phase), end in zip(history, [*ends, result.began + result.seconds], strict=True):
        kind = "body" if phase == "in the body of" else "waiting" if phase.startswith("at the ") else "cleanup"
        name = result.id if kind == "body" else phase.removesuffix(" of").removeprefix("in ")
        yield name, kind if "making" not in phase else "renewal", began + offset, max(began, end) + offset
    yield from ((f"{result.id}: {what}", what, at, at) for at, what in happened)


def _event(rank: int, name: str, kind: str, began: float, ended: float) -> dict[str, Any]:
    event = {"name": name, "cat": kind, "pid": rank, "tid": 0, "ts": began * 1e6}
    return event | ({"ph": "i", "s": "t"} if kind in _HAPPENED else {"ph": "X", "dur": (ended - began) * 1e6})


def _collect(barrier: Barrier, events: list[dict[str, Any]], gone: set[int]) -> list[list[dict[str, Any]]]:
    """Hand the events of this rank over, and return those of all ranks, on rank 0; none of one that is late or gone."""
    part = barrier.part
    store = base_of(part.clone())
    keys = [part.key(f"trace/{rank}") for rank in range(part.world_size)]
    store.set(keys[part.rank], zlib.compress(json.dumps(events).encode()))  # type: ignore[arg-type]  # no bytes
    if part.rank:
        return []
    texts: dict[str, bytes] = {}
    deadline = monotonic() + COLLECT_S
    while len(texts) < len(keys) - len(gone) and monotonic() < deadline:
        texts |= {key: text for key in keys if key not in texts and (text := peek(store, key)) != ABSENT}
        sleep(POLL_S)
    for key in keys:
        store.delete_key(key)
    return [json.loads(zlib.decompress(texts[key])) if key in texts else [] for key in keys]
