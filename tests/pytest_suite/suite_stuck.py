"""A rank that does not come to a collective, after some tests; then the launcher is ended, as at the limit of a CI job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

from .conftest import all_reduce, is_last


def test_fails_first() -> None:
    """Fails on the last rank."""
    all_reduce(1.0)
    if is_last():
        raise ValueError("known before the end")  # noqa: EM101, TRY003  (looked for in the report)


def test_ends_a_child() -> None:
    """That a forked child is ended by SIGTERM is the business of the test."""
    child = multiprocessing.get_context("fork").Process(target=threading.Event().wait)
    child.start()
    child.terminate()
    child.join()
    assert -signal.SIGTERM == child.exitcode


def test_is_stuck() -> None:
    """Never ends by itself."""
    all_reduce(1.0)  # all ranks are here
    if is_last():
        os.kill(os.getppid(), signal.SIGTERM)
        threading.Event().wait()
    all_reduce(1.0)
