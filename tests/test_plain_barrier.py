"""Groups that have a barrier and no store, such as mpi4py's communicators: bounded, and in step."""

# ruff: noqa: PT012  (it is the end of a block that raises)

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from collective_scope import BarrierTimeoutError, CollectiveScope, CollectiveScopeError, collective_scope
from tests.ranks import Sequencer, run_threads, values
from tests.stores import PATIENCE_S, interrupted_when, wait_until


LONG_S = 120.0
"""A timeout that no test may reach."""

SOON_S = 10.0
"""Longer than anything takes that does not wait for a timeout."""


class _Communicator:
    """What mpi4py's `Comm` is to a scope."""

    def __init__(self, barrier: threading.Barrier, rank: int) -> None:
        self._barrier = barrier
        self._rank = rank
        self.calls = 0

    def Barrier(self) -> None:  # noqa: N802
        self.calls += 1
        self._barrier.wait(PATIENCE_S * 2)

    def Get_rank(self) -> int:  # noqa: N802
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return self._barrier.parties


class _BarrierOnly:
    """The least that is accepted."""

    def __init__(self) -> None:
        self.calls = 0

    def Barrier(self) -> None:  # noqa: N802
        self.calls += 1


class _BrokenError(Exception):
    pass


class _Broken(_BarrierOnly):
    def Barrier(self) -> None:  # noqa: N802
        msg = "MPI_ERR_COMM"
        raise _BrokenError(msg)


@pytest.fixture(name="barriers")
def _barriers() -> Iterator[list[threading.Barrier]]:
    """Return a list of barriers that are broken at the end, so that no thread stays in one."""
    barriers: list[threading.Barrier] = []
    yield barriers
    for barrier in barriers:
        barrier.abort()


def _meet(
    world_size: int, fn: Callable[[int, _Communicator, Sequencer], Any], barriers: list[threading.Barrier]
) -> list[Any]:
    barriers.append(threading.Barrier(world_size))
    return values(
        run_threads(
            world_size,
            lambda rank, _, sequencer: fn(rank, _Communicator(barriers[-1], rank), sequencer),
            timeout=60.0,
        )
    )


def test_plain_barrier_all_arrive_leaves_in_peace(barriers: list[threading.Barrier]) -> None:
    """Ranks leave together; the verdict knows of this rank only."""

    def run(_: int, communicator: _Communicator, __: Sequencer) -> Any:
        verdicts = []
        for _ in range(3):
            with collective_scope(communicator, name="s", timeout=LONG_S) as scope:
                assert 1 > scope.cleanup(lambda: 0)()
            assert scope.verdict is not None
            verdicts.append(
                (scope.verdict.ok, scope.verdict.world_size, scope.verdict.sequence, list(scope.verdict.outcomes))
            )
        return verdicts, communicator.calls

    assert [([(True, 2, i, [rank]) for i in range(3)], 3) for rank in range(2)] == _meet(2, run, barriers)


def test_plain_barrier_without_ranks_is_a_world_of_one() -> None:
    """A barrier alone is enough, on any object."""
    group = _BarrierOnly()
    with collective_scope(group) as scope:
        pass

    assert scope.verdict is not None
    assert (1, True, 1) == (scope.verdict.world_size, scope.verdict.ok, group.calls)


def test_plain_barrier_failed_rank_keeps_its_error_and_its_peers_leave(barriers: list[threading.Barrier]) -> None:
    """A failed rank comes to the barrier too; without a store, its peers do not learn of it."""

    def run(rank: int, communicator: _Communicator, _: Sequencer) -> str:
        try:
            with collective_scope(communicator, timeout=LONG_S):
                if rank == 1:
                    msg = "no"
                    raise ValueError(msg)  # noqa: TRY301
        except ValueError as error:
            return str(error)
        return "in peace"

    assert ["in peace", "no"] == _meet(2, run, barriers)


@pytest.mark.parametrize("failing", [False, True], ids=["ok", "failed"])
def test_plain_barrier_missing_rank_is_bounded(barriers: list[threading.Barrier], *, failing: bool) -> None:
    """The wait ends with the timeout, or failure_timeout, and the error says that it cannot know who is missing."""

    def run(rank: int, communicator: _Communicator, _: Sequencer) -> BaseException | None:
        if rank == 1:
            return None
        times = (LONG_S, 0.2) if failing else (0.2, LONG_S)
        with (
            pytest.raises((ValueError, BarrierTimeoutError)) as caught,
            collective_scope(communicator, name="s", timeout=times[0], failure_timeout=times[1]),
        ):
            if failing:
                msg = "no"
                raise ValueError(msg)
        return caught.value

    start = time.monotonic()
    error = _meet(2, run, barriers)[0]

    assert time.monotonic() - start < SOON_S
    if failing:
        assert isinstance(error, ValueError)
        error = error.collective_scope_errors[0]  # type: ignore[attr-defined]
    assert isinstance(error, BarrierTimeoutError)
    assert (1,) == error.missing
    assert str(error).startswith("rank 1 of 2 missing at the exit of scope 's' after 0.")
    assert "any of the ranks named may have been there" in str(error)


@pytest.mark.parametrize("wakes", [True, False], ids=["wakes", "does-not-wake"])
def test_plain_barrier_interrupted_rank_leaves_at_once(
    barriers: list[threading.Barrier],
    wakes: bool,  # noqa: FBT001  (parametrized)
) -> None:
    """Ctrl-C ends the wait."""
    barriers.append(threading.Barrier(2))
    start = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        interrupted_when(lambda: barriers[0].n_waiting == 1, wakes=wakes),
        collective_scope(_Communicator(barriers[0], 0), timeout=PATIENCE_S),
    ):
        pass

    assert time.monotonic() - start < SOON_S


def test_plain_barrier_long_wait_is_logged_without_names(
    barriers: list[threading.Barrier], caplog: pytest.LogCaptureFixture
) -> None:
    """A rank that waits says so again and again, and why it names nobody."""

    def run(rank: int, communicator: _Communicator, _: Sequencer) -> None:
        if rank == 1:
            assert wait_until(lambda: len(caplog.messages) >= 4)
        with collective_scope(communicator, name="plain", warn_after=0.05, timeout=LONG_S):
            pass

    _meet(2, run, barriers)

    said = r"rank 0 has waited \d\.\d s in scope 'plain'; the group has no store, so nobody can be named"
    assert all(re.fullmatch(said, each) for each in caplog.messages)


def test_plain_barrier_after_a_missed_round_refuses_a_body(barriers: list[threading.Barrier]) -> None:
    """While a peer has not come to the earlier barrier, the next body does not start."""

    def run(rank: int, communicator: _Communicator, _: Sequencer) -> list[str]:
        if rank == 1:
            return []
        texts = []
        for i in range(2):
            with (
                pytest.raises(BarrierTimeoutError) as caught,
                collective_scope(communicator, name=f"s{i}", timeout=0.1),
            ):
                texts.append(f"body {i}")
            texts.append(str(caught.value).split(" after ", maxsplit=1)[0])
        return texts

    assert [
        "body 0",
        "rank 1 of 2 missing at the exit of scope 's0'",
        "rank 1 of 2 missing at the entry of scope 's1'",
    ] == _meet(2, run, barriers)[0]


def _has_moved_on(running: dict[int, int], scope: int) -> bool:
    return running.get(1, scope) != scope


def test_plain_barrier_bodies_after_a_late_rank_do_not_overlap(barriers: list[threading.Barrier]) -> None:
    """A rank that comes late to one barrier does not leave all later scopes one barrier apart."""
    running: dict[int, int] = {}
    overlaps: list[dict[int, int]] = []
    lock = threading.Lock()

    def run(rank: int, communicator: _Communicator, sequencer: Sequencer) -> int:
        try:
            with collective_scope(communicator, timeout=0.2 if rank == 0 else LONG_S):
                if rank == 1:
                    sequencer.wait_for("rank 0 has left scope 0")
        except BarrierTimeoutError:
            sequencer.announce("rank 0 has left scope 0")
        for i in (1, 2, 3):
            with collective_scope(communicator, timeout=SOON_S):
                with lock:
                    running[rank] = i
                    if set(running.values()) != {i}:
                        overlaps.append(dict(running))
                if rank == 0 and i < 3:
                    # Give a rank that is not held back the time to come to its next body.
                    wait_until(functools.partial(_has_moved_on, running, i), 0.3)
                with lock:
                    del running[rank]
        return communicator.calls

    try:
        calls = _meet(2, run, barriers)
    except CollectiveScopeError as error:
        pytest.fail(f"out of step: {error}")

    assert [] == overlaps
    assert calls[0] == calls[1]


def test_plain_barrier_error_of_the_communicator_surfaces() -> None:
    """What the communicator's barrier raises is raised by the scope, after the cleanups."""
    calls: list[str] = []

    with pytest.raises(_BrokenError, match=r"^MPI_ERR_COMM$"), collective_scope(_Broken()) as scope:
        scope.cleanup(calls.append, "cleanup")
        scope.after_barrier(calls.append, "after")

    assert ["cleanup", "after"] == calls
    assert scope.verdict is None


def test_plain_barrier_collective_cleanup_in_the_body_is_refused() -> None:
    """A collective cleanup needs an agreement, which a group without a store cannot have."""
    with (
        pytest.raises(TypeError, match=r"^a group that has no store cannot agree on a collective cleanup"),
        collective_scope(_BarrierOnly()) as scope,
    ):
        scope.collective_cleanup(print)


def _registered_before(group: _BarrierOnly) -> CollectiveScope:
    scope = collective_scope(group)
    scope.collective_cleanup(print, name="destroy")
    return scope


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(_registered_before, id="collective-cleanup-registered-before-entry"),
        pytest.param(lambda group: collective_scope(_sized(group), group_barrier=True), id="group_barrier"),
    ],
)
def test_plain_barrier_agreement_asked_for_is_not_silently_left_out(
    make: Callable[[_BarrierOnly], CollectiveScope],
) -> None:
    """What cannot be done without a store is refused, or reported, never dropped in silence."""
    with pytest.raises((TypeError, CollectiveScopeError)), make(_BarrierOnly()):
        pass


def _sized(group: _BarrierOnly) -> _BarrierOnly:
    group.Get_size = lambda: 2  # type: ignore[attr-defined]
    return group
