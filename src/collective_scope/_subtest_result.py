"""The result of one subtest, on all ranks."""

from __future__ import annotations

import re
import unittest
from typing import Literal

import attrs

from .agreement.records import Outcome, Verdict
from .agreement.rounds import failures_in_order
from .agreement.text import message_of, one_line, type_name


Status = Literal["passed", "failed", "skipped", "xfailed", "not run"]


ENDS = (
    "KeyboardInterrupt",
    "GeneratorExit",
    "asyncio.exceptions.CancelledError",
    "_pytest.outcomes.Exit",
)
"""Interrupts: errors that end the loop, by name, as peers are told of them. A test that exits is a failed test, as in pytest."""

_ENDS_LATER = re.compile(rf": ({'|'.join(map(re.escape, ENDS))})(: |$)")
"""Where a later error of a rank is one of them."""


class ExpectedFailure(unittest.SkipTest):
    """Raised by `Subtests.xfail`."""


@attrs.define(eq=False)
class SubtestResult:
    """
    What became of one subtest; the same on every rank, but for *error* and the times.

    Attributes:
        id: Its name.
        status: What became of it.
        reason: Why it was skipped, failed as expected, or did not run.
        error: The error that this rank raised; the frames that it came through have lost their locals.
        verdict: Each rank's part in it.
        began: When it began on this rank, on the monotonic clock, in seconds.
        seconds: How long it took there.
        waited: Seconds that ranks waited in it for others that did not come.
        history: Phases of this rank, each with the time at which it began, on the monotonic clock; among them
            ``"failed"`` and ``"revoked"``, which happened in a phase.
    """

    id: str
    status: Status = "passed"
    reason: str = ""
    error: BaseException | None = None
    verdict: Verdict | None = None
    began: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[tuple[float, str]] = attrs.field(factory=list)

    @property
    def cause(self) -> tuple[int, Outcome] | None:
        """The rank whose failure was told first, and what went wrong there; None if nothing did."""
        return next(iter(failures_in_order(self.failures)), None)

    @property
    def failures(self) -> dict[int, Outcome]:
        """The failures, by rank."""
        return {} if self.verdict is None else self.verdict.failures

    @property
    def is_told_ok(self) -> bool:
        """Whether the ranks have told each other that all went well, whatever this one has raised after that."""
        return self.verdict is not None and self.verdict.ok


def told(rank: int, outcome: Outcome) -> str:
    """Say in a line what went wrong on *rank*."""
    return f"rank {rank}, {outcome.phase}: {one_line(outcome.type_name, outcome.message)}"


def judge_subtest(error: BaseException | None, verdict: Verdict | None) -> tuple[Status, str]:
    """Say what became of a subtest on all ranks, from what this one raised and what the verdict says of all."""
    if error is None:
        return "passed", ""
    failures = {} if verdict is None else verdict.failures
    kinds = {rank: _kind(outcome) for rank, outcome in failures.items()}
    if verdict is not None and verdict.complete and len(kinds) == verdict.world_size and len(set(kinds.values())) == 1:
        status = kinds[0]
        return status, message_of(error) if status != "failed" else ""
    first = next((rank for rank, _ in failures_in_order(failures)), None)
    if first is None or kinds[first] == "failed":
        return "failed", ""
    some = [str(rank) for rank, kind in kinds.items() if kind == kinds[first]]
    what = "skipped it" if kinds[first] == "skipped" else "let it fail as expected"
    return "failed", f"only rank{'s' * (len(some) > 1)} {', '.join(some)} {what}"


def _kind(outcome: Outcome) -> Status:
    if outcome.type_name.endswith((ExpectedFailure.__name__, "XFailed")):  # the second is pytest's
        return "xfailed"
    return "skipped" if outcome.is_skip else "failed"


def ends_loop(error: BaseException | None, verdict: Verdict | None) -> bool:
    """
    Whether a subtest in which this rank raised *error* ends the loop: a rank was interrupted.

    The verdict says it to every rank alike. A rank that was interrupted at the barrier has none; and one that
    was interrupted after it has told nobody.
    """
    if error is not None and (type_name(error) in ENDS or (verdict is None and not isinstance(error, Exception))):
        return True
    outcomes = () if verdict is None else verdict.failures.values()
    return any(each.type_name in ENDS or any(map(_ENDS_LATER.search, each.also)) for each in outcomes)
