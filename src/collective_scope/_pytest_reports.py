"""
The reports of the ranks on a phase of a test, and the one report that all of them make of these.

A rank tells by raising in the scope of the phase. Its error has the name of the one that the test raised,
and brings pytest's own report along as text. So the verdict of the scope has all reports, on every rank.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest

from ._notes import STILL_DEAD
from ._report import _numbers, _outcomes, is_like_a_consequence, missing
from .agreement.records import Outcome, Verdict
from .agreement.rounds import failures_in_order
from .agreement.text import MESSAGE_LIMIT, message_of, one_line, shorten, traceback_of
from .exceptions import CollectiveScopeError, PeerFailedError


REPORT_LIMIT = 30_000
"""Characters of a report that travel. Of a traceback that is too long, the scope keeps more than that at its end."""

SECTION_LIMIT = 8_000
"""Characters of captured output that travel, for each stream."""


class Telling(Exception):  # noqa: N818  (its subclasses are named as what tests raise)
    """Raised by a rank in the scope of a phase that did not pass, in the place of what the test raised."""


@attrs.frozen
class Told:
    """
    What a rank has told of a phase.

    Attributes:
        rank: The rank.
        outcome: What the verdict has of it.
        kind: ``failed``, ``skipped``, ``xfailed``, ``xpassed`` (if that is a failure), ``subtests`` failed, ``ended``,
            ``aside``.
        line: Why, in one line.
        report: Its report, as pytest writes it for other processes; None if there is none, or it was too long.
        text: Its report as text, if there is no other.
        subtests: The reports of subtests that failed.
        returncode: The exit code of a rank that ends its session.
    """

    rank: int
    outcome: Outcome
    kind: str
    line: str
    report: dict[str, Any] | None = None
    text: str = ""
    subtests: list[dict[str, Any]] = attrs.field(factory=list)
    returncode: int = 0


def telling(error: BaseException | None, line: str, **told: Any) -> BaseException:
    """Return what tells the peers *told*; it is named as *error*, or else as a failure described by *line*."""
    cls = pytest.fail.Exception if error is None else type(error)
    message = line if error is None else shorten(message_of(error), MESSAGE_LIMIT)
    said = named(f"{cls.__module__}.{cls.__qualname__}", message, Telling)
    said.add_note(json.dumps({"line": line, **told}, default=repr))
    return said


def named(type_name: str, message: str, base: type[BaseException] = Exception) -> BaseException:
    """Return an exception that looks like one of class *type_name*, which may not exist in this process."""
    module, _, name = type_name.rpartition(".")
    cls: type[BaseException] = type(name, (base,), {"__module__": module or "builtins", "__qualname__": name})
    return cls(message)


def tell(
    config: pytest.Config, report: pytest.TestReport, error: BaseException | None, subtests: list[dict[str, Any]]
) -> BaseException | None:
    """Return what this rank has to raise in the scope of a phase; None if all was well."""
    kind = _kind(report)
    if kind == "passed" and not subtests:
        return None
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    data["sections"] = [(name, shorten(text, SECTION_LIMIT)) for name, text in report.sections]
    told = {"kind": "subtests" if kind == "passed" else kind, "report": data, "subtests": subtests}
    if len(json.dumps(told, default=repr)) > REPORT_LIMIT:
        told |= {"report": None, "text": shorten(report.longreprtext, REPORT_LIMIT // 2), "subtests": []}
    return telling(error, _line(report), **told)


def hear(verdict: Verdict | None) -> list[Told]:
    """Return what the ranks have told, the failure that was published first at the top."""
    heard = []
    for rank, outcome in failures_in_order(verdict.failures) if verdict is not None else ():
        try:
            said = json.loads(outcome.traceback.rstrip().rpartition("\n")[2])
            heard.append(Told(rank, outcome, **said))
        except (ValueError, TypeError):  # not told by a report: raised by a cleanup, for example
            kind = "skipped" if outcome.is_skip else "failed"
            line = one_line(outcome.type_name, outcome.message)
            heard.append(Told(rank, outcome, kind, line, text=f"{outcome.phase}\n\n{outcome.traceback}"))
    return heard


def judge(verdict: Verdict | None, told: list[Told]) -> str:
    """Say what has become of a phase on the whole: ``passed``, ``skipped``, ``xfailed`` or ``failed``."""
    is_whole = verdict is not None and verdict.complete and not verdict.cleanups
    kinds = [each.kind for each in _causes(told)]
    if not is_whole or not told or any(each.outcome.also for each in told):
        return "failed"
    if set(kinds) <= {"subtests", "aside"}:
        return "passed"  # pytest itself counts subtests
    if verdict is not None and kinds == ["skipped"] * verdict.world_size:
        return "skipped"
    # A test that fails as expected on one rank has failed as expected.
    return "xfailed" if "xfailed" in kinds and set(kinds) <= {"xfailed", "xpassed", "subtests"} else "failed"


def as_judged(kind: str, report: pytest.TestReport, told: list[Told], *, counts_subtests: bool) -> pytest.TestReport:
    """
    Return the report of a phase that did not fail, on the whole.

    Args:
        kind: What `judge` has said.
        report: What this rank made of the phase.
        told: What the ranks have told.
        counts_subtests: Whether a test fails if its subtests do; those of unittest pass all the same.
    """
    if kind == "xfailed" and _kind(report) != "xfailed":  # it passed here
        report.outcome = "skipped"
        report.wasxfail = next(each.line for each in _causes(told) if each.kind == "xfailed")
    elif kind == "passed" and report.failed:  # as a consequence
        report.outcome, report.longrepr = "passed", None
    if report.passed and counts_subtests and any(each.subtests for each in told):
        report.outcome, report.longrepr = "failed", "contains subtests that failed"
    return report


def failed(
    report: pytest.TestReport,
    verdict: Verdict | None,
    errors: Sequence[BaseException],
    notes: Sequence[str],
    *,
    rank: int,
    config: pytest.Config,
    make: Callable[[BaseException], pytest.TestReport],
) -> pytest.TestReport:
    """
    Return the report of a phase that failed, which shows the same on every rank.

    Args:
        report: What this rank made of the phase.
        verdict: What the ranks did.
        errors: What the scope raised.
        notes: What it said of cleanups that did not run, and of a group that is dead.
        rank: This rank.
        config: pytest's.
        make: Returns the report that this rank makes of another exception.
    """
    told = hear(verdict)
    lead = next(iter(_causes(told)), None)
    alike = [] if lead is None else sorted(each.rank for each in _causes(told) if each.line == lead.line)
    ours = [e for e in errors if isinstance(e, CollectiveScopeError) and not isinstance(e, PeerFailedError)]
    local = [e for e in errors if not isinstance(e, CollectiveScopeError)]
    line = lead.line if lead is not None else str(ours[0]).split("\n", 1)[0] if ours else ""
    if local and (lead is None or (rank in alike and not report.failed)):
        error = local.pop(0)
        report = make(error)
        if getattr(report.longrepr, "reprcrash", None) is None:  # a function in C has no frame to show
            report.longrepr = _as_text(traceback_of(error))
    elif lead is None or (lead.kind == "skipped" and not lead.outcome.also):
        text = str(ours[0]) if lead is None else f"skipped there, and not on the other ranks: {line}"
        report, line = make(pytest.fail.Exception(text, pytrace=False)), text.split("\n", 1)[0]
        report.longrepr = _as_text(text)
    elif rank not in alike:
        report = _as_told(lead, report, config, make)
    dead = next((note for note in notes if note.startswith(STILL_DEAD)), "")
    if dead and lead is not None and is_like_a_consequence(lead.outcome):
        line = f"{dead}: {line}"
        report.longrepr = _as_text(line)  # the first test that met the dead group has it in full
    report.outcome = "failed"
    vars(report).pop("wasxfail", None)
    if verdict is not None and verdict.world_size > 1:
        if verdict.lost and lead is not None:  # a rank that is gone has told nothing, and is the cause
            who = f"{_numbered(verdict.lost)} lost, and {_numbered(alike)} failed: "
            name_ranks(report, [], f"{who}{line}")
        else:
            name_ranks(report, alike, line)
        _add(report, "ranks", "\n".join(map(str, ours)) if ours and lead else "")
        facts = "\n".join(_outcomes(verdict)) if verdict.complete else missing(verdict) if verdict.missing else ""
        _add(report, "ranks", "" if ours and not verdict.complete else facts)
    _add(report, "notes", "\n".join(note for note in notes if note != dead))
    for each in _causes(told):
        _add(report, f"rank {each.rank}, which failed in another way", _failed_otherwise(each, alike, config))
    for error in local:
        _add(report, f"in addition, on rank {rank}", traceback_of(error))
    return report


def _failed_otherwise(told: Told, alike: list[int], config: pytest.Config) -> str:
    """Return what a rank has told of its failure; nothing for one of those that failed *alike*, or did not fail."""
    if told.rank in alike or told.kind != "failed" or is_like_a_consequence(told.outcome):
        return ""
    if told.report is None:
        return told.text
    report: pytest.TestReport = config.hook.pytest_report_from_serializable(config=config, data=told.report)
    return report.longreprtext


def _as_told(
    told: Told,
    mine: pytest.TestReport,
    config: pytest.Config,
    make: Callable[[BaseException], pytest.TestReport],
) -> pytest.TestReport:
    """Return a report of this rank that shows what another one has told, and the output of both."""
    report = make(named(told.outcome.type_name, told.outcome.message))
    report.longrepr, sections = _as_text(told.text), []
    if told.report is not None:
        theirs = config.hook.pytest_report_from_serializable(config=config, data=told.report)
        report.longrepr, sections = theirs.longrepr, theirs.sections
    report.sections = [(f"{name}, rank {told.rank}", text) for name, text in sections] + mine.sections
    return report


def subtests_elsewhere(
    config: pytest.Config, own: list[dict[str, Any]], told: list[Told], rank: int
) -> list[pytest.TestReport]:
    """Return the reports of subtests that failed on other ranks and not on this one."""
    known, reports = set(_by_name(config, own)), []
    for each in told:
        for key, report in _by_name(config, each.subtests).items():
            if each.rank != rank and key not in known:
                known.add(key)
                name_ranks(report, [each.rank])
                reports.append(report)
    return reports


def _numbered(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_numbers(ranks)}"


def name_ranks(report: pytest.TestReport, ranks: Sequence[int], line: str = "") -> None:
    """Let the line of the summary begin with the ranks that failed."""
    who = f"{_numbered(ranks)}: " if ranks else ""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = f"{who}{line or crash.message}"
    elif isinstance(report.longrepr, str):
        report.longrepr = f"{who}{report.longrepr}"


def _kind(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "passed"
    is_strict = report.failed and str(report.longrepr).startswith("[XPASS(strict)]")
    return "xpassed" if is_strict else report.outcome


def _line(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2]
    message = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or str(report.longrepr)
    return message.split("\n", 1)[0]


def _by_name(config: pytest.Config, subtests: list[dict[str, Any]]) -> dict[tuple[str, int], pytest.TestReport]:
    """Return the reports of subtests by name, and number among those of that name."""
    counts: Counter[str] = Counter()
    keyed = {}
    for data in subtests:
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        counts[report.head_line] += 1
        keyed[report.head_line, counts[report.head_line]] = report
    return keyed


def _causes(told: list[Told]) -> list[Told]:
    """Return what is not a consequence of another failure, skips last; all, if all look like that."""
    causes = [each for each in told if not is_like_a_consequence(each.outcome)] or told
    return sorted(causes, key=lambda each: each.kind == "skipped")


def _as_text(text: str) -> Any:
    """Return *text* in the way that pytest shows what a test says of its failure."""
    try:
        pytest.fail(text, pytrace=False)
    except pytest.fail.Exception as error:
        return pytest.ExceptionInfo.from_exception(error).getrepr(style="value")


def _add(report: pytest.TestReport, title: str, text: str) -> None:
    longrepr: Any = report.longrepr
    if text and hasattr(longrepr, "addsection"):
        longrepr.addsection(title, text, "-")
    elif text:
        report.longrepr = f"{report.longrepr}\n{text}"
