"""A few tests for runs with options: some pass, some fail on the last rank."""

from __future__ import annotations

import os
import threading

import pytest

from collective_scope import CollectiveScope

from .conftest import all_reduce, is_last


_attempts: list[str] = []


def test_passes() -> None:
    """Passes."""
    assert all_reduce(1.0) > 0


def test_fails_at_first() -> None:
    """Fails on the last rank, the first time."""
    _attempts.append("")
    all_reduce(1.0)
    assert len(_attempts) > 1 or not is_last()


def test_fails_again() -> None:
    """Fails on the last rank, in another way."""
    all_reduce(1.0)
    if is_last():
        raise ValueError("again")  # noqa: EM101  (looked for in the report)


def test_fails_everywhere() -> None:
    """Fails on all ranks."""
    raise AssertionError


@pytest.mark.collective
def test_marked() -> None:
    """Fails on the last rank; in scopes in any case."""
    all_reduce(1.0)
    assert not is_last()


if "SUITE_WRONG" in os.environ:

    @pytest.mark.collective(timeout=-1)
    def test_marked_wrongly() -> None:
        """Never runs."""
        raise AssertionError


if "SUITE_BY_NAME" in os.environ:

    def test_gets_a_scope_by_name(request: pytest.FixtureRequest) -> None:
        """Nothing said before that this test is to run in scopes."""
        request.getfixturevalue("collective_scope")


if "SUITE_ENDS" in os.environ:

    def test_ends() -> None:
        """End the session on the last rank."""
        if is_last() and os.environ["SUITE_ENDS"] == "exit":
            pytest.exit("the last rank has seen enough", 9)
        if is_last():
            raise KeyboardInterrupt


if "SUITE_LATE" in os.environ:

    @pytest.mark.timeout(3 if os.environ["RANK"] == "1" else 60, func_only=True)
    def test_is_late() -> None:
        """The last rank does not come."""
        if is_last():
            print("printed by the rank that is late")
            threading.Event().wait()

    @pytest.mark.timeout(2 if os.environ["RANK"] == "0" else 60)
    def test_is_waited_for() -> None:
        """The last rank comes to the end when the other one has lost its patience."""
        if is_last():
            threading.Event().wait(5)

    def test_is_stuck() -> None:
        """The last rank does not come to a collective."""
        if is_last():
            threading.Event().wait()
        all_reduce(1.0)


if "SUITE_DIES" in os.environ:

    def test_dies() -> None:
        """The last rank ends, without a word."""
        if is_last():
            os._exit(3)
        all_reduce(1.0)


@pytest.mark.parametrize("number", range(2 + (os.environ.get("SUITE_DIFFERS") == os.environ.get("RANK", ""))))
def test_of_parameters(number: int, collective_scope: CollectiveScope) -> None:
    """There may be another one on one rank."""
    collective_scope.cleanup(all_reduce, number)
