"""Scopes whose ranks are threads: all agree on one verdict, and every cleanup runs once, in order."""

# ruff: noqa: PT012  (it is the end of a block that raises)

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from collective_scope import (
    BarrierTimeoutError,
    CleanupMismatchError,
    CollectiveScope,
    CollectiveScopeError,
    PeerFailedError,
    PeerLostError,
    ScopeMismatchError,
    _groups,
    _teardown,
    collective_scope,
)
from collective_scope._report import UNLIMITED_ADVICE
from tests.ranks import Sequencer
from tests.stores import (
    LONG_S,
    PATIENCE_S,
    HookedStore,
    RankGroup,
    at_once,
    interrupted_when,
    is_waiting,
    meet,
    record_of,
    wait_until,
)


SOON_S = 5.0
"""Longer than anything takes that does not wait for a timeout."""

ANSWER_S = 2.0
"""How long ranks that are asked where they are have to answer, in these tests."""


def _scope(group: Any, name: str = "scope", **options: Any) -> CollectiveScope:
    return collective_scope(group, name=name, **{"timeout": LONG_S, "failure_timeout": LONG_S, **options})


def _groups_on(store: dist.Store, world_size: int) -> list[RankGroup]:
    """Return a group for each rank, with a control thread of its own, as its process would have."""
    return [RankGroup(HookedStore(store, lambda *_: None), rank, world_size) for rank in range(world_size)]


def _has_failed(store: dist.Store, rank: int) -> bool:
    record = record_of(store, rank)
    return record is not None and not record.outcome.ok


# Ranks at different places


def test_scope_different_names_raise_scope_mismatch_at_once() -> None:
    """Ranks at different scopes raise, naming both, without waiting; the next scope works."""

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> Any:
        with pytest.raises(ScopeMismatchError) as caught, _scope(group, f"scope {rank}"):
            pass
        sequencer.announce(f"rank {rank} has left")
        sequencer.wait_for(f"rank {1 - rank} has left")
        with _scope(group, "next") as following:
            pass
        return caught.value.names, following.verdict.ok  # type: ignore[union-attr]  # it is there, or the test fails

    start = time.monotonic()

    assert [({0: "scope 0", 1: "scope 1"}, True)] * 2 == meet(2, run)
    assert time.monotonic() - start < SOON_S


def test_scope_that_one_rank_left_out_is_a_mismatch_before_any_body_runs_beside_another() -> None:
    """Ranks that meet at the entry, too, never run bodies of different scopes at the same time."""
    ran: list[tuple[int, int]] = []

    def run(rank: int, group: RankGroup, _: Sequencer) -> list[str]:
        raised = []
        for number in range(4):
            if (rank, number) == (1, 1):
                continue
            try:
                with _scope(group, f"scope {number}", meet_at_entry=True, failure_timeout=2.0):
                    ran.append((number, rank))
            except CollectiveScopeError as error:
                is_refused = "The body of this scope was not run." in str(error)
                raised.append(f"{number} {type(error).__name__} {is_refused}")
        return raised

    raised = meet(2, run)

    assert "1 ScopeMismatchError True" in raised[0]
    assert "2 ScopeMismatchError True" in raised[1]
    numbers = [number for number, _ in ran]
    assert all(numbers.count(number) == 2 for number in set(numbers))
    assert 1 not in numbers


# Entries after a round to which not all came


def test_scope_after_a_missed_round_starts_when_the_straggler_has_left() -> None:
    """The body after a timeout starts only when the late rank has left the earlier scope."""
    events: list[str] = []

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> list[str]:
        raised = []
        for i in range(3):
            try:
                with _scope(group, f"scope {i}", timeout=0.2 if (i, rank) == (0, 0) else LONG_S):
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


def test_scopes_after_a_missed_round_wait_once_for_a_rank_that_is_stuck_and_go_on_when_it_is_back() -> None:
    """One rank that is stuck costs its peers one wait at an entry; what it missed, it learns; then all go on."""
    ran: list[str] = []
    count = 10

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> list[str]:
        texts = []
        if rank != 1:
            # A wait at each entry would be as long as all of this may take.
            start = time.monotonic()
        for i in range(count):
            if (rank, i) == (1, 0):
                wait: Callable[[], object] = functools.partial(sequencer.wait_for, "the others have given up")
            else:
                wait = functools.partial(str)
            scope = _scope(
                group,
                f"scope {i}",
                timeout=0.2 if (i, rank) != (0, 1) else LONG_S,
                failure_timeout=1.0,
                cleanups=[functools.partial(ran.append, f"cleanup {i}")],
            )
            with pytest.raises(BarrierTimeoutError) as caught, scope:
                ran.append(f"body {i}")
                wait()
            texts.append(str(caught.value))
        if rank != 1:
            assert time.monotonic() - start < 2.0 + SOON_S
            sequencer.announce("the others have given up")
        sequencer.announce(f"rank {rank} has caught up")
        sequencer.wait_for("rank 1 has caught up")
        with _scope(group, "last") as last:
            ran.append("last")
        return [*texts, str(last.verdict)]

    results = meet(2, run)

    assert "scope 'last', 2 of 2 ranks arrived, ok" == results[0][-1] == results[1][-1]
    assert "rank 1 of 2 missing at the exit of scope 'scope 0'" in results[0][0]
    for texts in results:
        for i, text in enumerate(texts[1:-1], 1):
            assert f"rank 1 of 2 {'still ' * (i > 1)}missing at the entry of scope 'scope {i}'" in text
            assert "The body of this scope was not run." in text
    assert {"body 0", "last", *(f"cleanup {i}" for i in range(count))} == set(ran)
    assert 2 * (count + 2) == len(ran)


def test_scope_refused_because_ranks_failed_around_it_says_so_each_time() -> None:
    """A rank that catches what a nested scope raised, and goes on, is told each time where the others failed."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        told = []
        with pytest.raises((ValueError, PeerFailedError)), _scope(group, "outer"):
            if rank:
                msg = "no"
                raise ValueError(msg)
            assert wait_until(lambda: all(_has_failed(group.store, each) for each in (1, 2)))
            for _ in range(4):
                with pytest.raises(PeerFailedError) as caught, _scope(group, "inner"):
                    pass
                told.append(caught.value.verdict.outside)
        return told

    assert [{1: "outer", 2: "outer"}] * 4 == meet(3, run)[0]


def test_scope_refused_at_entry_keeps_the_errors_of_its_cleanups() -> None:
    """Errors of cleanups after a refused body are attached to the error raised."""
    broken = ValueError("broken")

    def fail() -> None:
        raise broken

    def run(rank: int, group: RankGroup, sequencer: Sequencer) -> BaseException | None:
        if rank == 1:
            sequencer.wait_for("rank 0 has given up")
            return None
        with pytest.raises(BarrierTimeoutError), _scope(group, timeout=0.2):
            pass
        scope = _scope(group, timeout=0.2, cleanups=[fail])
        with pytest.raises(BarrierTimeoutError) as caught, scope:
            pass
        sequencer.announce("rank 0 has given up")
        assert "left" in repr(scope)
        return caught.value

    error = meet(2, run)[0]

    assert (broken,) == error.collective_scope_errors
    assert any("ValueError: broken" in note for note in error.__notes__)


# Interrupts, and a store that is gone


def test_scope_interrupted_at_the_entry_cleans_up_and_goes_on_as_itself() -> None:
    """Ctrl-C works while a scope waits at its entry; the body does not start."""
    store, ran = dist.HashStore(), list[str]()
    group = RankGroup(store, 0, 2)

    scope = _scope(group, meet_at_entry=True, cleanups=[lambda: ran.append("cleanup")])
    with pytest.raises(KeyboardInterrupt), interrupted_when(lambda: is_waiting(store, 0, "entry")), scope:
        ran.append("body")

    assert ["cleanup"] == ran
    assert "left" in repr(scope)


def test_scope_interrupted_at_the_barrier_says_which_rank_it_has_waited_for() -> None:
    """Ctrl-C surfaces as itself after the cleanups; the verdict is the one that the peers get."""
    store, ran = dist.HashStore(), list[str]()
    group = RankGroup(store, 0, 2)

    with (
        pytest.raises(KeyboardInterrupt),
        interrupted_when(lambda: is_waiting(store, 0)),
        _scope(group, timeout=PATIENCE_S) as scope,
    ):
        scope.cleanup(ran.append, "cleanup")

    assert ["cleanup"] == ran
    assert scope.verdict is not None
    assert (1,) == scope.verdict.missing
    assert "KeyboardInterrupt" == scope.verdict.failures[0].type_name


def test_scope_whose_store_is_gone_raises_peer_lost_for_its_host() -> None:
    """When the store breaks off, the rank whose process served it is known to be gone."""

    def break_off(*_: object) -> None:
        msg = "Connection reset by peer"
        raise dist.DistNetworkError(msg)

    group = RankGroup(HookedStore(dist.HashStore(), break_off), 1, 3)
    found = _groups.find(group)
    assert found is not None
    assert found[0].barrier is not None
    found[0].barrier.part.server = 0
    with pytest.raises(PeerLostError) as caught, _scope(group, "s"):
        pass

    assert (0,) == caught.value.lost
    said = re.match(r"rank 0 of 3 lost at the exit of scope 's' after (\d\.\d) s\n", str(caught.value))
    assert said is not None
    assert float(said[1]) < SOON_S


# Failures


def test_scope_tells_the_peers_that_its_process_serves_the_store() -> None:
    """A rank whose process serves the store says so, so that its peers know what is gone with it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(BarrierTimeoutError), _scope(RankGroup(server, 0, 2), timeout=0.2):
        assert wait_until(lambda: record_of(server, 0) is not None)
        assert record_of(server, 0).process.serves  # type: ignore[union-attr]  # it is there, or the test fails


def test_scope_failed_peer_raises_on_healthy_ranks_and_the_body_error_on_its_own() -> None:
    """The rank that failed raises its own error, the very object; the others learn what it was."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        error = ValueError("no")
        try:
            with _scope(group, "s") as scope:
                if rank == 1:
                    raise error
        except ValueError as caught:
            return caught is error, scope.verdict
        except PeerFailedError as caught:
            return {r: o.type_name for r, o in caught.failures.items()}, scope.verdict
        return None

    results = meet(3, run)

    assert [{1: "ValueError"}, True, {1: "ValueError"}] == [result[0] for result in results]
    assert all(verdict == results[0][1] for _, verdict in results)


def test_scope_that_failed_after_a_peer_learns_of_the_earlier_failure() -> None:
    """A rank whose body failed after a peer's is told of the peer: that may be the cause."""
    store = dist.HashStore()
    groups = [RankGroup(store, rank, 2) for rank in range(2)]

    def run(rank: int) -> list[str]:
        with pytest.raises(ValueError, match=str(rank)) as caught, _scope(groups[rank], "s"):
            if rank == 1:
                assert wait_until(lambda: (record := record_of(store, 0)) is not None and not record.outcome.ok)
            msg = str(rank)
            raise ValueError(msg)
        return [type(each).__name__ for each in getattr(caught.value, "collective_scope_errors", ())]

    assert [[], ["PeerFailedError"]] == at_once(lambda: run(0), lambda: run(1))


def test_scope_collective_cleanups_agreed_run_in_lockstep_between_local_ones() -> None:
    """Collective cleanups run on all ranks, in the order of the stack, after everyone has arrived."""
    log: list[tuple[int, str]] = []

    def run(rank: int, group: RankGroup, _: Sequencer) -> str:
        with _scope(group, "s") as scope:
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
    """A cleanup that a rank lacks runs nowhere. All ranks raise, naming the lists. Local ones still run."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        calls: list[str] = []
        with pytest.raises(CleanupMismatchError) as caught, _scope(group, "s") as scope:
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

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        calls: list[str] = []

        def fingerprint() -> int:
            return 1 // (1 - rank)

        try:
            with _scope(group, "s") as scope:
                scope.collective_cleanup(calls.append, "x", name="x", fingerprint=fingerprint)
        except (ZeroDivisionError, PeerFailedError) as error:
            return type(error), calls, [type(e) for e in error.collective_scope_errors]  # type: ignore[union-attr]  # it is there, or the test fails

    assert [
        (PeerFailedError, [], [CleanupMismatchError]),
        (ZeroDivisionError, [], [CleanupMismatchError]),
    ] == meet(2, run)


def test_scope_collective_cleanup_that_raises_is_told_to_the_peers() -> None:
    """An error in a collective cleanup is a failure like any other."""

    def run(rank: int, group: RankGroup, _: Sequencer) -> Any:
        calls: list[str] = []

        def destroy() -> None:
            calls.append("destroy")
            if rank == 1:
                msg = "no"
                raise ValueError(msg)

        try:
            with _scope(group, "s") as scope:
                scope.cleanup(calls.append, "last")
                scope.collective_cleanup(destroy)
        except (ValueError, PeerFailedError) as error:
            return type(error), calls
        return None

    assert [(PeerFailedError, ["destroy", "last"]), (ValueError, ["destroy", "last"])] == meet(2, run)


def test_scope_with_a_missing_rank_runs_no_collective_cleanup() -> None:
    """Without all ranks, nothing collective runs, nor what was for after the barrier; what was left out is told."""
    store, calls = dist.HashStore(), list[str]()
    with pytest.raises(BarrierTimeoutError) as caught, _scope(RankGroup(store, 0, 2), timeout=0.2) as scope:
        scope.cleanup(calls.append, "below")
        scope.collective_cleanup(calls.append, "collective", name="free")
        scope.after_barrier(calls.append, "after")
        scope.after_barrier(calls.append, "after all", even_if_missing=True)

    assert ["below", "after all"] == calls
    assert "cleanup 'free' (registered at " in caught.value.__notes__[0]


def test_scope_over_a_server_that_does_not_wake_at_compare_set_runs_collective_cleanups_on_all_ranks() -> None:
    """Torch's other server, ``USE_LIBUV=0``, tells nobody of a verdict that was written if absent; all ranks learn of it."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)

    def run(_: int, group: RankGroup, __: Sequencer) -> list[str]:
        calls: list[str] = []
        with _scope(group, timeout=SOON_S) as scope:
            scope.collective_cleanup(calls.append, "free", name="free")
        return calls

    assert [["free"]] * 2 == meet(2, run, store=server)


# Groups that come and go


@pytest.fixture(name="fake_group")
def _fake_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Return what makes a default group of torch's fake backend, which has no peers."""
    monkeypatch.setattr(_teardown, "_last_with_default_group", [])
    yield lambda: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    if dist.is_initialized():
        dist.destroy_process_group()


def test_scope_on_a_fake_group_is_alone(fake_group: Callable[[], None]) -> None:
    """A group whose other ranks do not exist is a world of one."""
    fake_group()
    calls: list[str] = []
    with collective_scope(timeout=SOON_S) as scope:
        scope.collective_cleanup(calls.append, "free")

    assert scope.verdict is not None
    assert (["free"], True, 1) == (calls, scope.verdict.ok, scope.verdict.world_size)


def test_scope_after_one_that_destroyed_the_default_group_says_so_and_runs_nothing_collective(
    fake_group: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A cleanup that destroys the group leaves the later scopes alone: they say so, and do not act for all ranks."""
    fake_group()
    with collective_scope(name="first") as first:
        first.cleanup(dist.destroy_process_group)
    calls: list[str] = []
    second = collective_scope(name="second")
    with pytest.raises(CleanupMismatchError, match="free"), second:
        second.collective_cleanup(calls.append, "free", name="free")
        second.cleanup(calls.append, "local")

    assert ["local"] == calls
    assert 1 == sum(
        "there is no default group any more; it was there until scope 'first'" in m for m in caplog.messages
    )


def test_scope_whose_body_makes_and_destroys_a_group_says_that_there_was_no_barrier(
    fake_group: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A worker function that does so is warned that its end is not a common one."""

    @collective_scope(name="worker")
    def worker() -> None:
        fake_group()
        dist.destroy_process_group()

    worker()

    assert ["scope 'worker': its body made a default group and destroyed it, so there is no barrier."] == [
        message.partition(" Enter")[0] for message in caplog.messages
    ]


def test_scopes_of_a_process_without_more_threads_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives no thread, a rank goes through its scopes with its peers, the failed one included."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("collective_scope-"):
            msg = "can't start new thread"
            raise RuntimeError(msg)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)

    def run(rank: int, group: RankGroup, _: Sequencer) -> list[str]:
        verdicts = []
        for i in range(3):
            scope = _scope(group, f"scope {i}", timeout=SOON_S)
            try:
                with scope:
                    scope.collective_cleanup(str, name="c")
                    if (i, rank) == (1, 1):
                        raise _BodyError  # noqa: TRY301  (raised into the scope under test)
            except (_BodyError, PeerFailedError):
                pass
            verdicts.append(str(scope.verdict))
        return verdicts

    results = meet(2, run)

    assert results[0] == results[1]
    assert ["ok", "failed: 1", "ok"] == [verdict.rpartition(", ")[2] for verdict in results[0]]


# Log messages


@pytest.mark.parametrize(
    ("meets", "kill_after", "limit"),
    [(False, None, UNLIMITED_ADVICE), (True, LONG_S, "kill_after ends this 120.0 s after the entry.")],
    ids=["exit-only", "meets-at-entry"],
)
def test_scope_that_all_ranks_are_stuck_in_is_spoken_of_by_one_in_full_and_then_in_a_line(
    caplog: pytest.LogCaptureFixture, kill_after: float | None, limit: str, *, meets: bool
) -> None:
    """If no rank comes to the end of the body, the log says so while it lasts, where each rank is, and what ends it."""
    over = threading.Event()
    groups = _groups_on(dist.HashStore(), 2)

    def run(group: RankGroup) -> None:
        with _scope(group, "before"):  # the threads of all ranks are there now
            pass
        with _scope(group, "s", warn_after=0.6, meet_at_entry=meets, kill_after=kill_after):
            assert over.wait(PATIENCE_S)  # here they are

    def look() -> None:
        try:
            assert wait_until(lambda: len(caplog.messages) > 1)
        finally:
            over.set()

    at_once(*(functools.partial(run, group) for group in groups), look)
    first, second = caplog.messages[:2]

    said = re.match(r"no rank of 2 has come to the exit of scope 's' for (\d\.\d) s\n", first)
    assert said is not None
    assert 0.6 <= float(said[1]) < 0.6 + ANSWER_S + SOON_S
    assert 2 == first.count("# here they are") == first.count("in the body of scope 's'")
    assert first.endswith(f"\n  {limit}")
    assert second.splitlines()[1:] == ["  ranks 0 and 1: still where they were"]
    assert {"0"} == {str(getattr(record, "rank", "")) for record in caplog.records}


def test_scope_that_waits_says_which_rank_is_late_in_full_and_then_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """A rank that waits names the late one, with the line where that is; later only that it has not moved."""
    groups = _groups_on(dist.HashStore(), 2)

    def run(group: RankGroup) -> None:
        with _scope(group, "before"):  # the threads of all ranks are there now
            pass
        with _scope(group, "s", warn_after=0.6):
            assert group.rank == 0 or wait_until(lambda: len(caplog.messages) > 1)  # here it is

    at_once(*(functools.partial(run, group) for group in groups))
    first, second = caplog.messages[:2]

    said = re.match(r"rank 0 has waited (\d\.\d) of 120\.0 s at the exit of scope 's'; rank 1 of 2 missing\n", first)
    assert said is not None
    assert 0.6 <= float(said[1]) < 0.6 + ANSWER_S + SOON_S
    assert "# here it is" in first
    assert "rank 1 of 2 still missing" in second
    assert "# here it is" not in second


def test_scope_that_all_ranks_are_stuck_in_a_collective_cleanup_of_is_spoken_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Between two barriers, too, the log says where ranks are that do not come to the next one."""
    over = threading.Event()
    groups = _groups_on(dist.HashStore(), 2)

    def run(group: RankGroup) -> None:
        with _scope(group, "s", warn_after=0.6) as scope:
            scope.collective_cleanup(over.wait, PATIENCE_S, name="free")

    def look() -> None:
        wait_until(lambda: bool(caplog.messages))
        over.set()

    at_once(*(functools.partial(run, group) for group in groups), look)

    assert 2 == caplog.text.count("in cleanup 'free' (registered at ")


def test_scope_to_which_a_rank_came_a_moment_before_the_timeout_does_not_miss_it() -> None:
    """A rank that is counted is not missing, also where one control thread is that of all ranks, which are threads."""
    store, is_counted, waits = dist.HashStore(), threading.Event(), list[str]()

    def hook(method: str, key: str) -> None:
        if method == "add" and key == "0 s/exit/n" and threading.current_thread().name == "collective_scope-control":
            is_deciding.set()
            assert is_counted.wait(PATIENCE_S)
        if (method, key) == ("wait", "0 s/exit/v"):
            waits.append(key)
            if len(waits) == len(groups):
                is_counted.set()

    is_deciding = threading.Event()
    groups = [RankGroup(HookedStore(store, hook), rank, 3) for rank in range(2)]  # each with a control thread

    def run(group: RankGroup) -> tuple[int, ...]:
        with (
            pytest.raises(BarrierTimeoutError) as caught,
            _scope(group, "s", timeout=0.3 if group.rank == 0 else LONG_S),
        ):
            assert group.rank == 0 or is_deciding.wait(PATIENCE_S)
        return caught.value.missing

    assert [(2,), (2,)] == at_once(*(functools.partial(run, group) for group in groups))


# Any schedule


@attrs.frozen
class _Plan:
    """One rank's part in one scope."""

    body_fails: bool
    arrives_after: int
    """How many peers must have ended their bodies before this rank ends its own."""
    cleanups: tuple[tuple[str, bool], ...]
    """Names, in the order of registration, and whether each fails; capital letters are collective."""


_schedules = st.integers(1, 3).flatmap(
    lambda world_size: st.lists(
        st.builds(
            _Plan,
            body_fails=st.booleans() | st.just(False),  # noqa: FBT003  (a field of a record, or a setting)
            arrives_after=st.integers(0, world_size - 1),
            cleanups=st.lists(
                st.tuples(st.sampled_from("ABCxyz"), st.booleans() | st.just(False)),  # noqa: FBT003  (a field of a record, or a setting)
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
        # Ranks that wait for fewer come first; so none waits for ever.
        order = sorted(range(len(plans)), key=lambda rank: (plans[rank].arrives_after, rank))
        self._before = {rank: order[: order.index(rank)][: plans[rank].arrives_after] for rank in order}

    def wait(self, rank: int, sequencer: Sequencer) -> None:
        for peer in self._before[rank]:
            sequencer.wait_for(f"the body of rank {peer} has ended")
        sequencer.announce(f"the body of rank {rank} has ended")


def _play(plan: _Plan, rank: int, group: RankGroup, sequencer: Sequencer, turns: _Turns) -> Any:
    calls: list[str] = []

    def run(name: str, *, fails: bool) -> None:
        calls.append(name)
        if fails:
            raise _CleanupError(name)

    scope = _scope(group, "any")
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
                raise _BodyError  # noqa: TRY301  (raised into the scope under test)
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        raised = error
    return scope.verdict, calls, raised


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_schedules)
def test_scope_any_schedule_gives_all_ranks_one_verdict_and_runs_each_cleanup_once(plans: list[_Plan]) -> None:
    """Any failures, any order of arrival: one verdict, all ranks raise or none, each cleanup once, in order."""
    turns = _Turns(plans)
    results = meet(len(plans), lambda rank, group, sequencer: _play(plans[rank], rank, group, sequencer, turns))
    verdicts = [verdict for verdict, _, _ in results]
    lists = [[name for name, _ in plan.cleanups if name.isupper()] for plan in plans]
    shared = set.intersection(*map(set, lists))
    orders = {tuple(name for name in names if name in shared) for names in lists}
    agreed = shared if len(orders) == 1 else set()
    differ = len({tuple(names) for names in lists}) > 1

    assert [verdicts[0]] * len(plans) == verdicts
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


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(["ok", "fails", "skips the scope"]), min_size=3, max_size=3), max_size=5))
def test_scope_that_meets_at_entry_never_runs_a_body_beside_another_one(plays: list[list[str]]) -> None:
    """Scope after scope, whichever rank fails or leaves one out: bodies of different scopes never overlap."""
    running: dict[int, int] = {}
    overlaps: list[dict[int, int]] = []
    changed = threading.Condition()

    def run(rank: int, group: RankGroup, _: Sequencer) -> None:
        for i, play in enumerate(plays):
            if play[rank] == "skips the scope":
                continue
            try:
                with _scope(group, f"scope {i}", timeout=0.2, failure_timeout=0.1, meet_at_entry=True):
                    with changed:
                        running[rank] = i
                        changed.notify_all()
                        # Long enough for a rank that is in another body to be seen there.
                        changed.wait_for(lambda: len(running) == 3, 0.02)
                        if len(set(running.values())) > 1:
                            overlaps.append(dict(running))
                    try:
                        if play[rank] == "fails":
                            raise _BodyError
                    finally:
                        with changed:
                            del running[rank]
            except (_BodyError, CollectiveScopeError):
                pass

    meet(3, run)

    assert [] == overlaps
