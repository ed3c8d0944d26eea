"""The library's clock is its own, whatever a test puts into the ``time`` module."""

from __future__ import annotations

import importlib
import pkgutil
import time
from unittest import mock

import collective_scope
from collective_scope.agreement import clock


def test_clock_goes_on_while_that_of_the_time_module_is_replaced() -> None:
    """Tools that freeze time replace the functions in ``time``, and wherever those are found by their identity."""
    with mock.patch("time.monotonic", return_value=0.0), mock.patch("time.sleep", side_effect=AssertionError):
        before = clock.monotonic()
        clock.sleep(0.001)

        assert clock.monotonic() > before > 0.0
    assert clock.monotonic is not time.monotonic
    assert clock.sleep is not time.sleep


def test_modules_of_the_library_use_no_other_clock() -> None:
    """A module that imports the functions of ``time`` by itself could be given others by a test."""
    names = [each.name for each in pkgutil.walk_packages(collective_scope.__path__, "collective_scope.")]
    modules = {name: vars(importlib.import_module(name)) for name in names if not name.endswith("__main__")}
    own = (time.monotonic, time.sleep)

    assert len(modules) > 40
    assert [] == [
        name for name, held in modules.items() if any(value in own for value in held.values() if callable(value))
    ]
    assert {"collective_scope.agreement.clock", "collective_scope._subtests_report"} == {
        name for name, held in modules.items() if held.get("time") is time
    }, "the report puts the time of day into its trace"
