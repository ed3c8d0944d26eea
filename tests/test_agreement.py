"""Scopes whose ranks are threads: all agree on one verdict, and every cleanup runs once, in order."""

# ruff: noqa: PT012  (it is the end of a block that raises)

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collective_scope import (
    BarrierTimeoutError,
    CleanupMismatchError,
    CollectiveScopeError,
    PeerFailedError,
    PeerLostError,
    ScopeMismatchError,
    collective_scope,
)
from collective_scope._barrier import Barrier
from tests.ranks import Sequencer
from tests.stores import (
    PATIENCE_S,
    HookedStore,
    barrier_of,
    barriers_as_groups,
    interrupted_when,
    is_waiting,
    meet,
    wait_until,
)


LONG_S = 120.0
"""A timeout that no test may reach."""

SOON_S = 10.0
"""Longer than anything takes that does not wait for a timeout."""


@pytest.fixture(name="groups", autouse=True)
def _groups() -> Iterator[None]:
    with barriers_as_groups():
        yield


def test_scope_different_names_raise_scope_mismatch_at_once() -> None:
    """Ranks at different scopes raise, naming both, without waiting."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Any:
        with pytest.raises(ScopeMismatchError) as caught, collective_scope(barrier, name=f"scope {rank}"):  # type: ignore[arg-type]
            pass
        return caught.value.names

    start = time.monotonic()

    assert [{0: ("scope 0", 0), 1: ("scope 1", 0)}] * 2 == meet(2, run)
    assert time.monotonic() - start < SOON_S


def test_scope_one_more_on_one_rank_raises_scope_mismatch() -> None:
    """A scope that only one rank goes through is told apart from the next one, by its place in the sequence."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Any:
        if rank == 1:
            barrier.scopes += 1
        with pytest.raises(ScopeMismatchError) as caught, collective_scope(barrier, name="same"):  # type: ignore[arg-type]
            pass
        return caught.value.names

    assert [{0: ("same", 0), 1: ("same", 1)}] * 2 == meet(2, run)


def test_scope_after_a_missed_round_starts_when_the_straggler_has_left() -> None:
    """The body after a timeout starts only when the late rank has left the earlier scope."""
    events: list[str] = []

    def run(rank: int, barrier: Barrier, sequencer: Sequencer) -> list[str]:
        raised = []
        for i in range(3):
            try:
                with collective_scope(barrier, name=f"scope {i}", timeout=0.2 if (i, rank) == (0, 0) else LONG_S):  # type: ignore[arg-type]
                    events.append(f"{rank} in body {i}")
                    if (i, rank) == (0, 1):
                        sequencer.wait_for("rank 0 has left")
                    events.append(f"{rank} out of body {i}")
            except BarrierTimeoutError as error:
                raised.append(f"{i}: {error.missing}")
                if rank == 0:
                    sequencer.announce("rank 0 has left")
        return raised

    assert [["0: (1,)"], ["0: (1,)"]] == meet(2, run)
    assert events.index("1 out of body 0") < events.index("0 in body 1")


def test_scope_after_a_missed_round_refuses_its_body_while_a_rank_is_elsewhere() -> None:
    """While a rank is still in an earlier scope, the next body does not start, and that is not waited for for long."""
    ran: list[str] = []

    def run(rank: int, barrier: Barrier, sequencer: Sequencer) -> list[str]:
        if rank == 1:
            sequencer.wait_for("rank 0 has given up")
            return []
        texts = []
        for i in range(2):
            scope = collective_scope(
                barrier,  # type: ignore[arg-type]
                name=f"scope {i}",
                timeout=0.2 if i == 0 else 3600.0,
                failure_timeout=0.2,
                cleanups=[functools.partial(ran.append, f"cleanup {i}")],
            )
            with pytest.raises(BarrierTimeoutError) as caught, scope:
                ran.append(f"body {i}")
            texts.append(str(caught.value).splitlines()[0])
            assert ("The body of this scope was not run" in str(caught.value)) == (i == 1)
        sequencer.announce("rank 0 has given up")
        return texts

    texts = meet(2, run)[0]

    assert ["body 0", "cleanup 0", "cleanup 1"] == ran
    assert "rank 1 of 2 missing at the exit of scope 'scope 0'" in texts[0]
    assert "rank 1 of 2 missing at the entry of scope 'scope 1'" in texts[1]


def test_scope_refused_at_entry_keeps_the_errors_of_its_cleanups() -> None:
    """What cleanups raise when a body is refused is attached to what is raised."""
    broken = ValueError("broken")

    def fail() -> None:
        raise broken

    def run(rank: int, barrier: Barrier, sequencer: Sequencer) -> BaseException | None:
        if rank == 1:
            sequencer.wait_for("rank 0 has given up")
            return None
        with pytest.raises(BarrierTimeoutError), collective_scope(barrier, timeout=0.2):  # type: ignore[arg-type]
            pass
        scope = collective_scope(barrier, timeout=0.2, cleanups=[fail])  # type: ignore[arg-type]
        with pytest.raises(BarrierTimeoutError) as caught, scope:
            pass
        sequencer.announce("rank 0 has given up")
        assert "left" in repr(scope)
        return caught.value

    error = meet(2, run)[0]

    assert (broken,) == error.collective_scope_errors
    assert any("ValueError: broken" in note for note in error.__notes__)


def test_scope_interrupted_at_the_entry_cleans_up_and_goes_on_as_itself() -> None:
    """Ctrl-C works while a scope waits for the ranks of the one before; the body does not start."""
    store = dist.HashStore()
    barrier = barrier_of(store, 0, 2)
    barrier.in_step = False
    ran: list[str] = []

    scope = collective_scope(barrier, timeout=PATIENCE_S, cleanups=[lambda: ran.append("cleanup")])  # type: ignore[arg-type]
    with (
        pytest.raises(KeyboardInterrupt),
        interrupted_when(lambda: store.check(["collective_scope/2/0/rank/0"])),
        scope,
    ):
        ran.append("body")

    assert ["cleanup"] == ran
    assert "left" in repr(scope)


def test_scope_interrupted_at_the_barrier_has_no_verdict() -> None:
    """Ctrl-C surfaces as itself after the cleanups; what this rank would not wait for, it does not know."""
    store = dist.HashStore()
    ran: list[str] = []

    with (
        pytest.raises(KeyboardInterrupt),
        interrupted_when(lambda: is_waiting(store, 0, 2)),
        collective_scope(barrier_of(store, 0, 2), timeout=PATIENCE_S) as scope,  # type: ignore[arg-type]  # passes for one
    ):
        scope.cleanup(ran.append, "cleanup")

    assert ["cleanup"] == ran
    assert scope.verdict is None


def test_scope_whose_store_is_gone_raises_peer_lost_for_its_host() -> None:
    """When the store breaks off, the rank whose process hosted it is known to be gone."""

    def break_off(*_: object) -> None:
        msg = "Connection reset by peer"
        raise dist.DistNetworkError(msg)

    store = HookedStore(dist.HashStore(), break_off)
    barrier = barrier_of(store, 1, 3, server=0)
    with pytest.raises(PeerLostError) as caught, collective_scope(barrier, name="s", timeout=LONG_S):  # type: ignore[arg-type]
        pass

    assert (0,) == caught.value.lost
    assert str(caught.value).startswith("rank 0 of 3 lost at the exit of scope 's' after 0.")


def test_scope_failed_peer_raises_on_healthy_ranks_and_the_body_error_on_its_own() -> None:
    """The rank that failed raises its own error, the very object; the others learn what it was."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Any:
        error = ValueError("no")
        try:
            with collective_scope(barrier, name="s") as scope:  # type: ignore[arg-type]
                if rank == 1:
                    raise error
        except ValueError as caught:
            return caught is error, scope.verdict
        except PeerFailedError as caught:
            return {r: o.type_name for r, o in caught.failures.items()}, scope.verdict
        return None

    results = meet(3, run)

    assert [{1: "ValueError"}, True, {1: "ValueError"}] == [result[0] for result in results]
    assert len({result[1].encode() for result in results}) == 1


def test_scope_that_failed_after_a_peer_learns_of_the_earlier_failure() -> None:
    """A rank whose body failed after a peer's is told of the peer: that may be the cause."""

    def run(rank: int, barrier: Barrier, sequencer: Sequencer) -> list[str]:
        with pytest.raises(ValueError, match=str(rank)) as caught, collective_scope(barrier, name="s"):  # type: ignore[arg-type]
            if rank == 1:
                sequencer.wait_for("rank 0 has failed")
                msg = "1"
                raise ValueError(msg)
            with collective_scope(name="tells") as inner:
                inner.after_barrier(lambda: threading.Thread(target=tell, args=(barrier, sequencer)).start())
            msg = "0"
            raise ValueError(msg)
        return [type(each).__name__ for each in getattr(caught.value, "collective_scope_errors", ())]

    def tell(barrier: Barrier, sequencer: Sequencer) -> None:
        store = barrier.connect()
        if wait_until(lambda: store.check(["collective_scope/2/failures"]) or store.check([failures])):
            sequencer.announce("rank 0 has failed")

    failures = "collective_scope/2/0/failures"

    assert [[], ["PeerFailedError"]] == meet(2, run)


def test_scope_collective_cleanups_agreed_run_in_lockstep_between_local_ones() -> None:
    """Collective cleanups run on all ranks, in the order of the stack, after everyone has arrived."""
    log: list[tuple[int, str]] = []

    def run(rank: int, barrier: Barrier, _: Sequencer) -> str:
        with collective_scope(barrier, name="s") as scope:  # type: ignore[arg-type]
            for name in ("a", "B", "c", "D", "e"):
                if name.isupper():
                    scope.collective_cleanup(log.append, (rank, name), name=name)
                else:
                    scope.cleanup(log.append, (rank, name))
        assert scope.verdict is not None
        return "".join(name for r, name in log if r == rank) + f" {scope.verdict.ok} {scope.verdict.stage}"

    assert ["eDcBa True exit 3"] * 3 == meet(3, run)
    names = [name for _, name in log]
    assert max(i for i, name in enumerate(names) if name == "D") < names.index("B")


@pytest.mark.parametrize(
    ("names", "fingerprints", "ran"),
    [
        pytest.param({0: "XY", 1: "X"}, {}, "X", id="missing-on-one-rank"),
        pytest.param({0: "XY", 1: ""}, {}, "", id="none-on-one-rank"),
        pytest.param({0: "XY", 1: "YX"}, {}, "", id="other-order"),
        pytest.param({0: "XY", 1: "XY"}, {"Y": True}, "X", id="fingerprint-differs"),
    ],
)
def test_scope_collective_cleanups_not_shared_run_on_no_rank(
    names: dict[int, str], fingerprints: dict[str, bool], ran: str
) -> None:
    """What a rank lacks runs nowhere; all ranks raise, naming the lists; local cleanups run all the same."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Any:
        calls: list[str] = []
        with pytest.raises(CleanupMismatchError) as caught, collective_scope(barrier, name="s") as scope:  # type: ignore[arg-type]
            scope.cleanup(calls.append, "first")
            for name in names[rank]:
                scope.collective_cleanup(
                    calls.append, name, name=name, fingerprint=(lambda: rank) if name in fingerprints else None
                )
            scope.cleanup(calls.append, "last")
        notes = "\n".join(getattr(caught.value, "__notes__", []))
        return calls, sorted(caught.value.cleanups), [name for name in names[rank] if f"'{name}' (registered" in notes]

    for rank, (calls, ranks, told) in enumerate(meet(2, run)):
        assert ["last", *ran, "first"] == calls
        assert [0, 1] == ranks
        assert sorted(set(names[rank]) - set(ran)) == sorted(told)


def test_scope_fingerprint_that_raises_is_told_and_skipped() -> None:
    """A fingerprint that cannot be had counts as one that differs, and its error surfaces where it was raised."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Any:
        calls: list[str] = []

        def fingerprint() -> int:
            return 1 // (1 - rank)

        try:
            with collective_scope(barrier, name="s") as scope:  # type: ignore[arg-type]
                scope.collective_cleanup(calls.append, "x", name="x", fingerprint=fingerprint)
        except (ZeroDivisionError, PeerFailedError) as error:
            return type(error), calls, [type(e) for e in error.collective_scope_errors]  # type: ignore[union-attr]

    assert [
        (PeerFailedError, [], [CleanupMismatchError]),
        (ZeroDivisionError, [], [CleanupMismatchError]),
    ] == meet(2, run)


def test_scope_collective_cleanup_that_raises_is_told_to_the_peers() -> None:
    """An error in a collective cleanup is a failure like any other."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Any:
        calls: list[str] = []

        def destroy() -> None:
            calls.append("destroy")
            if rank == 1:
                msg = "no"
                raise ValueError(msg)

        try:
            with collective_scope(barrier, name="s") as scope:  # type: ignore[arg-type]
                scope.cleanup(calls.append, "last")
                scope.collective_cleanup(destroy)
        except (ValueError, PeerFailedError) as error:
            return type(error), calls
        return None

    assert [(PeerFailedError, ["destroy", "last"]), (ValueError, ["destroy", "last"])] == meet(2, run)


def test_scope_with_a_missing_rank_runs_no_collective_cleanup() -> None:
    """Without everyone, nothing collective runs; what was left out is told."""

    def run(rank: int, barrier: Barrier, sequencer: Sequencer) -> Any:
        if rank == 1:
            sequencer.wait_for("rank 0 has left")
            return None
        calls: list[str] = []
        with pytest.raises(BarrierTimeoutError) as caught, collective_scope(barrier, timeout=0.2) as scope:  # type: ignore[arg-type]
            scope.cleanup(calls.append, "below")
            scope.collective_cleanup(calls.append, "collective", name="free")
            scope.after_barrier(calls.append, "after")
        sequencer.announce("rank 0 has left")
        return calls, caught.value.__notes__

    calls, notes = meet(2, run)[0]

    assert ["below", "after"] == calls
    assert "cleanup 'free' (registered at " in notes[0]


def test_scope_nested_on_one_group_leave_one_after_the_other() -> None:
    """Scopes within scopes on the same group each have their own verdict; a failure goes through both."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> list[str]:
        names = []
        try:
            with collective_scope(barrier, name="outer") as outer:  # type: ignore[arg-type]
                with collective_scope(barrier, name="fine") as fine:  # type: ignore[arg-type]
                    pass
                try:
                    with collective_scope(barrier, name="inner") as inner:  # type: ignore[arg-type]
                        if rank == 0:
                            msg = "no"
                            raise ValueError(msg)
                finally:
                    names.append(f"inner {sorted(inner.verdict.failures)}")  # type: ignore[union-attr]
        except (ValueError, PeerFailedError) as error:
            names.append(type(error).__name__)
        return [*names, f"fine {fine.verdict.ok}", f"outer {sorted(outer.verdict.failures)}"]  # type: ignore[union-attr]

    results = meet(2, run)

    assert ["inner [0]", "ValueError", "fine True", "outer [0, 1]"] == results[0]
    assert ["inner [0]", "PeerFailedError", "fine True", "outer [0, 1]"] == results[1]


# Any schedule


@attrs.frozen
class _Plan:
    """What one rank does in one scope."""

    body_fails: bool
    arrives_after: int
    """How many peers must have ended their bodies before this rank ends its own."""
    cleanups: tuple[tuple[str, bool], ...]
    """Names, in the order of registration, and whether each fails; capital letters are collective."""


_schedules = st.integers(1, 3).flatmap(
    lambda world_size: st.lists(
        st.builds(
            _Plan,
            body_fails=st.booleans() | st.just(False),  # noqa: FBT003
            arrives_after=st.integers(0, world_size - 1),
            cleanups=st.lists(
                st.tuples(st.sampled_from("ABCxyz"), st.booleans() | st.just(False)),  # noqa: FBT003
                unique_by=lambda cleanup: cleanup[0],
                max_size=5,
            ).map(tuple),
        ),
        min_size=world_size,
        max_size=world_size,
    )
)


class _BodyError(Exception):
    pass


class _CleanupError(Exception):
    pass


class _Turns:
    """Lets bodies end in the order that a schedule asks for."""

    def __init__(self, plans: list[_Plan]) -> None:
        # Whoever waits for fewer comes first; so nobody waits for ever.
        order = sorted(range(len(plans)), key=lambda rank: (plans[rank].arrives_after, rank))
        self._before = {rank: order[: order.index(rank)][: plans[rank].arrives_after] for rank in order}

    def wait(self, rank: int, sequencer: Sequencer) -> None:
        for peer in self._before[rank]:
            sequencer.wait_for(f"the body of rank {peer} has ended")
        sequencer.announce(f"the body of rank {rank} has ended")


def _play(plan: _Plan, rank: int, barrier: Barrier, sequencer: Sequencer, turns: _Turns) -> Any:
    calls: list[str] = []

    def run(name: str, *, fails: bool) -> None:
        calls.append(name)
        if fails:
            raise _CleanupError(name)

    scope = collective_scope(barrier, name="any", timeout=LONG_S, failure_timeout=LONG_S)  # type: ignore[arg-type]
    raised: BaseException | None = None
    try:
        with scope:
            for name, fails in plan.cleanups:
                if name.isupper():
                    scope.collective_cleanup(run, name, name=name, fails=fails)
                else:
                    scope.cleanup(run, name, fails=fails)
            scope.after_barrier(calls.append, "after")
            turns.wait(rank, sequencer)
            if plan.body_fails:
                raise _BodyError  # noqa: TRY301
    except BaseException as error:  # noqa: BLE001
        raised = error
    return scope.verdict, calls, raised


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_schedules)
def test_scope_any_schedule_gives_all_ranks_one_verdict_and_runs_each_cleanup_once(plans: list[_Plan]) -> None:
    """Whatever fails, in whatever order ranks arrive: one verdict, all raise or none, each cleanup once, in order."""
    turns = _Turns(plans)
    results = meet(len(plans), lambda rank, barrier, sequencer: _play(plans[rank], rank, barrier, sequencer, turns))
    verdicts = [verdict for verdict, _, _ in results]
    lists = [[name for name, _ in plan.cleanups if name.isupper()] for plan in plans]
    shared = set.intersection(*map(set, lists))
    orders = {tuple(name for name in names if name in shared) for names in lists}
    agreed = shared if len(orders) == 1 else set()
    differ = len({tuple(names) for names in lists}) > 1

    assert len({verdict.encode() for verdict in verdicts}) == 1
    assert verdicts[0].complete
    assert differ == bool(verdicts[0].cleanups)
    fails = []
    for plan, (_, calls, _) in zip(plans, results, strict=True):
        expected = [name for name, _ in reversed(plan.cleanups) if name.islower() or name in agreed]
        assert [*expected, "after"] == calls
        fails.append(plan.body_fails or any(fails for name, fails in plan.cleanups if name in expected))
    assert [rank for rank, failed in enumerate(fails) if failed] == sorted(verdicts[0].failures)
    for plan, failed, (_, _, raised) in zip(plans, fails, results, strict=True):
        assert (raised is not None) == (any(fails) or differ)
        if plan.body_fails:
            assert isinstance(raised, _BodyError)
        elif failed:
            assert isinstance(raised, _CleanupError | ExceptionGroup)
        elif raised is not None:
            assert isinstance(raised, CollectiveScopeError)
        if differ and raised is not None:
            told = [raised, *getattr(raised, "collective_scope_errors", ())]
            assert any(isinstance(error, CleanupMismatchError) for error in told)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(["ok", "fails", "skips the scope"]), min_size=3, max_size=3), max_size=6))
def test_scope_any_sequence_of_scopes_never_runs_a_body_beside_an_earlier_one(plays: list[list[str]]) -> None:
    """Scope after scope, whoever fails or leaves one out: bodies of different scopes never overlap."""
    running: dict[int, int] = {}
    overlaps: list[dict[int, int]] = []
    lock = threading.Lock()

    def run(rank: int, barrier: Barrier, _: Sequencer) -> None:
        for i, play in enumerate(plays):
            if play[rank] == "skips the scope":
                continue
            try:
                with collective_scope(barrier, name=f"scope {i}", timeout=0.2, failure_timeout=0.1):  # type: ignore[arg-type]
                    with lock:
                        running[rank] = i
                        if set(running.values()) != {i}:
                            overlaps.append(dict(running))
                    try:
                        if play[rank] == "fails":
                            raise _BodyError
                    finally:
                        with lock:
                            del running[rank]
            except (_BodyError, CollectiveScopeError):
                pass

    meet(3, run)

    assert [] == overlaps
