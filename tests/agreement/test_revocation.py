"""A revocation belongs to one scope: it comes in time or not at all, and what fails in it ends the process."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from collective_scope.agreement.revocation import REVOKE_S, Revocation
from collective_scope.exceptions import RevokedInterrupt
from tests.agreement.conftest import World
from tests.stores import PATIENCE_S, wait_until


def _revocation(world: World, given_up: list[str]) -> Revocation:
    return Revocation(world, threading.get_ident(), RevokedInterrupt, given_up.append)


def is_done(revocation: Revocation) -> bool:
    """Whether the thread that revokes has come to its end."""
    return revocation._done_at < time.monotonic()  # noqa: SLF001  (looked into on purpose)


def test_revocation_of_a_scope_that_has_been_left_leaves_the_next_group_alone() -> None:
    """The thread that revokes may be late: by then the rank is in the next scope, which has a group of its own."""
    late = World(int, interrupts_first=True)  # the thread pauses first: the body shall have time to go
    revocation = _revocation(late, [])
    revocation.begin(time.monotonic(), is_at_work=True, is_free=False)
    revocation.end()

    assert wait_until(lambda: is_done(revocation))
    assert [] == late.revoked


def test_revocation_under_way_is_waited_for_by_the_rank_that_leaves() -> None:
    """Nothing is destroyed or made while a communicator is aborted."""
    is_begun, may_end = threading.Event(), threading.Event()

    def revoke() -> None:
        is_begun.set()
        may_end.wait(PATIENCE_S)

    revocation = _revocation(World(revoke), [])
    revocation.begin(time.monotonic(), is_at_work=True, is_free=False)
    assert is_begun.wait(PATIENCE_S)
    leaving = threading.Thread(target=revocation.end)
    leaving.start()

    assert leaving.is_alive()
    may_end.set()
    leaving.join(PATIENCE_S)
    assert not leaving.is_alive()


def test_interrupt_that_comes_in_a_finalizer_is_raised_later() -> None:
    """Python ignores what a finalizer raises, so an interrupt that came there would be lost."""
    revocation = _revocation(World(int), [])
    revocation.enter_body()
    came: list[str] = []

    class Finalized:
        def __del__(self) -> None:
            revocation.raise_in(sys._getframe())  # noqa: SLF001  (as the handler of a signal is given it)
            came.append("to the end")

    Finalized()

    assert ["to the end"] == came
    with pytest.raises(RevokedInterrupt):
        revocation.raise_in(sys._getframe())  # noqa: SLF001  (as above)


def test_revocation_that_fails_ends_the_process_with_the_reason() -> None:
    """A communicator that cannot be revoked leaves a rank stuck for ever."""

    def revoke() -> None:
        msg = "no such communicator"
        raise OSError(msg)

    given_up: list[str] = []
    revocation = _revocation(World(revoke), given_up)
    revocation.begin(time.monotonic(), is_at_work=True, is_free=False)
    assert wait_until(lambda: is_done(revocation))
    revocation.look(time.monotonic(), is_free=False)

    assert ["revoking the group failed: OSError('no such communicator')"] == given_up


def test_revocation_that_does_not_come_back_ends_the_process_with_the_reason() -> None:
    """An abort that hangs is bounded."""
    may_end = threading.Event()
    given_up: list[str] = []
    revocation = _revocation(World(lambda: may_end.wait(PATIENCE_S)), given_up)
    now = time.monotonic()
    revocation.begin(now, is_at_work=True, is_free=False)
    revocation.look(now + REVOKE_S - 1, is_free=False)
    assert [] == given_up
    revocation.look(now + REVOKE_S + 1, is_free=False)
    may_end.set()

    assert [f"revoking the group took longer than {REVOKE_S:.0f} s"] == given_up
