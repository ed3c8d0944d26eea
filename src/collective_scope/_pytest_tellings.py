"""
The words of the ranks to each other on a phase of a test.

A rank tells by raising in the scope of the phase. Its error has the name of the one that the test raised,
and brings pytest's own report along as text. So the verdict of the scope has all reports, on every rank.
"""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest

from .agreement.records import Outcome, Verdict
from .agreement.rounds import failures_in_order
from .agreement.text import MESSAGE_LIMIT, message_of, one_line, shorten


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
    kind = kind_of(report)
    if kind == "passed" and not subtests:
        return None
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    data["sections"] = [(name, shorten(text, SECTION_LIMIT)) for name, text in report.sections]
    told = {"kind": "subtests" if kind == "passed" else kind, "report": data, "subtests": subtests}
    if len(json.dumps(told, default=repr)) > REPORT_LIMIT:
        told |= {"report": None, "text": shorten(report.longreprtext, REPORT_LIMIT // 2), "subtests": []}
    return telling(error, line_of(report), **told)


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


def is_xpassed(report: pytest.TestReport) -> bool:
    """Whether a test has passed that was to fail, which is a failure."""
    return report.failed and str(report.longrepr).startswith("[XPASS(strict)]")


def kind_of(report: pytest.TestReport) -> str:
    """Say what has become of a phase here."""
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "passed"
    return "xpassed" if is_xpassed(report) else report.outcome


def line_of(report: pytest.TestReport) -> str:
    """Say why, in one line."""
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2]
    message = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or str(report.longrepr)
    return message.split("\n", 1)[0]
