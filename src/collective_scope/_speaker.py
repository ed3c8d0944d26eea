"""One scope's words in the log while ranks are late or gone."""

from __future__ import annotations

import logging

import attrs

from . import _report
from .agreement.records import Verdict


logger = logging.getLogger("collective_scope")


@attrs.define(eq=False)
class Speaker:
    """
    Speaks for one rank in one scope, from the control thread: in full first, later of what has changed.

    Args:
        scope: Name of the scope.
        rank: The rank, within the group.
    """

    scope: str
    rank: int
    _said: dict[int, str] = attrs.field(factory=dict, init=False)

    def __call__(self, what: str, verdict: Verdict, seconds: float) -> None:
        """Say it; see `agreement.watch.Speak`."""
        if what == "lost":
            text = _report.gone(verdict, self.rank, seconds)
        else:
            text = _report.late(what, verdict, self.rank, seconds, self._said)
        logger.warning("%s", text, extra={"rank": self.rank, "scope": self.scope, "phase": what})
