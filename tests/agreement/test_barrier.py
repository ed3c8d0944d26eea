"""The barrier of a group, its ranks as threads: one verdict, bounded, nothing left behind."""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch.distributed as dist

from collective_scope.agreement import barrier, control
from collective_scope.agreement.barrier import GRACE_S
from collective_scope.agreement.process import me
from collective_scope.agreement.records import OK, Outcome, Verdict
from collective_scope.agreement.rounds import failures_in_order, path_of
from tests.ranks import Sequencer, run_threads, values
from tests.stores import (
    PATIENCE_S,
    HookedStore,
    Rank,
    at_once,
    interrupted_when,
    is_control,
    is_waiting,
    record_of,
    wait_until,
)


SOON_S = 5.0
"""Longer than anything takes that does not wait for a timeout."""

SHORT_S = 2.0
"""A timeout that is meant to run out, long enough for a busy machine to start all ranks."""

FAILED = Outcome("body", "ValueError", "no", "Traceback ...")

RankOn = Callable[..., Rank]


def _all(rank_on: RankOn, world_size: int, run: Callable[[Rank], Any], *, store: Any = None) -> list[Any]:
    """Call *run* with each of a world of new ranks, on a thread of its own; return what it returned."""
    store = store or dist.HashStore()
    ranks = [rank_on(store, rank, world_size) for rank in range(world_size)]
    return at_once(*(functools.partial(run, rank) for rank in ranks))


def _reset(*_: object) -> None:
    msg = "Connection reset by peer"
    raise dist.DistNetworkError(msg)


# Agreement


@pytest.mark.parametrize("world_size", [2, 5])
def test_barrier_all_ok_is_one_complete_verdict(rank_on: RankOn, world_size: int) -> None:
    """When all ranks arrive well, all hold the same verdict, and are in step."""
    verdicts = _all(rank_on, world_size, lambda rank: (rank.arrive(), rank.barrier.in_step))

    everyone = tuple(range(world_size))
    expected = Verdict("scope", world_size, everyone, outcomes=dict.fromkeys(everyone, OK))
    assert [(expected, True)] * world_size == verdicts


@pytest.mark.parametrize("failing", [{0}, {2}, {0, 1, 2}], ids=str)
def test_barrier_failures_are_in_the_verdict_of_every_rank(rank_on: RankOn, failing: set[int]) -> None:
    """Ranks that failed are named to all, themselves included, each with its place in the order of failures."""
    verdicts = _all(rank_on, 3, lambda rank: rank.arrive(outcome=FAILED if rank.rank in failing else OK))

    assert [verdicts[0]] * 3 == verdicts
    assert failing == set(verdicts[0].failures)
    orders = [outcome.order for _, outcome in failures_in_order(verdicts[0].outcomes)]
    assert 0 < orders[0]
    assert len(set(orders)) == len(failing)
    assert verdicts[0].complete


def test_barrier_rounds_do_not_mix(rank_on: RankOn) -> None:
    """Many rounds in a row, some with failures, each have their own verdict."""

    def run(rank: Rank) -> list[list[int]]:
        outcomes = [FAILED if i % 5 == rank.rank else OK for i in range(50)]
        return [list(rank.arrive(f"{i} scope", outcome=outcome).failures) for i, outcome in enumerate(outcomes)]

    expected = [[i % 5] if i % 5 < 3 else [] for i in range(50)]
    assert [expected] * 3 == _all(rank_on, 3, run)


def test_barrier_in_a_subgroup_knows_the_global_ranks(rank_on: RankOn) -> None:
    """The verdict of a subgroup says what its ranks are called in the default group, whether all is well or not."""

    def run(rank: Rank) -> list[tuple[int, ...]]:
        rank.barrier.global_ranks = (3, 7)
        return [rank.arrive().global_ranks, rank.arrive("1 scope", outcome=FAILED).global_ranks]

    assert [[(3, 7), (3, 7)]] * 2 == _all(rank_on, 2, run)


def test_barrier_odd_names_arrive(rank_on: RankOn) -> None:
    """A scope may have any name."""
    name = "two\nlines / \\ \0, 🙂 and \udc80"
    path = path_of("", 0, name)

    verdicts = _all(rank_on, 2, lambda rank: rank.arrive(path, outcome=FAILED if rank.rank else OK))

    assert [name, name] == [verdict.scope for verdict in verdicts]
    assert all(verdict.complete for verdict in verdicts)


# Missing and late ranks


@pytest.mark.parametrize("absent", [{0}, {3}, {1, 2, 3}], ids=str)
def test_barrier_missing_ranks_are_named_on_every_rank(rank_on: RankOn, absent: set[int]) -> None:
    """All ranks that came read the same list of those that did not, rank 0 like any other, and are out of step."""

    def run(rank: Rank) -> tuple[Verdict, bool] | None:
        return None if rank.rank in absent else (rank.arrive(timeout=SHORT_S), rank.barrier.in_step)

    present = [each for each in _all(rank_on, 4, run) if each is not None]

    assert [present[0]] * len(present) == present
    verdict, in_step = present[0]
    assert (tuple(sorted(absent)), tuple(sorted(set(range(4)) - absent))) == (verdict.missing, verdict.arrived)
    assert SHORT_S <= verdict.timeout < SHORT_S + SOON_S
    assert not in_step


def test_barrier_late_rank_reads_the_same_verdict_and_all_are_in_step_once_they_have_met(rank_on: RankOn) -> None:
    """A rank that comes after the timeout is told at once what was decided; the next round mends it."""
    store = dist.HashStore()
    early, late = (rank_on(store, rank, 2) for rank in range(2))
    first = early.arrive(timeout=0.2)
    start = time.monotonic()

    assert late.arrive() == first
    assert time.monotonic() - start < SOON_S
    assert (1,) == first.missing
    assert [False, False] == [each.barrier.in_step for each in (early, late)]
    assert all(
        verdict.ok for verdict in at_once(*(functools.partial(r.arrive, "1 scope", "entry") for r in (early, late)))
    )
    assert [True, True] == [each.barrier.in_step for each in (early, late)]


def test_barrier_late_rank_reads_the_verdict_although_its_writer_has_left_the_group(rank_on: RankOn) -> None:
    """A rank that gives up on another, and destroys its group then, leaves its word to that one."""
    store = dist.HashStore()
    early, late = (rank_on(store, rank, 2) for rank in range(2))
    late.barrier.join()
    assert wait_until(lambda: record_of(store, 1) is not None)
    verdict = early.arrive(timeout=0.2)
    early.barrier.leave("has destroyed its group")

    assert verdict == late.arrive(timeout=2.0)


@pytest.mark.parametrize("at", ["check", "add", "compare_set"])
def test_barrier_timeout_at_the_moment_the_last_rank_arrives_is_no_timeout(rank_on: RankOn, at: str) -> None:
    """Where the last arrival comes before the decision, wherever that is on its way, all leave well."""
    store, deciding, arrived = dist.HashStore(), threading.Event(), threading.Event()

    def hook(method: str, key: str) -> None:
        if is_control() and method == at and key in ("0 scope/exit/v", "0 scope/exit/n") and not deciding.is_set():
            deciding.set()
            assert arrived.wait(PATIENCE_S)

    def last() -> Verdict:
        assert deciding.wait(PATIENCE_S)
        verdict = late.arrive()
        arrived.set()
        return verdict

    early, late = rank_on(HookedStore(store, hook), 0, 2), rank_on(store, 1, 2)

    assert [True, True] == [verdict.ok for verdict in at_once(lambda: early.arrive(timeout=0.2), last)]


@pytest.mark.parametrize("outcome", [OK, FAILED], ids=["ok", "failed"])
def test_barrier_last_rank_that_hangs_before_it_writes_the_verdict_is_not_missing(
    rank_on: RankOn, thawed: threading.Event, outcome: Outcome
) -> None:
    """If all have come, and the rank that came last cannot say so, its peers find that by the count."""
    store, deciding, hanging = dist.HashStore(), threading.Event(), threading.Event()

    def hang(method: str, key: str) -> None:
        if (method, key) == ("compare_set", "0 scope/exit/v"):
            hanging.set()
            thawed.wait(PATIENCE_S)

    def await_last(method: str, key: str) -> None:
        if is_control() and (method, key) == ("add", "0 scope/exit/n"):
            deciding.set()
            assert hanging.wait(PATIENCE_S)

    def last() -> Verdict:
        assert deciding.wait(PATIENCE_S)
        return late.arrive(outcome=outcome)

    def first() -> Verdict:
        verdict = early.arrive(timeout=0.2)
        thawed.set()
        return verdict

    early, late = rank_on(HookedStore(store, await_last), 0, 2), rank_on(HookedStore(store, hang), 1, 2)
    verdicts = at_once(first, last)

    assert verdicts[0] == verdicts[1]
    assert verdicts[0].complete
    assert ([] if outcome is OK else [1]) == list(verdicts[0].failures)


def test_barrier_rank_that_stands_still_while_it_decides_does_not_overlook_one_that_has_arrived(
    rank_on: RankOn,
) -> None:
    """A rank that is counted and has not told of itself yet is waited for, however long the first look took."""
    store, deciding, goes_on = dist.HashStore(), threading.Event(), threading.Event()
    looks: list[str] = []

    def stand_still(method: str, key: str) -> None:
        if is_control() and (method, key) == ("add", "0 scope/exit/n"):
            deciding.set()
        if is_control() and deciding.is_set() and key == "rank/1":
            looks.append(key)
            if len(looks) == 1:
                goes_on.wait(0.4)  # the standstill itself
            if len(looks) == 3:
                goes_on.set()
                assert wait_until(lambda: (record := record_of(store, 1)) is not None and record.arrived)

    def be_late_with_the_record(method: str, key: str) -> None:
        if is_control() and (method, key) == ("compare_set", "rank/1"):
            assert goes_on.wait(PATIENCE_S)

    early = rank_on(HookedStore(store, stand_still), 0, 3)
    counted = rank_on(HookedStore(store, be_late_with_the_record), 1, 3)
    verdicts = at_once(lambda: early.arrive(timeout=SHORT_S), counted.arrive)

    assert verdicts[0] == verdicts[1]
    assert (2,) == verdicts[0].missing


def test_barrier_ranks_whose_time_is_up_at_once_decide_alike(rank_on: RankOn) -> None:
    """Of two verdicts that are about to be written, the first one stands for all."""
    store, both = dist.HashStore(), threading.Barrier(2)

    def hook(method: str, key: str) -> None:
        if is_control() and (method, key) == ("compare_set", "0 scope/exit/v"):
            both.wait(PATIENCE_S)

    ranks = [rank_on(HookedStore(store, hook), rank, 3) for rank in range(2)]
    verdicts = at_once(*(functools.partial(rank.arrive, timeout=0.3) for rank in ranks))

    assert (2,) == verdicts[0].missing
    assert verdicts[0] == verdicts[1]


# Failures shorten the wait


@pytest.mark.parametrize("when", ["before", "while"])
def test_barrier_published_failure_bounds_the_wait_of_the_others(rank_on: RankOn, when: str) -> None:
    """From the moment at which a failure is known, the peers wait for failure_timeout and no longer."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 3) for rank in range(3)]

    def fail() -> None:
        assert wait_until(lambda: is_waiting(store, 0) and is_waiting(store, 1))
        ranks[2].publish(FAILED)

    def wait(rank: Rank) -> tuple[Verdict, float]:
        start = time.monotonic()
        verdict = rank.arrive(failure_timeout=SHORT_S)
        return verdict, time.monotonic() - start

    waits = [functools.partial(wait, rank) for rank in ranks[:2]]
    if when == "before":
        ranks[2].publish(FAILED)
        results = at_once(*waits)
    else:
        results = at_once(*waits, fail)[:2]

    for verdict, waited in results:
        assert SHORT_S / 2 <= waited < SHORT_S + SOON_S
        assert verdict == results[0][0]
        assert ((2,), [2], "body") == (verdict.missing, list(verdict.failures), verdict.failures[2].phase)
        assert verdict.failures[2].order > 0


def test_barrier_failure_published_at_the_moment_of_the_timeout_is_in_the_verdict(rank_on: RankOn) -> None:
    """A rank that gives up while a failure becomes known tells both: which rank is missing, and what failed there."""
    store, published = dist.HashStore(), threading.Event()

    def hook(method: str, key: str) -> None:
        if is_control() and (method, key) == ("add", "0 scope/exit/n") and not published.is_set():
            published.set()
            other.publish(FAILED)

    rank, other = rank_on(HookedStore(store, hook), 0, 2), rank_on(store, 1, 2)
    verdict = rank.arrive(timeout=0.2)

    assert ((1,), [1]) == (verdict.missing, list(verdict.failures))


def test_barrier_publish_does_not_wait_for_the_store(rank_on: RankOn, thawed: threading.Event) -> None:
    """A store that hangs does not delay the cleanups of a rank that failed."""
    rank = rank_on(HookedStore(dist.HashStore(), lambda *_: thawed.wait(PATIENCE_S)), 0, 2)
    start = time.monotonic()
    rank.barrier.publish(rank.record(outcome=FAILED))

    assert time.monotonic() - start < SOON_S
    assert not thawed.is_set()


def test_barrier_published_failure_of_a_rank_that_arrives_is_one_failure(rank_on: RankOn) -> None:
    """A failure that was published, and arrives then with what failed later, is one failure of a complete round."""

    def run(rank: Rank) -> Verdict:
        if rank.rank != 1:
            return rank.arrive()
        rank.barrier.publish(rank.record(outcome=FAILED))
        return rank.arrive(outcome=attrs.evolve(FAILED, also=["more"]))

    verdicts = _all(rank_on, 3, run)

    assert [verdicts[0]] * 3 == verdicts
    assert verdicts[0].complete
    assert {1: ("more",)} == {rank: outcome.also for rank, outcome in verdicts[0].failures.items()}
    assert verdicts[0].failures[1].order > 0


def test_barrier_failed_rank_waits_for_failure_timeout_only(rank_on: RankOn) -> None:
    """A rank that failed itself does not wait longer than failure_timeout for peers that are probably stuck."""
    start = time.monotonic()
    verdict = rank_on(dist.HashStore(), 0, 2).arrive(outcome=FAILED, failure_timeout=0.2)

    assert (1,) == verdict.missing
    assert time.monotonic() - start < SOON_S


# Entries after a round to which not all came


def test_barrier_entries_after_a_missed_round_wait_once_and_go_on_when_all_are_back(rank_on: RankOn) -> None:
    """The first entry after it waits for the missing rank, the later ones refuse at once; that rank finds the same."""
    store = dist.HashStore()
    here, stuck = (rank_on(store, rank, 2) for rank in range(2))
    verdicts = [here.arrive("0 scope", timeout=0.2), here.arrive("1 scope", "entry", timeout=0.2)]
    start = time.monotonic()
    verdicts += [here.arrive(f"{number} scope", "entry") for number in range(2, 12)]

    assert time.monotonic() - start < SOON_S
    assert [(1,)] * 12 == [verdict.missing for verdict in verdicts]
    assert verdicts == [
        stuck.arrive("0 scope"),
        *(stuck.arrive(f"{number} scope", "entry") for number in range(1, 12)),
    ]
    assert [True, True] == [
        verdict.ok for verdict in at_once(*(functools.partial(r.arrive, "12 scope", "entry") for r in (here, stuck)))
    ]


def test_barrier_entry_waits_for_a_rank_that_has_come_back(rank_on: RankOn) -> None:
    """A rank that was missing and has come to the round it missed is waited for at the next entry."""
    store = dist.HashStore()
    here, late = (rank_on(store, rank, 2) for rank in range(2))
    here.arrive("0 scope", timeout=0.2)
    here.arrive("1 scope", "entry", timeout=0.2)
    late.arrive("0 scope")

    def come() -> Verdict:
        assert wait_until(lambda: is_waiting(store, 0, "entry"))
        late.arrive("1 scope", "entry")
        return late.arrive("2 scope", "entry")

    assert [True, True] == [verdict.ok for verdict in at_once(lambda: here.arrive("2 scope", "entry"), come)]


# Ranks at different places


def test_barrier_different_scopes_end_the_wait_at_once(rank_on: RankOn) -> None:
    """Ranks at different scopes do not wait for one another, and read the same names."""
    start = time.monotonic()
    verdicts = _all(rank_on, 2, lambda rank: (rank.arrive(f"0 {rank.rank}"), rank.barrier.in_step))

    assert time.monotonic() - start < SOON_S
    assert [({0: "0", 1: "1"}, False)] * 2 == [(verdict.names, in_step) for verdict, in_step in verdicts]


def test_barrier_rank_that_is_past_this_round_ends_it_and_is_met_at_the_next(rank_on: RankOn) -> None:
    """A rank that left out a scope does not come back to it: its peer learns so at once, and meets it where it is."""

    def run(rank: Rank) -> list[Any]:
        first = [] if rank.rank else [rank.arrive("0 scope").names]
        return [*first, rank.arrive("1 next").ok]

    assert [[{0: "scope", 1: "next"}, True], [True]] == _all(rank_on, 2, run)


def test_barrier_rank_at_the_exit_of_a_scope_does_not_come_to_its_entry(rank_on: RankOn) -> None:
    """Where one rank thinks that all are in step and the other does not, that one learns so at once."""
    store = dist.HashStore()
    ahead, behind = (rank_on(store, rank, 2) for rank in range(2))

    def come() -> Verdict:
        assert wait_until(lambda: is_waiting(store, 0))
        return behind.arrive(stage="entry")

    _, verdict = at_once(lambda: ahead.arrive(timeout=1.0), come)

    assert {0: "scope (exit)", 1: "scope"} == verdict.names


def test_barrier_mismatch_is_told_to_ranks_that_come_later_too(rank_on: RankOn) -> None:
    """A third rank that comes after the mismatch reads the verdict of the one that found it."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 3) for rank in range(3)]
    first, _ = at_once(lambda: ranks[0].arrive("0 scope"), lambda: ranks[1].arrive("0 other"))

    assert first == ranks[2].arrive("0 scope")
    assert {0: "scope", 1: "other"} == first.names


# Stores that hang, are slow, or are gone


@pytest.mark.frozen_store
@pytest.mark.parametrize(
    ("method", "number"),
    [
        pytest.param("clone", 0, id="connection"),
        pytest.param("compare_set", 0, id="joining"),
        pytest.param("add", 1, id="arrival"),
        pytest.param("wait", 1, id="wait"),
    ],
)
def test_barrier_call_of_the_store_thread_that_hangs_is_bounded(
    rank_on: RankOn, thawed: threading.Event, method: str, number: int
) -> None:
    """A rank whose own call does not come back, while the store answers its control thread, leaves with a verdict."""
    is_hung, hangs = threading.Event(), threading.Event()

    class Store(HookedStore):
        def clone(self) -> dist.Store:
            self._hook("clone", "")
            return self

    def hook(called: str, _: str) -> None:
        if is_hung.is_set() and called == method and not is_control():
            hangs.set()
            thawed.wait(PATIENCE_S)

    store = dist.HashStore()
    rank, other = rank_on(Store(store, hook), 0, 2), rank_on(store, 1, 2)
    for i in range(number):
        assert all(v.ok for v in at_once(*(functools.partial(r.arrive, f"{i} scope") for r in (rank, other))))
    is_hung.set()
    verdict, in_step = at_once(
        lambda: (rank.arrive(f"{number} scope", timeout=0.2), rank.barrier.in_step), timeout=GRACE_S + SOON_S
    )[0]

    assert hangs.is_set()
    assert (True, False) == (1 in verdict.missing, in_step)


@pytest.mark.frozen_store
def test_barrier_store_that_hangs_altogether_is_bounded(rank_on: RankOn, thawed: threading.Event) -> None:
    """When no call to the store comes back, a rank leaves soon after its deadline, and says why it knows nothing."""
    rank = rank_on(HookedStore(dist.HashStore(), lambda *_: thawed.wait(PATIENCE_S)), 1, 3)
    start = time.monotonic()
    verdict = rank.arrive(timeout=0.2)

    assert 0.2 <= time.monotonic() - start < GRACE_S + SOON_S
    assert ((0, 2), (), (1,), {1: OK}) == (verdict.missing, verdict.lost, verdict.arrived, verdict.outcomes)
    assert verdict.reason.startswith("the group's store (served outside of the group) has not answered for")
    assert not rank.barrier.in_step


@pytest.mark.frozen_store
def test_barrier_store_that_hangs_once_a_failure_is_known_is_bounded_by_failure_timeout(
    rank_on: RankOn, thawed: threading.Event
) -> None:
    """A deadline that a failure has made earlier holds also if the store keeps silent after that."""
    store, is_hung = dist.HashStore(), threading.Event()
    rank = rank_on(HookedStore(store, lambda *_: is_hung.is_set() and thawed.wait(PATIENCE_S)), 0, 2)
    peer = rank_on(store, 1, 2)
    spans: list[Any] = []

    def wait() -> Verdict:
        with rank.scope() as span:
            spans.append(span)
            return rank.arrive(failure_timeout=1.0)

    def fail_and_hang() -> None:
        assert wait_until(lambda: is_waiting(store, 0))
        before = spans[0].wait.deadline
        peer.publish(FAILED)
        assert wait_until(lambda: spans[0].wait.deadline < before)
        is_hung.set()

    verdict, _ = at_once(wait, fail_and_hang, timeout=1.0 + GRACE_S + SOON_S + PATIENCE_S / 2)

    assert "has not answered for" in verdict.reason
    assert (1,) == verdict.missing


@pytest.mark.frozen_store
@pytest.mark.parametrize("is_met", [False, True], ids=["before-they-met", "after-they-met"])
def test_barrier_works_again_after_the_store_has_hung(rank_on: RankOn, *, is_met: bool) -> None:
    """When the store answers again, so does the barrier: also if two of the rank's threads come to join by then."""
    thawed, is_frozen, asked = threading.Event(), threading.Event(), threading.Semaphore(0)
    joins, has_joined = threading.Event(), threading.Event()
    threads: list[int] = []

    def hook(method: str, key: str) -> None:
        if is_frozen.is_set() and not thawed.is_set():
            threads.extend([threading.get_ident()] * (not is_control()))
            asked.release()
            thawed.wait(PATIENCE_S)
        if not is_control() and key == "rank/0":  # the thread that was left behind joins, and then its successor
            is_first = threads[:1] == [threading.get_ident()]
            if method != "compare_set":
                has_joined.set()
            elif is_first:
                joins.wait(0.3)
            else:
                joins.set()
                has_joined.wait(0.3)

    store = dist.HashStore()
    rank, other = rank_on(HookedStore(store, hook), 0, 2), rank_on(store, 1, 2)
    if is_met:
        assert all(verdict.ok for verdict in at_once(rank.arrive, other.arrive))
    is_frozen.set()
    alone = rank.arrive("1 scope", timeout=0.1)
    other.arrive("1 scope", timeout=0.1)

    def thaw() -> None:
        # The control thread, the store thread that was left behind, and its successor, which joins after that.
        for _ in range(3 if is_met else 2):
            assert asked.acquire(timeout=PATIENCE_S)
        thawed.set()

    arrivals = [functools.partial(each.arrive, "2 scope", "entry", timeout=2.0) for each in (rank, other)]
    verdicts = at_once(*arrivals, thaw, timeout=PATIENCE_S)[:2]

    assert not alone.complete
    assert [True, True] == [verdict.ok for verdict in verdicts]


@pytest.mark.frozen_store
def test_barrier_rank_that_gave_up_before_the_store_heard_of_it_lets_no_peer_go_well(
    rank_on: RankOn, thawed: threading.Event
) -> None:
    """When the store thaws, the peers are told alike that the rank gave up; the next round works."""
    store = dist.HashStore()
    hooked = HookedStore(store, lambda *_: thawed.wait(PATIENCE_S))
    ranks = [rank_on(hooked if rank == 1 else store, rank, 3) for rank in range(3)]

    def give_up() -> Verdict:
        verdict = ranks[1].arrive(timeout=0.2)
        thawed.set()
        return verdict

    first, alone, third = at_once(ranks[0].arrive, give_up, ranks[2].arrive, timeout=PATIENCE_S)

    assert "has not answered for" in alone.reason
    assert first == third
    assert ("rank 1 gave up, because the store did not answer", False) == (first.reason, first.complete)
    assert all(verdict.ok for verdict in at_once(*(functools.partial(rank.arrive, "1 scope") for rank in ranks)))


def test_barrier_what_a_thread_that_was_left_behind_has_to_tell_is_void(
    rank_on: RankOn, thawed: threading.Event
) -> None:
    """A rank's word in this round is not replaced by what a thread, held up in an earlier one, comes to tell only now."""
    store, left_behind, is_counted, is_told = dist.HashStore(), list[str](), threading.Event(), threading.Event()
    looks: list[str] = []

    def hook(method: str, key: str) -> None:
        thread = f"{threading.current_thread().name} {threading.get_ident()}"
        if is_control():
            looks.extend([key] * is_counted.is_set())
        elif (method, key) == ("add", "collective_scope/news") and not left_behind:
            left_behind.append(thread)
            thawed.wait(PATIENCE_S)
        elif (method, key) == ("wait", "1 scope/exit/v"):
            is_counted.set()
        elif left_behind == [thread]:
            if left_behind[0] in told_by:
                is_told.set()
            told_by.extend([thread] * (key == "rank/0"))

    told_by: list[str] = []
    rank, other = rank_on(HookedStore(store, hook), 0, 2), rank_on(store, 1, 2)

    def last() -> None:
        other.arrive("0 scope", timeout=0.2)
        # By now the control thread has seen that all has been told.
        assert is_counted.wait(PATIENCE_S)
        assert wait_until(lambda: len(looks) > 20)
        thawed.set()
        is_told.wait(0.5)  # it is not to come
        verdicts.append(other.arrive("1 scope"))

    verdicts: list[Verdict] = []
    peer = threading.Thread(target=last)
    peer.start()
    with pytest.raises(KeyboardInterrupt), interrupted_when(lambda: bool(left_behind)):
        rank.arrive("0 scope", outcome=FAILED)
    verdicts.append(rank.arrive("1 scope", outcome=attrs.evolve(FAILED, message="of the second scope")))
    peer.join(PATIENCE_S)

    assert verdicts[0] == verdicts[1]
    assert {0: "of the second scope"} == {r: outcome.message for r, outcome in verdicts[0].failures.items()}


@pytest.mark.frozen_store
def test_barrier_store_that_is_slow_has_as_long_as_the_wait(rank_on: RankOn) -> None:
    """Before the deadline, a store that does not answer for a while is not taken for frozen."""
    store, is_slow = dist.HashStore(), threading.Event()

    def hook(_: str, key: str) -> None:
        if key == "0 scope/exit/v" and not is_slow.is_set():
            is_slow.set()
            threading.Event().wait(2 * GRACE_S)  # the slow store itself

    rank, other = rank_on(HookedStore(store, hook), 0, 2), rank_on(store, 1, 2)

    def last() -> Verdict:
        assert is_slow.wait(PATIENCE_S)
        return other.arrive(outcome=FAILED)

    verdicts = at_once(rank.arrive, last)

    assert [[1], [1]] == [list(verdict.failures) for verdict in verdicts]
    assert [True, True] == [verdict.complete for verdict in verdicts]


def test_barrier_store_that_answers_each_call_slowly_is_not_taken_for_frozen(
    rank_on: RankOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that reads the records of a large group, to decide, takes longer than one answer may, and is patient."""
    monkeypatch.setattr(barrier, "GRACE_S", 0.6)
    rank = rank_on(HookedStore(dist.HashStore(), lambda *_: threading.Event().wait(0.06)), 0, 16)
    verdict = rank.arrive(timeout=0.5)

    assert (tuple(range(1, 16)), "") == (verdict.missing, verdict.reason)


@pytest.mark.parametrize(
    ("server", "lost", "missing"),
    [
        pytest.param(None, (), (0, 2), id="served-outside"),
        pytest.param(0, (0,), (2,), id="served-by-a-peer"),
        pytest.param(1, (), (0, 2), id="served-here"),
    ],
)
@pytest.mark.parametrize("method", ["", "add", "wait"], ids=["every-call", "add", "wait"])
def test_barrier_store_that_is_gone_tells_which_rank_served_it(
    rank_on: RankOn, method: str, server: int | None, lost: tuple[int, ...], missing: tuple[int, ...]
) -> None:
    """When the store breaks off, the rank that served it is lost, of the others nothing is known; at once, and for good."""
    store = HookedStore(dist.HashStore(), lambda called, _: method in ("", called) and _reset())
    rank = rank_on(store, 1, 3, server=server)
    start = time.monotonic()
    verdicts = [rank.arrive(), rank.arrive("1 scope")]

    assert time.monotonic() - start < SOON_S
    for verdict in verdicts:
        assert (lost, missing, (1,)) == (verdict.lost, verdict.missing, verdict.arrived)
        assert "is gone: " in verdict.reason
        assert verdict.reason.endswith("Connection reset by peer")


def test_barrier_store_that_is_gone_after_a_round_tells_which_rank_really_served_it(rank_on: RankOn) -> None:
    """Only the rank whose process serves the store knows so at first; once all have met, every rank does."""
    gone = threading.Event()
    store = HookedStore(dist.HashStore(), lambda *_: gone.is_set() and _reset())
    ranks = [rank_on(store, rank, 3, server=[None, 1, 0][rank], serves=rank == 1) for rank in range(3)]

    def meet(rank: Rank) -> None:
        with rank.scope("1 scope"):
            assert rank.arrive("0 scope", outcome=FAILED).complete
            # Until its control thread has looked at all others.
            assert wait_until(lambda: {0, 1, 2} <= {*rank.part.records, rank.rank})

    at_once(*(functools.partial(meet, rank) for rank in ranks))
    gone.set()
    verdicts = at_once(*(functools.partial(rank.arrive, "1 scope") for rank in ranks))

    assert [(1,), (), (1,)] == [verdict.lost for verdict in verdicts]
    assert all("served by rank 1" in verdict.reason for verdict in verdicts)


def test_barrier_store_whose_server_ends_while_ranks_wait_is_gone(rank_on: RankOn) -> None:
    """The wait of a rank ends as soon as the server of a real store does."""
    server = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    client = dist.TCPStore("127.0.0.1", server[0].port, is_master=False)
    rank = rank_on(client, 1, 2, server=0)

    def end() -> None:
        assert wait_until(lambda: is_waiting(server[0], 1))
        server.clear()

    start = time.monotonic()
    verdict, _ = at_once(rank.arrive, end)

    assert time.monotonic() - start < SOON_S
    assert (0,) == verdict.lost
    assert "is gone: " in verdict.reason


def test_barrier_error_that_no_store_raises_is_not_swallowed(rank_on: RankOn) -> None:
    """An error that is not the store's is a defect, and surfaces."""

    def hook(called: str, _: str) -> None:
        if called == "wait":
            msg = "unforeseen"
            raise LookupError(msg)

    rank = rank_on(HookedStore(dist.HashStore(), hook), 0, 2)

    with pytest.raises(LookupError, match=r"^unforeseen$"):
        rank.arrive(timeout=PATIENCE_S)
    assert not rank.barrier.in_step


# Interrupts


def _while_peers_wait(
    ranks: list[Rank],
    interrupted: int,
    is_time: Callable[[], bool],
    *,
    wakes: bool = True,
    outcome: Outcome = OK,
    is_late: Callable[[], bool] = lambda: True,
) -> dict[int, Verdict]:
    """Interrupt the wait of one rank, on this thread, while its peers wait; return what these were told."""
    verdicts: dict[int, Verdict] = {}

    def wait(rank: Rank) -> None:
        assert wait_until(is_late)
        verdicts[rank.rank] = rank.arrive(timeout=PATIENCE_S)

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in ranks if rank.rank != interrupted]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted_when(is_time, wakes=wakes):
        ranks[interrupted].arrive(timeout=PATIENCE_S, outcome=outcome)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert time.monotonic() - start < SOON_S
    return verdicts


@pytest.mark.parametrize("wakes", [True, False], ids=["wakes", "does-not-wake"])
def test_barrier_interrupted_rank_ends_the_round_for_all(rank_on: RankOn, wakes: bool) -> None:  # noqa: FBT001  (parametrized)
    """Ctrl-C ends the wait at once, there and on the peers, who read which rank's wait was ended and why."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 3) for rank in range(3)]
    verdicts = _while_peers_wait(ranks[:2], 0, lambda: is_waiting(store, 0) and is_waiting(store, 1), wakes=wakes)

    assert "rank 0 stopped waiting at the barrier" == verdicts[1].reason
    failures = {rank: (each.phase, each.type_name) for rank, each in verdicts[1].failures.items()}
    assert {0: ("barrier", "KeyboardInterrupt")} == failures
    assert [False, False] == [rank.barrier.in_step for rank in ranks[:2]]
    assert all(v.ok for v in at_once(*(functools.partial(rank.arrive, "1 scope", "entry") for rank in ranks)))


def test_barrier_interrupted_rank_of_a_large_group_ends_the_round_for_all(rank_on: RankOn) -> None:
    """The peers are told also by a rank that has left its scope before it is its turn to decide."""
    store = dist.HashStore()
    rank = rank_on(store, 350, 400)
    with pytest.raises(KeyboardInterrupt), interrupted_when(lambda: is_waiting(store, 350)):
        rank.arrive(timeout=PATIENCE_S)

    assert wait_until(lambda: store.check([rank.part.key("0 scope/exit/v")]), SOON_S)


@pytest.mark.parametrize("outcome", [OK, FAILED], ids=["ok", "failed"])
def test_barrier_interrupted_rank_that_the_store_has_not_heard_of_lets_no_peer_go_well(
    rank_on: RankOn, thawed: threading.Event, outcome: Outcome
) -> None:
    """Ctrl-C that comes before a rank is counted ends the round for all alike."""
    store = dist.HashStore()

    def hook(method: str, key: str) -> None:
        if method == "add" and key == "0 scope/exit/n" and not is_control():
            thawed.wait(PATIENCE_S)

    ranks = [rank_on(HookedStore(store, hook) if rank == 1 else store, rank, 3) for rank in range(3)]
    verdicts = _while_peers_wait(ranks, 1, lambda: is_waiting(store, 0) and is_waiting(store, 2), outcome=outcome)

    assert verdicts[0] == verdicts[2]
    assert ([1], (0, 2)) == (list(verdicts[0].failures), verdicts[0].arrived)
    assert "rank 1 stopped waiting at the barrier" == verdicts[0].reason
    thawed.set()
    assert all(verdict.ok for verdict in at_once(*(functools.partial(rank.arrive, "1 scope") for rank in ranks)))


def test_barrier_interrupt_when_all_have_arrived_is_that_of_one_rank(rank_on: RankOn, thawed: threading.Event) -> None:
    """Ctrl-C that comes after the last arrival surfaces where it was sent; the peer leaves well."""
    store, waits = dist.HashStore(), threading.Event()

    def hook(method: str, _: str) -> None:
        if method == "wait":
            waits.set()
            thawed.wait(PATIENCE_S)

    ranks = [rank_on(HookedStore(store, hook), 0, 2), rank_on(store, 1, 2)]
    verdict_key = lambda: store.check([ranks[0].part.key("0 scope/exit/v")])  # noqa: E731  (short)
    verdicts = _while_peers_wait(ranks, 0, verdict_key, is_late=waits.is_set)

    assert verdicts[1].ok


def test_barrier_interrupted_rank_that_had_failed_keeps_its_failure(rank_on: RankOn) -> None:
    """Peers of a rank that failed, and was then interrupted, read its failure."""
    store = dist.HashStore()
    rank, late = rank_on(store, 0, 2), rank_on(store, 1, 2)
    with pytest.raises(KeyboardInterrupt), interrupted_when(lambda: is_waiting(store, 0)):
        rank.arrive(outcome=FAILED, failure_timeout=PATIENCE_S)
    verdict = late.arrive()

    assert ("ValueError", "no") == (verdict.failures[0].type_name, verdict.failures[0].message)
    assert verdict.reason


def test_barrier_interrupt_with_a_store_that_hangs_is_prompt(rank_on: RankOn, thawed: threading.Event) -> None:
    """Ctrl-C works while the store hangs."""
    rank = rank_on(HookedStore(dist.HashStore(), lambda *_: thawed.wait(PATIENCE_S)), 0, 2)
    start = time.monotonic()
    with rank.scope() as span, pytest.raises(KeyboardInterrupt), interrupted_when(lambda: not span.is_idle):
        rank.arrive(timeout=PATIENCE_S)

    assert time.monotonic() - start < SOON_S
    assert not rank.barrier.in_step


# Leftovers


def _ok(rank: Rank, number: int, _: Sequencer) -> None:
    assert rank.arrive(f"{number} scope").ok


def _failed(rank: Rank, number: int, _: Sequencer) -> None:
    fields: dict[str, Any] = {}
    if rank.rank == 1:
        fields["outcome"] = FAILED
        rank.barrier.publish(rank.record(f"{number} scope", **fields))
    assert [1] == list(rank.arrive(f"{number} scope", **fields).failures)


def _pending(rank: Rank, number: int, _: Sequencer) -> None:
    assert ("a",) == rank.arrive(f"{number} scope", cleanups=(("a", "", ""),)).agreed
    assert rank.arrive(f"{number} scope", "exit 2").ok


def _mismatched(rank: Rank, number: int, _: Sequencer) -> None:
    assert rank.arrive(f"{number} {rank.rank}").names


def _late(rank: Rank, number: int, sequencer: Sequencer) -> None:
    if rank.rank == 1:
        sequencer.wait_for(f"round {number} is over")
    verdict = rank.arrive(f"{number} scope", timeout=0.05 if rank.rank == 0 else PATIENCE_S)
    sequencer.announce(f"round {number} is over")
    assert (1,) == verdict.missing


@pytest.mark.parametrize(
    ("play", "rounds"),
    [
        pytest.param(_ok, 100, id="ok"),
        pytest.param(_failed, 20, id="failed"),
        pytest.param(_pending, 20, id="collective-cleanups"),
        pytest.param(_mismatched, 5, id="mismatch"),
        pytest.param(_late, 2, id="late-rank"),
    ],
)
def test_barrier_after_any_rounds_the_store_has_not_grown(
    rank_on: RankOn,
    play: Callable[[Rank, int, Sequencer], None],
    rounds: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once all ranks have met again, only the latest rounds have keys in the store, whatever the verdicts were."""
    monkeypatch.setattr(control, "NEWS_S", 0.0)
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 2) for rank in range(2)]

    def run(number: int, _: dist.HashStore, sequencer: Sequencer) -> None:
        for i in range(rounds):
            play(ranks[number], i, sequencer)
        for i in range(rounds, rounds + 3):
            ranks[number].arrive(f"{i} last")

    values(run_threads(2, run, timeout=60.0))
    keys = {"life of 2", "collective_scope/news", f"collective_scope/beat/{me().key}"}
    keys |= {ranks[0].part.key(f"rank/{rank}") for rank in range(2)}
    keys |= {ranks[0].part.key(f"{rounds + i} last/exit/{each}") for i in range(3) for each in "nv"}

    assert wait_until(lambda: set(store.list_keys()) <= keys, SOON_S), set(store.list_keys()) - keys


def test_barrier_that_is_dropped_ends_its_thread() -> None:
    """A barrier that nothing refers to any more leaves no thread behind, whether or not its last round was complete."""

    def ours() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "collective_scope-store"}

    before, store = ours(), dist.HashStore()
    ranks = [Rank(store, rank, 2) for rank in range(2)]
    at_once(*(rank.arrive for rank in ranks))
    ranks[0].arrive("1 scope", timeout=0.1)
    assert 2 == len(ours() - before)
    for rank in ranks:
        rank.end()
    del rank
    ranks.clear()
    gc.collect()

    assert wait_until(lambda: not ours() - before)


def test_barrier_thread_that_was_left_behind_ends_although_the_round_has_come_and_gone(
    rank_on: RankOn, thawed: threading.Event
) -> None:
    """A thread that is starved until the key that it waits for has been removed does not wait for ever."""
    store, left_behind = dist.HashStore(), list[threading.Thread]()

    def hook(method: str, key: str) -> None:
        if (method, key) == ("wait", "0 scope/exit/v"):
            left_behind.append(threading.current_thread())
            thawed.wait(PATIENCE_S)

    rank, other = rank_on(HookedStore(store, hook), 0, 2), rank_on(store, 1, 2)
    with pytest.raises(KeyboardInterrupt), interrupted_when(lambda: bool(left_behind)):
        rank.arrive(timeout=PATIENCE_S)
    other.arrive()
    for number in range(1, 4):
        assert all(v.ok for v in at_once(*(functools.partial(r.arrive, f"{number} scope") for r in (rank, other))))
    assert wait_until(lambda: not store.check([rank.part.key("0 scope/exit/n")]), SOON_S)
    thawed.set()
    gc.collect()
    left_behind[0].join(SOON_S)

    assert not left_behind[0].is_alive()
