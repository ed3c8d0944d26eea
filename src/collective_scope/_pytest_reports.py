"""The one report that all ranks make of a phase of a test, from the reports that each of them has told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ._notes import STILL_DEAD
from ._pytest_tellings import Told, hear, kind_of, named
from ._report import is_like_a_consequence, missing, numbers, outcome_lines
from .agreement.records import Verdict
from .agreement.text import traceback_of
from .exceptions import CollectiveScopeError, PeerFailedError


_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")


def judge(verdict: Verdict | None, told: list[Told]) -> str:
    """Say what has become of a phase on the whole: ``passed``, ``skipped``, ``xfailed`` or ``failed``."""
    is_whole = verdict is not None and verdict.complete and not verdict.cleanups
    kinds = [each.kind for each in _causes(told)]
    if not is_whole or not told or any(each.outcome.also for each in told):
        return "failed"
    if set(kinds) <= {"subtests", "aside"}:
        return "passed"  # pytest itself counts subtests
    if verdict is not None and kinds == ["xpassed"] * verdict.world_size:
        return "passed"  # told at the teardown: the report of the call has it on all ranks
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
    if kind == "xfailed" and kind_of(report) != "xfailed":  # it passed here
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
    alike = [] if lead is None else sorted(each.rank for each in _causes(told) if _is_alike(each, lead))
    ours = [e for e in errors if isinstance(e, CollectiveScopeError) and not isinstance(e, PeerFailedError)]
    local = [e for e in errors if not isinstance(e, CollectiveScopeError)]
    line = lead.line if lead is not None else str(ours[0]).split("\n", 1)[0] if ours else ""
    if local and (lead is None or (rank in alike and not report.failed)):
        error = local.pop(0)
        report = make(error)
        if getattr(report.longrepr, "reprcrash", None) is None:  # a function in C has no frame to show
            report.longrepr = _as_text(traceback_of(error))
    elif lead is None or (lead.kind == "skipped" and not lead.outcome.also):
        text = str(ours[0]) if lead is None else f"skipped, and other ranks did not: {line}{_place_of_skip(lead)}"
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
        facts = "\n".join(outcome_lines(verdict)) if verdict.complete else missing(verdict) if verdict.missing else ""
        _add(report, "ranks", "" if ours and not verdict.complete else facts)
    _add(report, "notes", "\n".join(note for note in notes if note != dead))
    for each in _causes(told):
        _add(report, f"rank {each.rank}, which failed in another way", _failed_otherwise(each, alike, config))
    for error in local:
        _add(report, f"in addition, on rank {rank}", traceback_of(error))
    return report


def _place_of_skip(told: Told) -> str:
    """Return a line with the place at which a rank has skipped, if it has told that."""
    place = None if told.report is None else told.report["longrepr"]
    return f"\n  {place[0]}:{place[1]}" if isinstance(place, list | tuple) else ""


def _is_alike(one: Told, other: Told) -> bool:
    """Whether two ranks have failed in the same way; where an object is in memory makes no difference."""
    return _ADDRESS.sub("", one.line) == _ADDRESS.sub("", other.line)


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
    return f"rank{'s' * (len(ranks) > 1)} {numbers(ranks)}"


def name_ranks(report: pytest.TestReport, ranks: Sequence[int], line: str = "") -> None:
    """Let the line of the summary begin with the ranks that failed."""
    who = f"{_numbered(ranks)}: " if ranks else ""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = f"{who}{line or crash.message}"
    elif isinstance(report.longrepr, str):
        report.longrepr = f"{who}{report.longrepr}"


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
    return sorted(causes, key=lambda each: each.kind in ("skipped", "xpassed"))


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
