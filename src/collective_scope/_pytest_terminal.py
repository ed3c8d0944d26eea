"""
The words of a rank past pytest's capture: warnings at once, and all that is known when the process is ended.

A process is ended by SIGTERM, from torchrun or at the limit of a CI job, or because a phase of a test
takes longer than ``kill_after``. Its main thread may be stuck in native code then.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
from typing import Any

import pytest

from . import _kill
from ._pytest_tellings import Telling
from ._scope import CollectiveScope
from .agreement.clock import monotonic, sleep
from .agreement.stacks import where_is


STAY_S = 0.5
"""How long a rank stays after it has told what it knows at its end, so that others see that it has."""


class Quiet(io.StringIO):
    """
    What the terminal of a rank writes to that shall not print.

    Args:
        stderr: Where to print what another thread writes: such as pytest-timeout's, which ends the process next.
    """

    def __init__(self, stderr: int) -> None:
        super().__init__()
        self._stderr = stderr

    def write(self, text: str) -> int:
        """Forget it."""
        if threading.current_thread() is not threading.main_thread():
            os.write(self._stderr, text.encode(errors="replace"))
        return len(text)


class Terminal:
    """
    What a rank says past pytest's capture.

    It is a filter of the library's log. ``kill_after`` has it print the failures so far before it ends the process.

    Args:
        config: pytest's.
        rank: This rank.
        world_size: Number of ranks.

    Attributes:
        rank: This rank, within the group of the latest phase.
        stderr: Where it is written, as pytest captures what the usual ones get.
        failures: The reports of failures so far.
        known: What is known of failures in this phase that is in no report yet.
    """

    def __init__(self, config: pytest.Config, rank: int, world_size: int) -> None:
        self.failures: list[pytest.TestReport] = []
        self.known: list[str] = []
        self.rank = rank
        self._config, self._world_size = config, world_size
        self._scope: CollectiveScope | None = None
        self._began = 0.0
        self._wakeup = -1
        self._masks = threading.local()
        # pytest captures neither now nor while it loads plugins.
        self.stderr = _kill.stderr_fd = os.dup(2)
        logging.getLogger("collective_scope").addFilter(self)
        _kill.last_words.append(self.tell_last)
        is_main = threading.current_thread() is threading.main_thread()
        if world_size > 1 and is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._listen_for_end()

    def leave(self) -> None:
        """Leave the process as it was; nothing is left to be told."""
        if self.stderr < 0:
            return
        logging.getLogger("collective_scope").removeFilter(self)
        _kill.last_words.remove(self.tell_last)
        if self._wakeup >= 0:
            self._claim_wakeup(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(self._wakeup)
        os.close(self.stderr)
        self.stderr, self._wakeup, _kill.stderr_fd = -1, -1, None

    def begin(self, scope: CollectiveScope) -> None:
        """Note that a phase begins."""
        self._scope, self._began = scope, monotonic()
        self.known.clear()
        if self._wakeup >= 0:
            self._claim_wakeup(self._wakeup)

    def say(self, text: str, **markup: bool) -> None:
        """Print *text*, in red or in another of pytest's colours."""
        if self._config.pluginmanager.has_plugin("terminalreporter"):
            text = self._config.get_terminal_writer().markup(text, **(markup or {"red": True}))
        os.write(self.stderr if self.stderr >= 0 else 2, f"\n{text}\n".encode(errors="replace"))

    def tell_failures(self) -> None:
        """Print the reports that would have come at the end of the session."""
        for report in self.failures:
            sections = [f"--- {name}\n{text}" for name, text in report.sections]
            self.say("\n".join([f"{report.nodeid} failed ({report.when}):", report.longreprtext, *sections]))

    def tell_last(self) -> None:
        """Print the failures so far, once for all ranks: the process is about to end."""
        if self.rank == 0:
            self.tell_failures()

    # Log records of the library.

    def filter(self, record: logging.LogRecord) -> bool:
        """Print warnings at once; keep what reports will say out of the log."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, Telling):
            return False
        if record.levelno < logging.WARNING:
            return True
        if error is not None:
            self.known.append(f"{record.getMessage()}\n{logging.Formatter().formatException(record.exc_info)}")  # type: ignore[arg-type]  # it is there, or the line before had returned
            return True
        if self._speaks(record):
            self.say(record.getMessage(), yellow=True)
        return False

    def _speaks(self, record: logging.LogRecord) -> bool:
        """Whether this rank is the lowest of those that log the same."""
        scope, what = self._scope, getattr(record, "phase", "")
        span = None if scope is None or scope.name != getattr(record, "scope", "") else scope._span  # noqa: SLF001  (a part of it)
        if span is None or what not in ("waiting", "lost"):
            return True
        peers = [span.part.records.get(rank) for rank in range(self.rank) if rank not in span.part.lost]
        if what == "lost":
            return not peers
        here = span.wait and span.wait.record.round
        return not any(peer is not None and peer.arrived and peer.round == here for peer in peers)

    # The end by SIGTERM.

    def _listen_for_end(self) -> None:
        """Have a thread of its own hear of SIGTERM: that of the rank may be stuck in native code."""
        reader, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)

        def listen() -> None:
            while numbers := os.read(reader, 64):
                if signal.SIGTERM in numbers and signal.getsignal(signal.SIGTERM) == self._pass_on:
                    self._tell_all()
                    sleep(STAY_S)
                    os._exit(128 + signal.SIGTERM)
            os.close(reader)

        signal.signal(signal.SIGTERM, self._pass_on)
        self._claim_wakeup(self._wakeup)
        os.register_at_fork(before=self._block, after_in_parent=self._unblock, after_in_child=self._forget)
        threading.Thread(target=listen, name="collective_scope-sigterm", daemon=True).start()

    def _pass_on(self, number: int, frame: Any) -> None:  # noqa: ARG002  (given to all)
        """Tell the thread, which has not heard of it while an event loop has the signals."""
        os.write(self._wakeup, bytes([number]))

    def _claim_wakeup(self, fd: int) -> None:
        """Hear of signals with *fd*, unless another library does; event loops take this over, and leave it to nobody."""
        other = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        if other not in (-1, self._wakeup):
            signal.set_wakeup_fd(other)

    # A forked child is to be ended by SIGTERM, and not its parent, which has the same pipe.

    def _block(self) -> None:
        """Let no signal come while the child is not ready."""
        self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.before)

    def _forget(self) -> None:
        if self._wakeup >= 0:
            self._claim_wakeup(-1)
            if signal.getsignal(signal.SIGTERM) == self._pass_on:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._unblock()

    def _tell_all(self) -> None:
        """Print where this rank is, and, if no lower one is left to do so, which tests have failed."""
        scope, is_lowest = self._scope, self.rank == 0
        lines = [f"rank {self.rank} of {self._world_size} is ended by SIGTERM"]
        if scope is not None:
            lines[0] += f" in {scope.name}, after {monotonic() - self._began:.1f} s"
            lines.append(where_is(threading.main_thread().ident or 0, scope._body))  # noqa: SLF001  (the plugin is a part of this package)
            if (span := scope._span) is not None:  # noqa: SLF001  (as above)
                lower = [record for rank, record in span.part.records.items() if rank < self.rank]
                is_lowest = len(lower) == self.rank and all(record.process.has_ended for record in lower)
        self.say("\n".join([*lines, *self.known]))
        if is_lowest:
            self.tell_failures()
