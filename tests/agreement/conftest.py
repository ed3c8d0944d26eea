"""Fixtures for tests of the agreement whose ranks are threads."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from collective_scope.agreement import process
from collective_scope.agreement.process import Process, me
from tests.stores import Rank


@pytest.fixture(name="thawed")
def _thawed() -> Iterator[threading.Event]:
    """Return an event on which stores hang; it is set at the end."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(name="rank_on")
def _rank_on(thawed: threading.Event) -> Iterator[Callable[..., Rank]]:
    """Return what makes a rank, given its store, its number and the world size; it ends with the test."""
    made: list[Rank] = []

    def make(*args: Any, **options: Any) -> Rank:
        made.append(Rank(*args, **options))
        return made[-1]

    yield make
    thawed.set()
    for rank in made:
        rank.control.stop()
    for rank in made:
        rank.end()


@attrs.frozen
class Other:
    """
    A process that sleeps, and does nothing of what a rank does.

    Attributes:
        process: Its name.
    """

    process: Process
    _popen: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it; what is left of it stays until the end of the test."""
        self._popen.kill()


@pytest.fixture(name="other")
def _other() -> Iterator[Other]:
    """Return another process of this machine."""
    with subprocess.Popen(["sleep", "600"]) as popen:  # noqa: S607  (the system's own)
        start = int(process._stat(popen.pid)[19])  # noqa: SLF001  (looked into on purpose)
        yield Other(attrs.evolve(me(), pid=popen.pid, start=start), popen)
        popen.kill()


@attrs.define
class World:
    """A group whose revocation does what the test wants."""

    on_revoke: Callable[[], object]
    interrupts_first: bool = False
    grace: float = 0.5
    is_due: bool = False
    value: object = None
    revoked: list[bool] = attrs.field(factory=list)

    def revoke(self, *, is_at_work: bool) -> None:
        """Note that this was called, and do it."""
        self.revoked.append(is_at_work)
        self.on_revoke()

    def abandon(self) -> None:
        """Nothing is to be taken down."""

    def connect(self) -> None:
        """Nothing is to be connected."""

    def renew(self, life: str) -> None:
        """Never called: no scope is entered here."""
        raise AssertionError(life)
