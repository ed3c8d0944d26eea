"""The end of patience with a whole scope: say where everybody is, and end this process."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable


logger = logging.getLogger("collective_scope")

EXIT_CODE = 124
"""What a parent sees; ``timeout(1)`` uses the same."""

NATIVE_GRACE_S = 5.0
"""How long after the deadline a process ends whose interpreter is held by native code."""


LEAVE_S = 2.0
"""How long a rank that was at the barrier at the deadline has to leave the scope."""


class Deadline:
    """
    Ends the process when a scope has not been left in time.

    A rank that is at the barrier is not stuck, its wait has a bound of its
    own: it is left alone.

    Args:
        seconds: From now.
        is_waiting: Whether this rank is at the barrier.
        explain: Returns where every rank is, as text.
    """

    def __init__(self, seconds: float, is_waiting: Callable[[], bool], explain: Callable[[], str]) -> None:
        self.at = time.monotonic() + seconds
        self._stop = threading.Event()
        args = (self._stop, seconds, is_waiting, explain)
        threading.Thread(target=_expire, args=args, name="collective_scope-deadline", daemon=True).start()
        # Needs no interpreter. There is one such timer in a process: this one replaces pytest's, for the scope.
        faulthandler.dump_traceback_later(seconds + NATIVE_GRACE_S, exit=True, file=sys.__stderr__ or 2)

    def cancel(self) -> None:
        """Let the process live: the scope has been left."""
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()


def _expire(stop: threading.Event, seconds: float, is_waiting: Callable[[], bool], explain: Callable[[], str]) -> None:
    if stop.wait(seconds):
        return
    was_waiting = is_waiting()
    explanation = explain()
    if stop.is_set():  # left meanwhile, with an error that says it all
        return
    logger.critical("%s", explanation)
    while is_waiting():
        faulthandler.cancel_dump_traceback_later()
        if stop.wait(0.1):
            return
    # The wait at the barrier ends at the same moment; what follows it is still to be done.
    if stop.wait(LEAVE_S if was_waiting else 0.0):
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    logging.shutdown()
    os._exit(EXIT_CODE)
