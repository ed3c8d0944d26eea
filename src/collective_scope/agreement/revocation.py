"""
Free a rank that is stuck: revoke the group, then interrupt the body.

The group is revoked when a rank has failed and not all have come to the barrier after a grace, and
when those that wait there have given up on the others. Each
rank revokes its own end, on a thread of its own, because that may take a second or hang. A body that
goes on then, with wrong values or waiting for what will not come, is interrupted.
"""

from __future__ import annotations

import ctypes
import signal
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Protocol, runtime_checkable

import attrs

from .clock import monotonic, sleep
from .text import OURS


REVOKE_S = 20.0
"""How long revoking may take; a rank that it takes longer is ended."""

WAKING = signal.SIGURG
"""The signal that wakes the main thread: one that is ignored by default, and that few programs use."""

INTERRUPT_S = 0.1
"""How long a rank that has been freed has to leave the body by itself."""


@runtime_checkable
class Renewal(Protocol):
    """
    The offer of a group that can be revoked and made again.

    Attributes:
        grace: Seconds from a failure until it is revoked, if not all ranks have come.
        is_due: Whether the next scope has to make it.
        value: The result of making it; None before.
        interrupts_first: Whether a body is interrupted before the group is revoked.
    """

    grace: float
    is_due: bool
    value: object
    interrupts_first: bool

    def revoke(self, *, is_at_work: bool) -> None:
        """Make every communicator fail, for this rank, which may have work in flight, and its peers."""

    def abandon(self) -> None:
        """Begin to finish what was revoked, here or on a peer: no rank is at work with it any more."""

    def renew(self, life: str) -> None:
        """Destroy what there is, and make it anew."""

    def connect(self) -> None:
        """Connect what was made, when all ranks have made their part."""


@attrs.define(eq=False)
class Revocation:
    """
    What frees one rank in one scope.

    Args:
        renewal: The group's own part.
        thread: Identifier of the thread that runs the body.
        interrupt: What to raise in it.
        give_up: Called with a reason if the group cannot be revoked; ends the process.

    Attributes:
        is_begun: Whether the group is being revoked, or has been.
        begun_at: Since when, on the monotonic clock.
    """

    renewal: Renewal
    thread: int
    interrupt: type[BaseException]
    give_up: Callable[[str], object]
    is_begun: bool = attrs.field(default=False, init=False)
    begun_at: float = attrs.field(default=0.0, init=False)
    _failed_at: float = attrs.field(default=float("inf"), init=False)
    _done_at: float = attrs.field(default=float("inf"), init=False)
    _error: BaseException | None = attrs.field(default=None, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _revoking: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _is_over: bool = attrs.field(default=False, init=False)
    _may_be_interrupted: bool = attrs.field(default=False, init=False)
    """Whether the thread is in the body, and has not been interrupted yet."""
    _is_on_its_way: bool = attrs.field(default=False, init=False)
    """Whether an interrupt was sent that the thread has not raised, as far as is known."""

    # Called by the rank's thread.

    def enter_body(self) -> None:
        """From now on, the thread may be interrupted."""
        # Once: getsignal() makes an enumeration of its result, which is a tenth of a scope.
        if not _handled and self._is_main() and signal.getsignal(WAKING) == signal.SIG_DFL:
            _handled.append(signal.signal(WAKING, _on_waking))
        self._may_be_interrupted = True

    def leave_body(self) -> None:
        """From now on, the thread may not be interrupted; take back an interrupt that has not come yet."""
        with self._lock:
            self._may_be_interrupted = False
            if self._is_on_its_way:
                _raise_in(self.thread, None)

    def raise_in(self, frame: FrameType | None) -> None:
        """
        Raise the interrupt, on the main thread, in the body.

        Not in *frame* if that is this library's: a body that comes back from native code with an error
        may be on its way out, and ``__exit__`` must be reached. Not in a ``__del__``, out of which nothing comes.
        The control thread tries again.
        """
        is_ours = frame is not None and frame.f_code.co_filename.startswith(OURS)
        is_lost = any(step.f_code.co_name == "__del__" for step, _ in traceback.walk_stack(frame))
        if self._may_be_interrupted and not is_ours and not is_lost:
            self._may_be_interrupted = False
            raise self.interrupt

    def end(self) -> None:
        """From now on, nothing is revoked: the next scope may have a new group. Waits for what is under way."""
        with self._revoking:
            self._is_over = True

    # Called by the control thread.

    def note_failure(self, now: float) -> None:
        """Note that a rank is known to have failed."""
        self._failed_at = min(self._failed_at, now)

    def is_due(self, now: float) -> bool:
        """Whether the group is to be revoked, unless all have come to the barrier."""
        return not self.is_begun and now >= self._failed_at + self.renewal.grace

    def postpone(self) -> None:
        """Do not revoke: no rank is known to have failed since all have come to a barrier."""
        self._failed_at = float("inf")

    def begin(self, now: float, *, is_at_work: bool, is_free: bool) -> None:
        """
        Revoke this rank's end of the group.

        Args:
            now: The time, on the monotonic clock.
            is_at_work: Whether the rank has not come to the barrier.
            is_free: As for `look`.
        """
        self.is_begun, self.begun_at = True, now
        pause = 0.0
        if is_at_work and self.renewal.interrupts_first:
            # A body that goes on to start kernels while a communicator is aborted starts them on freed memory.
            self._interrupt(is_free=is_free)
            pause = INTERRUPT_S
        args = (pause, is_at_work)
        threading.Thread(target=self._revoke, args=args, name="collective_scope-revoke", daemon=True).start()

    def look(self, now: float, *, is_free: bool) -> None:
        """
        Interrupt a body that goes on; give up on a revocation that does not end.

        Args:
            now: The time, on the monotonic clock.
            is_free: Whether the thread runs the body itself, and neither a cleanup nor this library.
        """
        if self._error is not None or (now > self.begun_at + REVOKE_S and self._done_at > now):
            why = f"failed: {self._error!r}" if self._error is not None else f"took longer than {REVOKE_S:.0f} s"
            self.give_up(f"revoking the group {why}")
            self._done_at = now
        if now > self._done_at + INTERRUPT_S:
            self._interrupt(is_free=is_free)

    def _interrupt(self, *, is_free: bool) -> None:
        with self._lock:
            if not is_free or not self._may_be_interrupted:
                return
            if self._is_main() and signal.getsignal(WAKING) == _on_waking:
                # A signal also ends a wait for a lock, but reaches Python on the main thread only.
                _asked[:] = [self]
                signal.pthread_kill(self.thread, WAKING)
            else:
                self._may_be_interrupted, self._is_on_its_way = False, True
                _raise_in(self.thread, self.interrupt)

    def _is_main(self) -> bool:
        return self.thread == threading.main_thread().ident

    def _revoke(self, pause: float, is_at_work: bool) -> None:  # noqa: FBT001  (passed on by position)
        sleep(pause)
        with self._revoking:
            try:
                if not self._is_over:
                    self.renewal.revoke(is_at_work=is_at_work)
            except BaseException as error:  # handed to the control thread
                self._error = error
        self._done_at = monotonic()


_asked: list[Revocation] = []
"""The one that has sent `WAKING` last."""


_handled: list[object] = []
"""The handler of `WAKING` before ours; none as long as ours is not there."""


def _on_waking(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (given to every handler)
    """Handle `WAKING`."""
    for revocation in _asked:
        revocation.raise_in(frame)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise *error* in another thread at its next step in Python, or take back one that has not come yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)
