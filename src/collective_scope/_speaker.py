"""One scope's words in the log while ranks are late or gone."""

from __future__ import annotations

import contextlib
import logging
import os

import attrs

from . import _report
from .agreement.records import Verdict
from .agreement.text import message_of, one_line, type_name


logger = logging.getLogger("collective_scope")


@attrs.define(eq=False)
class Speaker:
    """
    Speaks for one rank in one scope, from the control thread: in full first, later of what has changed.

    Args:
        scope: Name of the scope.
        rank: The rank, within the group.
        kill_after: How long the scope may last, in seconds, before the process is ended; None for ever.
    """

    scope: str
    rank: int
    kill_after: float | None
    _said: dict[int, str] = attrs.field(factory=dict, init=False)

    def __call__(self, what: str, verdict: Verdict, left: float | None) -> None:
        """Say it; see `agreement.watch.Speak`."""
        if what == "lost":
            text = _report.gone(verdict, self.rank)
        else:
            text = _report.late(verdict, self.rank, left, self._said, self.kill_after)
        try:
            logger.warning("%s", text, extra={"rank": self.rank, "scope": self.scope, "phase": what})
        except BaseException as broken:  # of a handler: it must not end the thread that looks after all scopes
            text += f"\n(This could not be logged: {one_line(type_name(broken), message_of(broken))})\n"
            with contextlib.suppress(OSError):  # there is no stderr either
                os.write(2, text.encode(errors="replace"))
