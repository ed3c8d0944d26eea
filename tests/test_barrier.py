"""The barrier of a group with a store, its ranks as threads: one verdict, bounded, nothing left behind."""

from __future__ import annotations

import gc
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch.distributed as dist

from collective_scope import _barrier, _lookout, _protocol, _store_thread
from collective_scope._barrier import Barrier
from collective_scope._outcome import OK, Outcome, Record, Verdict
from tests.ranks import Sequencer, run_threads, values
from tests.stores import PATIENCE_S, HookedStore, barrier_of, interrupted_when, is_waiting, meet, wait_until


LONG_S = 120.0
"""A timeout that no test may reach."""

SOON_S = 10.0
"""Longer than anything takes that does not wait for a timeout."""

SHORT_S = 1.0
"""A timeout that is meant to run out, long enough for a busy machine to start all ranks."""

_FAILED = Outcome("body", "ValueError", "no", "Traceback ...")


@pytest.fixture(name="thawed")
def _thawed() -> Iterator[threading.Event]:
    """Return an event on which stores hang; it is set at the end."""
    event = threading.Event()
    yield event
    event.set()


def _arrive(
    barrier: Barrier,
    sequence: int = 0,
    *,
    timeout: float = LONG_S,
    failure_timeout: float = LONG_S,
    warn_after: float = LONG_S,
    **record: Any,
) -> Verdict:
    mine = attrs.evolve(Record(0, "exit", "scope", sequence), **record)
    return barrier.arrive(mine, timeout=timeout, failure_timeout=failure_timeout, warn_after=warn_after)


def _few_keys(store: dist.Store, world_size: int) -> bool:
    # A record and a seat each, the life, the count of failures, the watchers' news, and two keys of the last round.
    return wait_until(lambda: store.num_keys() <= 2 * world_size + 5, SOON_S)


# Agreement


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("server", [pytest.param(None, id="hosted-outside"), pytest.param(0, id="hosted-by-0")])
def test_barrier_all_ok_is_one_complete_verdict(world_size: int, server: int | None) -> None:
    """When all arrive in peace, all hold the same verdict: everyone was there, nobody failed."""
    verdicts = meet(world_size, lambda _, barrier, __: (_arrive(barrier), barrier.in_step), server=server)

    expected = Verdict("scope", 0, world_size, outcomes=dict.fromkeys(range(world_size), OK), arrived=range(world_size))
    assert [(expected, True)] * world_size == verdicts


@pytest.mark.parametrize("server", [pytest.param(None, id="hosted-outside"), pytest.param(1, id="hosted-by-1")])
@pytest.mark.parametrize("failing", [{0}, {2}, {0, 1, 2}], ids=str)
def test_barrier_failures_are_in_the_verdict_of_every_rank(failing: set[int], server: int | None) -> None:
    """Failed ranks are named to all, themselves included, in the order in which they failed."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Verdict:
        return _arrive(barrier, outcome=_FAILED if rank in failing else OK)

    verdicts = meet(3, run, server=server)

    assert len({verdict.encode() for verdict in verdicts}) == 1
    assert failing == set(verdicts[0].failures)
    assert list(range(1, len(failing) + 1)) == sorted(each.order for each in verdicts[0].failures.values())
    assert verdicts[0].complete


def test_barrier_in_a_subgroup_knows_the_global_ranks() -> None:
    """The verdict of a subgroup says what its ranks are called in the default group."""
    verdicts = meet(2, lambda _, barrier, __: _arrive(barrier), global_ranks=(3, 7))

    assert [(3, 7), (3, 7)] == [verdict.global_ranks for verdict in verdicts]


def test_barrier_rounds_do_not_mix() -> None:
    """Many rounds in a row, some with failures, each have their own verdict."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> list[list[int]]:
        return [list(_arrive(barrier, i, outcome=_FAILED if i % 5 == rank else OK).failures) for i in range(50)]

    expected = [[i % 5] if i % 5 < 3 else [] for i in range(50)]
    assert [expected] * 3 == meet(3, run)


@pytest.mark.parametrize(
    "told",
    [pytest.param({"outcome": _FAILED}, id="failed"), pytest.param({"cleanups": (("free", ""),)}, id="cleanups")],
)
def test_barrier_what_a_rank_told_is_not_replaced_by_what_it_meant_to_tell_before(
    told: dict[str, Any], thawed: threading.Event
) -> None:
    """A lookout that comes to write the rank's record when the rank is in the next round leaves that one's alone."""
    store, lookouts = dist.HashStore(), list[threading.Thread]()
    armed, held, counted, late, written = (threading.Event() for _ in range(5))

    def hold_up_the_lookout(_: str, key: str) -> None:
        if key == "1/verdict":
            counted.set()
        elif lookouts == [threading.current_thread()] and (key != "rank/0" or "cleanups" in told):
            # It may try to write again; where nothing failed, the next round's lookout writes too, which mends it.
            written.set()
            thawed.wait(PATIENCE_S)
        elif armed.is_set() and not lookouts and key == "rank/0":
            lookouts.append(threading.current_thread())
            held.set()
            late.wait(PATIENCE_S)

    def read_what_is_written_late(_: str, key: str) -> None:
        if counted.is_set() and key == "rank/0":
            late.set()
            assert written.wait(PATIENCE_S)

    def be_first() -> None:
        verdicts.append(_arrive(other))
        verdicts.append(_arrive(other, 1, **told))

    other, barrier = (
        barrier_of(HookedStore(store, hook), rank, 2)
        for rank, hook in enumerate((hold_up_the_lookout, read_what_is_written_late))
    )
    verdicts: list[Verdict] = []
    peer = threading.Thread(target=be_first)
    other.greet()
    assert wait_until(lambda: store.check(["collective_scope/2/0/rank/0"]))
    armed.set()
    peer.start()
    assert held.wait(PATIENCE_S)
    assert _arrive(barrier).ok
    assert counted.wait(PATIENCE_S)
    mine = _arrive(barrier, 1, cleanups=told.get("cleanups", ()))
    peer.join(PATIENCE_S)

    assert [True, mine] == [verdicts[0].ok, verdicts[1]]
    assert {0: told.get("outcome", OK).type_name, 1: ""} == {rank: o.type_name for rank, o in mine.outcomes.items()}
    assert {} == mine.cleanups


def test_barrier_odd_names_are_told_apart_and_arrive() -> None:
    """A scope may have any name."""
    name = "two\nlines, \0, 🙂 and \udc80"

    verdicts = meet(2, lambda rank, barrier, _: _arrive(barrier, scope=name, outcome=_FAILED if rank else OK))

    assert [name, name] == [verdict.scope for verdict in verdicts]
    assert all(verdict.complete for verdict in verdicts)


# Missing ranks


@pytest.mark.parametrize("absent", [{0}, {2}, {3}, {0, 2}, {1, 2, 3}], ids=str)
def test_barrier_missing_ranks_are_named_on_every_rank(absent: set[int]) -> None:
    """All ranks that came read the same list of those that did not, sorted, rank 0 like any other."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> tuple[Verdict, bool] | None:
        return None if rank in absent else (_arrive(barrier, timeout=SHORT_S), barrier.in_step)

    present = [each for each in meet(4, run) if each is not None]

    assert len({verdict.encode() for verdict, _ in present}) == 1
    assert tuple(sorted(absent)) == present[0][0].missing
    assert set(range(4)) - absent == set(present[0][0].outcomes)
    assert SHORT_S <= present[0][0].timeout < SHORT_S + SOON_S
    assert not any(in_step for _, in_step in present)


def test_barrier_late_rank_reads_the_same_verdict() -> None:
    """A rank that comes after the timeout is told what was decided, at once."""

    def run(rank: int, barrier: Barrier, sequencer: Sequencer) -> tuple[Verdict, float]:
        if rank == 1:
            sequencer.wait_for("rank 0 has left")
        start = time.monotonic()
        verdict = _arrive(barrier, timeout=0.2 if rank == 0 else LONG_S)
        if rank == 0:
            sequencer.announce("rank 0 has left")
        return verdict, time.monotonic() - start

    (early, _), (late, waited) = meet(2, run)

    assert early == late
    assert (1,) == late.missing
    assert waited < SOON_S


def test_barrier_after_a_missed_round_is_in_step_again_when_all_came() -> None:
    """Whoever missed a round is out of step until everyone has met again."""

    def run(rank: int, barrier: Barrier, sequencer: Sequencer) -> list[bool]:
        if rank == 1:
            sequencer.wait_for("rank 0 has left")
        _arrive(barrier, timeout=0.2 if rank == 0 else LONG_S)
        if rank == 0:
            sequencer.announce("rank 0 has left")
        steps = [barrier.in_step]
        _arrive(barrier, 1, stage="entry")
        return [*steps, barrier.in_step]

    assert [[False, True], [False, True]] == meet(2, run)


@pytest.mark.parametrize("server", [pytest.param(None, id="hosted-outside"), pytest.param(0, id="hosted-by-0")])
def test_barrier_timeout_at_the_moment_the_last_rank_arrives_is_no_timeout(
    monkeypatch: pytest.MonkeyPatch, server: int | None
) -> None:
    """Where the last arrival comes before the decision, all leave in peace, soon, and nothing stays in the store."""
    monkeypatch.setattr(_barrier, "GRACE_S", PATIENCE_S)
    monkeypatch.setattr(_barrier, "LINGER_S", PATIENCE_S)
    monkeypatch.setattr(_lookout, "LINGER_S", PATIENCE_S)
    deciders: list[threading.Thread] = []
    deciding, left, decided = threading.Event(), threading.Semaphore(0), threading.Event()

    def hook(method: str, key: str) -> None:
        is_decider = threading.current_thread() in deciders
        if (method, key) == ("compare_set", "rank/1"):  # rank 0 gathers what is known, to decide
            deciders.append(threading.current_thread())
            deciding.set()
        elif method == "add" and key.startswith("0/count/") and is_decider:
            for _ in range(2):
                assert left.acquire(timeout=PATIENCE_S)
        elif method == "add" and key.startswith("0/count/") and deciding.is_set() and server is None:
            # Where the rank hosts the store, its lookout sees that all is well, and decides nothing.
            assert decided.wait(PATIENCE_S)
        elif method == "set" and key.endswith("/ok") and is_decider:
            decided.set()

    def run(rank: int, store: dist.HashStore, _: Sequencer) -> tuple[Verdict, float]:
        if rank == 0:
            stores.extend([store, HookedStore(store, hook)])
            barriers.append(barrier_of(stores[1], 0, 3, server=server))
            start = time.monotonic()
            return _arrive(barriers[-1], timeout=0.2), time.monotonic() - start
        assert deciding.wait(PATIENCE_S)
        start = time.monotonic()
        barriers.append(barrier_of(store, rank, 3, server=server))
        verdict = _arrive(barriers[-1])
        left.release()
        return verdict, time.monotonic() - start

    stores: list[dist.Store] = []
    barriers: list[Barrier] = []
    results = values(run_threads(3, run, timeout=60.0))

    assert [True, True, True] == [verdict.ok for verdict, _ in results]
    assert max(waited for _, waited in results) < SOON_S
    assert _few_keys(stores[0], 3)


# Failures shorten the wait


@pytest.mark.parametrize("when", ["before", "while"])
def test_barrier_published_failure_bounds_the_wait_of_the_others(when: str) -> None:
    """From the moment at which a failure is known, peers wait for failure_timeout and no longer."""

    def run(rank: int, store: dist.HashStore, sequencer: Sequencer) -> tuple[Verdict, float] | None:
        barrier = barriers[rank] = barrier_of(store, rank, 3)
        if rank == 2:
            if when == "while":
                assert wait_until(lambda: is_waiting(store, 0, 3) and is_waiting(store, 1, 3))
            barrier.publish(Record(0, "exit", "scope", 0, _FAILED))
            assert wait_until(lambda: store.check(["collective_scope/3/0/0/news"]))
            sequencer.announce("published")
            return None
        if when == "before":
            sequencer.wait_for("published")
        start = time.monotonic()
        verdict = _arrive(barrier, failure_timeout=SHORT_S)
        return verdict, time.monotonic() - start

    barriers: dict[int, Barrier] = {}
    results = values(run_threads(3, run, timeout=60.0))[:2]

    for verdict, waited in results:
        assert SHORT_S / 2 <= waited < SOON_S
        assert verdict == results[0][0]
        assert (2,) == verdict.missing
        assert {2: ("body", 1)} == {rank: (o.phase, o.order) for rank, o in verdict.failures.items()}


def test_barrier_failure_published_at_the_moment_of_the_timeout_is_in_the_verdict() -> None:
    """A rank that gives up while a failure becomes known tells both: who is missing, and what failed there."""
    store, decided = dist.HashStore(), threading.Event()
    threads: list[threading.Thread] = []

    def hook(method: str, key: str) -> None:
        if method == "add" and key.startswith("0/count/") and not threads:
            threads.append(threading.current_thread())
            barrier_of(store, 1, 2).publish(Record(0, "exit", "scope", 0, _FAILED))
            assert wait_until(lambda: store.check(["collective_scope/2/0/0/news"]))
        elif (method, key) == ("compare_set", "0/news"):
            if threading.current_thread() in threads:  # reads the news too late
                assert decided.wait(PATIENCE_S)
            else:
                decided.set()

    hooked = HookedStore(store, hook)
    verdict = _arrive(barrier_of(hooked, 0, 2), timeout=0.2)

    assert ((1,), [1]) == (verdict.missing, list(verdict.failures))


def test_barrier_publish_does_not_wait_for_the_store(thawed: threading.Event) -> None:
    """A store that hangs does not delay the cleanups of a rank that failed."""
    store = HookedStore(dist.HashStore(), lambda *_: thawed.wait(PATIENCE_S))
    start = time.monotonic()
    barrier = barrier_of(store, 0, 2)
    barrier.publish(Record(0, "exit", "scope", 0, _FAILED))

    assert time.monotonic() - start < SOON_S / 2
    assert not thawed.is_set()


def test_barrier_published_failure_of_a_rank_that_arrives_is_counted_once() -> None:
    """A failure that was published and then arrives is one failure, and the round is complete."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Verdict:
        if rank == 1:
            barrier.publish(Record(0, "exit", "scope", 0, _FAILED))
        return _arrive(barrier, outcome=_FAILED if rank == 1 else OK)

    verdicts = meet(3, run)

    assert [verdicts[0]] * 3 == verdicts
    assert {1: attrs.evolve(_FAILED, order=1)} == verdicts[0].failures
    assert verdicts[0].complete


def test_barrier_failed_rank_waits_for_failure_timeout_only() -> None:
    """A rank that failed itself does not wait longer than failure_timeout for peers that are probably stuck."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Verdict | None:
        return _arrive(barrier, outcome=_FAILED, failure_timeout=0.2) if rank == 0 else None

    start = time.monotonic()
    verdict = meet(2, run)[0]

    assert (1,) == verdict.missing
    assert time.monotonic() - start < SOON_S


# Mismatches


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"scope": "other"}, id="name"),
        pytest.param({"sequence": 1}, id="sequence"),
        pytest.param({"stage": "entry"}, id="stage"),
    ],
)
@pytest.mark.parametrize("server", [pytest.param(None, id="hosted-outside"), pytest.param(0, id="hosted-by-0")])
def test_barrier_different_places_end_the_wait_at_once(other: dict[str, Any], server: int | None) -> None:
    """Ranks at different places do not wait for one another, and read the same verdict."""

    def run(rank: int, barrier: Barrier, _: Sequencer) -> tuple[Verdict, bool]:
        record = {"scope": "scope", "sequence": 0, **(other if rank == 1 else {})}
        return _arrive(barrier, **record), barrier.in_step

    start = time.monotonic()
    (first, in_step), (second, in_step_too) = meet(2, run, server=server)

    assert time.monotonic() - start < SOON_S
    assert first == second
    if "stage" in other:  # then that is what tells the places apart
        assert first.names == {0: ("scope (exit)", 0), 1: (f"scope ({other['stage']})", 0)}
    else:
        assert first.names == {0: ("scope", 0), 1: (other.get("scope", "scope"), other.get("sequence", 0))}
    assert (False, False) == (in_step, in_step_too)


def test_barrier_mismatch_is_told_to_ranks_that_come_later_too() -> None:
    """A third rank that comes after the mismatch reads the verdict of the two that met."""

    def run(rank: int, barrier: Barrier, sequencer: Sequencer) -> Verdict:
        if rank == 2:
            for peer in (0, 1):
                sequencer.wait_for(f"rank {peer} has left")
        verdict = _arrive(barrier, scope="other" if rank == 1 else "scope")
        sequencer.announce(f"rank {rank} has left")
        return verdict

    verdicts = meet(3, run)

    assert [verdicts[0]] * 3 == verdicts
    assert {0, 1} == set(verdicts[0].names)


# Warnings


def test_warning_times_are_multiples_of_the_first_and_never_end() -> None:
    """At 1, 3, 6 and 12 times what was asked for, then again every 12 times."""
    times = itertools.islice(_lookout.warning_times(100.0, 10.0), 7)

    assert [110.0, 130.0, 160.0, 220.0, 340.0, 460.0, 580.0] == list(times)


def test_barrier_long_wait_is_logged_with_names(caplog: pytest.LogCaptureFixture) -> None:
    """Long before the deadline, a waiting rank says who is missing; again and again."""

    def warnings() -> list[str]:
        return [each for each in caplog.messages if "has waited" in each]

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Verdict:
        if rank == 2:
            assert wait_until(lambda: len(warnings()) >= 6)
        return _arrive(barrier, warn_after=0.05)

    verdicts = meet(3, run)

    assert all(verdict.ok for verdict in verdicts)
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert any(
        re.match(r"rank 0 has waited 0\.\d s at the exit of scope 'scope'; ranks? (1 and )?2 of 3 missing\n", each)
        for each in warnings()
    )


def test_barrier_rank_that_comes_while_it_is_asked_for_is_not_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning that was not out when the wait ended would say of a rank that left in peace that it is missing."""
    asked, left = threading.Event(), threading.Event()
    locate = _lookout.Lookout._locate  # noqa: SLF001  (the moment is what is tested)

    def locate_slowly(*args: Any) -> Any:
        where = locate(*args)
        asked.set()
        assert left.wait(PATIENCE_S)
        return where

    def run(rank: int, barrier: Barrier, _: Sequencer) -> Verdict:
        if rank == 1:
            assert asked.wait(PATIENCE_S)
            return _arrive(barrier)
        verdict = _arrive(barrier, warn_after=0.05)
        left.set()
        assert barrier._helper is not None  # noqa: SLF001  (the thread of the lookout)
        barrier._helper.call(lambda _: None, PATIENCE_S)  # noqa: SLF001  (after the lookout has ended)
        return verdict

    monkeypatch.setattr(_lookout.Lookout, "_locate", locate_slowly)
    verdicts = meet(2, run)

    assert all(verdict.ok for verdict in verdicts)
    assert caplog.messages == []


def test_barrier_long_wait_with_a_store_that_does_not_answer_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, thawed: threading.Event
) -> None:
    """When the store does not even tell who is missing, the warning says that."""
    monkeypatch.setattr(_barrier, "GRACE_S", 0.1)
    store = dist.HashStore()

    def hook(method: str, key: str) -> None:
        if (method, key) == ("compare_set", "rank/1"):  # what the warning asks for
            thawed.wait(PATIENCE_S)

    def run(rank: int, store_: dist.HashStore, _: Sequencer) -> Verdict:
        assert store_ is not None
        if rank == 0:
            return _arrive(barrier_of(hooked, 0, 2), warn_after=1.0)
        assert wait_until(lambda: bool(caplog.messages))
        thawed.set()
        return _arrive(barrier_of(store, 1, 2))

    hooked = HookedStore(store, hook)
    verdicts = values(run_threads(2, run, timeout=60.0))

    assert [True, True] == [verdict.ok for verdict in verdicts]
    assert re.match(
        r"rank 0 has waited \d\.\d s in scope 'scope'; the store does not answer, so nobody can be named",
        caplog.messages[0],
    )


# Stores that hang or are gone


@pytest.mark.parametrize(
    "method", [pytest.param("", id="every-call"), pytest.param("wait", id="wait"), pytest.param("add", id="add")]
)
def test_barrier_store_that_hangs_is_bounded(method: str, thawed: threading.Event) -> None:
    """Whatever call to the store does not come back, the wait ends soon after the timeout, with who is missing."""

    def hook(called: str, _: str) -> None:
        if method in ("", called):
            thawed.wait(PATIENCE_S)

    store = HookedStore(dist.HashStore(), hook)
    barrier = barrier_of(store, 1, 3)
    start = time.monotonic()
    verdict = _arrive(barrier, timeout=0.2)

    assert 0.2 <= time.monotonic() - start < PATIENCE_S / 2
    assert ((0, 2), (), False) == (verdict.missing, verdict.lost, barrier.in_step)
    assert {1: OK} == verdict.outcomes
    # Where only the wait hangs, the verdict is decided over another connection, and is the peers' too.
    assert verdict.reason == "" or "(hosted outside of the group) has not answered" in verdict.reason
    assert (method == "wait") == (verdict.reason == "")


def test_barrier_connection_that_hangs_is_bounded(thawed: threading.Event) -> None:
    """A connection that cannot be made in time is bounded like any call."""

    def connect() -> dist.Store:
        thawed.wait(PATIENCE_S)
        return dist.HashStore()

    start = time.monotonic()
    barrier = Barrier(connect, 0, 2, server=0)
    verdict = _arrive(barrier, timeout=0.2)

    assert time.monotonic() - start < PATIENCE_S / 2
    assert (1,) == verdict.missing
    assert "(hosted by rank 0)" in verdict.reason


@pytest.mark.parametrize(
    ("server", "lost", "missing"),
    [
        pytest.param(None, (), (0, 2), id="hosted-outside"),
        pytest.param(0, (0,), (2,), id="hosted-by-a-peer"),
        pytest.param(1, (), (0, 2), id="hosted-here"),
    ],
)
@pytest.mark.parametrize(
    "method", [pytest.param("", id="every-call"), pytest.param("wait", id="wait"), pytest.param("add", id="add")]
)
def test_barrier_store_that_is_gone_tells_who_hosted_it(
    method: str, server: int | None, lost: tuple[int, ...], missing: tuple[int, ...]
) -> None:
    """When the store breaks off, the rank that hosted it is lost, of the others nothing is known; at once."""

    def hook(called: str, _: str) -> None:
        if method in ("", called):
            msg = "Connection reset by peer"
            raise dist.DistNetworkError(msg)

    store = HookedStore(dist.HashStore(), hook)
    start = time.monotonic()
    verdict = _arrive(barrier_of(store, 1, 3, server=server))

    assert time.monotonic() - start < SOON_S
    assert (lost, missing) == (verdict.lost, verdict.missing)
    assert "is gone: " in verdict.reason
    assert "Connection reset by peer" in verdict.reason


@pytest.mark.parametrize(
    ("guesses", "host"),
    [
        pytest.param([None, 1, 0], 1, id="rank-1-and-not-rank-0"),
        pytest.param([None, 0, 0], None, id="no-rank"),
    ],
)
def test_barrier_store_that_is_gone_after_a_round_tells_who_really_hosted_it(
    guesses: list[int | None], host: int | None
) -> None:
    """Only the rank that hosts the store knows so at first; once all have met, every rank does."""
    gone = threading.Event()

    def hook(*_: str) -> None:
        if gone.is_set():
            msg = "Connection reset by peer"
            raise dist.DistNetworkError(msg)

    def run(rank: int, store: dist.HashStore, sequencer: Sequencer) -> tuple[Verdict, Verdict]:
        barrier = barrier_of(HookedStore(store, hook), rank, 3, server=guesses[rank])
        first = _arrive(barrier)
        sequencer.announce(f"{rank} has met")
        for peer in range(3):
            sequencer.wait_for(f"{peer} has met")
        gone.set()
        return first, _arrive(barrier, 1)

    results = values(run_threads(3, run))

    assert [True] * 3 == [first.ok for first, _ in results]
    assert [() if host in (None, rank) else (host,) for rank in range(3)] == [later.lost for _, later in results]
    where = f"hosted by rank {host}" if host is not None else "hosted outside of the group"
    assert all(where in later.reason for _, later in results)


def test_barrier_store_that_fails_only_at_the_decision_is_gone() -> None:
    """A store that breaks off when the timeout has run out is told as gone, not as frozen."""
    decides = threading.Event()

    def hook(called: str, key: str) -> None:
        if key == "0/verdict":
            decides.set()
        if called == "wait":
            assert decides.wait(PATIENCE_S)
        if decides.is_set():
            msg = "Connection reset by peer"
            raise dist.DistNetworkError(msg)

    store = HookedStore(dist.HashStore(), hook)
    verdict = _arrive(barrier_of(store, 0, 2), timeout=0.2)

    assert (1,) == verdict.missing
    assert "is gone: " in verdict.reason


def test_barrier_error_that_no_store_raises_is_not_swallowed() -> None:
    """What is not one of the store's errors is a defect, and surfaces."""

    def hook(called: str, _: str) -> None:
        if called == "wait":
            msg = "unforeseen"
            raise LookupError(msg)

    store = HookedStore(dist.HashStore(), hook)
    barrier = barrier_of(store, 0, 2)

    with pytest.raises(LookupError, match=r"^'?unforeseen'?$"):
        _arrive(barrier, timeout=SOON_S)
    assert not barrier.in_step


def test_barrier_store_that_is_slow_with_the_verdict_has_as_long_as_the_wait() -> None:
    """Only after the deadline a store that has not answered for a moment is taken for frozen."""
    slow = threading.Event()

    def hook(_: str, key: str) -> None:
        if key == "0/verdict" and not slow.is_set():
            slow.set()
            time.sleep(2 * _barrier.GRACE_S)  # the slow store itself

    store = dist.HashStore()
    barrier, other = barrier_of(HookedStore(store, hook), 0, 2), barrier_of(store, 1, 2)

    def run(rank: int, *_: Any) -> Verdict:
        if rank == 0:
            return _arrive(barrier)
        assert wait_until(lambda: is_waiting(store, 0, 2))
        return _arrive(other, outcome=_FAILED)

    verdicts = values(run_threads(2, run, timeout=60.0))

    assert slow.is_set()
    assert [[1], [1]] == [list(verdict.failures) for verdict in verdicts]
    assert [True, True] == [verdict.complete for verdict in verdicts]


def test_barrier_store_that_hangs_with_the_verdict_is_bounded_by_failure_timeout(thawed: threading.Event) -> None:
    """A rank that was told that the round is over does not wait longer to read why than for a failure."""
    store = dist.HashStore()
    hooked = HookedStore(store, lambda _, key: key == "0/verdict" and thawed.wait(PATIENCE_S))
    barriers = [barrier_of(hooked, 0, 2), barrier_of(store, 1, 2)]

    def run(rank: int, *_: Any) -> tuple[Verdict, float]:
        assert rank == 0 or wait_until(lambda: is_waiting(store, 0, 2))
        start = time.monotonic()
        verdict = _arrive(barriers[rank], failure_timeout=SHORT_S, outcome=_FAILED if rank == 1 else OK)
        return verdict, time.monotonic() - start

    (alone, seconds), (verdict, _) = values(run_threads(2, run, timeout=60.0))

    assert "has not answered for" in alone.reason
    assert SHORT_S < seconds < SOON_S
    assert [1] == list(verdict.failures)


def test_barrier_works_again_after_the_store_has_hung() -> None:
    """When the store answers again, so does the barrier."""
    thawed = threading.Event()
    inner = dist.HashStore()

    def run(rank: int, _: dist.HashStore, sequencer: Sequencer) -> list[Verdict]:
        barrier = barrier_of(HookedStore(inner, lambda *_: thawed.wait(PATIENCE_S)) if rank == 0 else inner, rank, 2)
        verdicts = [_arrive(barrier, timeout=0.2)]
        thawed.set()
        sequencer.announce(f"rank {rank} has left")
        sequencer.wait_for(f"rank {1 - rank} has left")
        return [*verdicts, _arrive(barrier, 1)]

    verdicts = values(run_threads(2, run, timeout=60.0))

    assert [False, False] == [each[0].complete for each in verdicts]
    assert [True, True] == [each[1].ok for each in verdicts]


# The rank that hosts the store


def test_barrier_host_of_the_store_leaves_last() -> None:
    """The rank whose process hosts the store stays until all peers have read the verdict."""
    store, order = dist.HashStore(), []
    peer_waits, host_waits = threading.Event(), threading.Event()

    def host(method: str, key: str) -> None:
        if (method, key) == ("wait", "0/seen/1"):
            host_waits.set()

    def peer(method: str, key: str) -> None:
        if method == "wait" and key.endswith("/ok"):
            peer_waits.set()
        elif (method, key) == ("set", "0/seen/1"):
            assert host_waits.wait(PATIENCE_S)
            order.append("peer confirms")

    stores = [HookedStore(store, host), HookedStore(store, peer)]

    def run(rank: int, _: dist.HashStore, __: Sequencer) -> Verdict:
        if rank == 0:
            assert peer_waits.wait(PATIENCE_S)
        verdict = _arrive(barrier_of(stores[rank], rank, 2, server=0))
        if rank == 0:
            order.append("host leaves")
        return verdict

    assert [True, True] == [verdict.ok for verdict in values(run_threads(2, run))]
    assert ["peer confirms", "host leaves"] == order


@pytest.mark.parametrize("failing", [False, True], ids=["ok", "failed"])
def test_barrier_host_of_the_store_waits_for_readers_a_short_time_only(
    monkeypatch: pytest.MonkeyPatch, thawed: threading.Event, *, failing: bool
) -> None:
    """A peer that arrived and does not read keeps the rank that hosts the store for LINGER_S, whatever the timeout."""
    monkeypatch.setattr(_barrier, "LINGER_S", 0.2)
    monkeypatch.setattr(_lookout, "LINGER_S", 0.2)
    store = dist.HashStore()

    def peer(_: str, key: str) -> None:
        if key in ("0/read", "0/seen/1"):
            thawed.wait(PATIENCE_S)

    stores = [store, HookedStore(store, peer)]

    def run(rank: int, _: dist.HashStore, __: Sequencer) -> tuple[Verdict, float]:
        start = time.monotonic()
        verdict = _arrive(barrier_of(stores[rank], rank, 2, server=0), outcome=_FAILED if failing and rank == 0 else OK)
        thawed.set()
        return verdict, time.monotonic() - start

    results = values(run_threads(2, run, timeout=60.0))

    assert results[0][0].complete
    assert results[0][1] < 5.0


def test_barrier_store_that_ends_while_its_host_waits_for_readers_does_no_harm() -> None:
    """The verdict stands, also if the store breaks off while the last peers read it."""
    store = dist.HashStore()

    def host(method: str, key: str) -> None:
        if (method, key) == ("wait", "0/seen/1"):
            msg = "Connection reset by peer"
            raise dist.DistNetworkError(msg)

    def peer(method: str, key: str) -> None:
        if method == "wait" and key.endswith("/ok"):
            peer_waits.set()

    peer_waits = threading.Event()
    stores = [HookedStore(store, host), HookedStore(store, peer)]

    def run(rank: int, _: dist.HashStore, __: Sequencer) -> Verdict:
        if rank == 0:
            assert peer_waits.wait(PATIENCE_S)
        return _arrive(barrier_of(stores[rank], rank, 2, server=0))

    assert [True, True] == [verdict.ok for verdict in values(run_threads(2, run))]


def test_barrier_host_of_the_store_raises_with_the_peer_that_gave_up_on_it(
    monkeypatch: pytest.MonkeyPatch, thawed: threading.Event
) -> None:
    """A rank that raised because the store was frozen counts as arrived, but nobody leaves in peace without it."""
    monkeypatch.setattr(_barrier, "GRACE_S", 0.1)
    store, counting = dist.HashStore(), list[threading.Thread]()

    def peer(_: str, key: str) -> None:
        counting[:] = counting or [threading.current_thread()]
        if key == "rank/1" and threading.current_thread() not in counting:  # what the lookout begins with
            thawed.wait(PATIENCE_S)

    def run(rank: int, _: dist.HashStore, sequencer: Sequencer) -> Verdict:
        barrier = barrier_of(HookedStore(store, peer) if rank == 1 else store, rank, 2, server=0)
        if rank == 1:
            barrier.greet()
            assert wait_until(lambda: bool(counting))
            verdict = _arrive(barrier, timeout=0.2)
            sequencer.announce("rank 1 gave up")
            return verdict
        sequencer.wait_for("rank 1 gave up")
        return _arrive(barrier)

    host, gave_up = values(run_threads(2, run))

    assert "has not answered for" in gave_up.reason
    assert "rank 1 gave up, because the store did not answer in time" == host.reason
    assert not host.complete


def test_barrier_verdict_of_the_deadline_stands_if_the_thread_in_the_store_does_not_come_back(
    monkeypatch: pytest.MonkeyPatch, thawed: threading.Event
) -> None:
    """What the lookout decided is what counts, whatever became of the other connection to the store."""
    monkeypatch.setattr(_barrier, "GRACE_S", 0.2)

    def hook(method: str, _: str) -> None:
        if method == "wait":
            thawed.wait(PATIENCE_S)

    verdict = _arrive(barrier_of(HookedStore(dist.HashStore(), hook), 0, 2), outcome=_FAILED, timeout=0.3)

    assert ((1,), [0]) == (verdict.missing, list(verdict.failures))


def test_barrier_deadline_at_which_all_are_here_is_no_timeout_if_the_thread_in_the_store_is_late(
    monkeypatch: pytest.MonkeyPatch, thawed: threading.Event
) -> None:
    """Where the last rank came in time, a rank that hears of it late leaves in peace too."""
    monkeypatch.setattr(_barrier, "LINGER_S", 0.2)
    monkeypatch.setattr(_barrier, "GRACE_S", 0.2)
    store = dist.HashStore()

    def hook(method: str, _: str) -> None:
        if method == "wait":
            thawed.wait(PATIENCE_S)

    def run(rank: int, _: dist.HashStore, __: Sequencer) -> Verdict:
        if rank == 1:
            assert wait_until(lambda: is_waiting(store, 0, 2))
            return _arrive(barrier_of(store, 1, 2))
        return _arrive(barrier_of(HookedStore(store, hook), 0, 2), timeout=1.0)

    assert [True, True] == [verdict.ok for verdict in values(run_threads(2, run))]


def test_barrier_two_that_end_a_round_when_the_last_rank_arrived_and_died_decide_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one, which takes the last rank for lost, waits for the word of the first, for which all had arrived."""
    monkeypatch.setattr(_protocol, "RECORDS_S", PATIENCE_S / 5)
    store, at_decision, waits = dist.HashStore(), threading.Event(), threading.Event()
    checks = itertools.count()

    def first(method: str, key: str) -> None:
        if method == "set" and key.endswith("/ok"):
            at_decision.set()
            assert waits.wait(PATIENCE_S)

    def second(method: str, _: str) -> None:
        if method == "check" and next(checks) == 2:
            waits.set()

    mine = Record(0, "exit", "scope", 0)
    protocols = [_protocol.Protocol(rank, 3, None) for rank in range(3)]
    stores = [HookedStore(store, hook) for hook in (first, second, lambda *_: None)]
    views = [protocol.join(each) for protocol, each in zip(protocols, stores, strict=True)]
    for view in views:
        view.add(_protocol._count_key(mine), 1)  # noqa: SLF001  (as far as the third one came)
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.append(protocols[0].close(mine, views[0])))
    thread.start()
    assert at_decision.wait(PATIENCE_S)
    try:
        verdicts.append(protocols[1].close(mine, views[1], lost=(2,)))
    finally:
        waits.set()
        thread.join(PATIENCE_S)

    assert [True, True] == [verdict.ok for verdict in verdicts]


def test_barrier_two_that_end_a_spoiled_round_decide_alike() -> None:
    """The second one finds the verdict of the first, whatever it would have said itself."""
    store, mine = dist.HashStore(), Record(0, "exit", "scope", 0)
    protocols = [_protocol.Protocol(rank, 3, None) for rank in range(3)]
    views = [protocol.join(store) for protocol in protocols]
    for view in views:
        view.add(_protocol._count_key(mine), 1)  # noqa: SLF001  (all have arrived)
    views[2].add(_protocol._count_key(mine), _protocol._SPOILED)  # noqa: SLF001  (one has something to report)
    first = protocols[0].close(mine, views[0], lost=(2,), is_spoiled=True)
    second = protocols[1].close(mine, views[1])

    assert (2,) == first.lost
    assert first == second


def test_barrier_mismatch_found_twice_does_not_wait_for_a_rank_that_has_gone_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who finds it second may find no record any more of a rank that has read the verdict and told of its next round."""
    monkeypatch.setattr(_protocol, "RECORDS_S", LONG_S)
    store = dist.HashStore()
    records = [Record(0, "exit", f"part {rank % 2}", 0) for rank in range(4)]
    protocols = [_protocol.Protocol(rank, 4, None) for rank in range(4)]
    views = [protocol.join(store) for protocol in protocols]
    for rank, (view, record) in enumerate(zip(views, records, strict=True)):
        view.add(_protocol._count_key(record), 1)  # noqa: SLF001  (all have arrived)
        view.set(f"rank/{rank}", record.encode())
    verdicts = [protocols[0].close(records[0], views[0])]
    views[1].set("rank/1", attrs.evolve(records[1], round=1, stage="entry").encode())
    thread = threading.Thread(target=lambda: verdicts.append(protocols[3].close(records[3], views[3])), daemon=True)
    thread.start()
    thread.join(SOON_S)

    assert not thread.is_alive()
    assert {0, 1, 2, 3} == set(verdicts[0].names)
    assert verdicts[0] == verdicts[1]


def test_barrier_lookout_that_is_broken_is_not_silent(thawed: threading.Event) -> None:
    """What is no error of the store surfaces where the wait is, as soon as the lookout meets it: when it ends the round."""

    def hook(method: str, _: str) -> None:
        if method == "wait":
            thawed.wait(PATIENCE_S)
        if method == "set":
            msg = "broken"
            raise TypeError(msg)

    with pytest.raises(TypeError, match=r"^broken$"):
        _arrive(barrier_of(HookedStore(dist.HashStore(), hook), 0, 2), timeout=0.1)


# Interrupts


@pytest.mark.parametrize("late", ["wait", "add"], ids=["before-it-is-known", "while-it-is-confirmed"])
@pytest.mark.parametrize("server", [pytest.param(None, id="hosted-outside"), pytest.param(1, id="hosted-by-the-peer")])
def test_barrier_interrupt_when_all_have_arrived_is_that_of_one_rank(
    late: str, server: int | None, thawed: threading.Event
) -> None:
    """Ctrl-C that comes after the last arrival surfaces where it was sent; the peers leave in peace."""
    store, arrived, held, adds = dist.HashStore(), threading.Event(), threading.Event(), []

    def hook(method: str, key: str) -> None:
        adds.extend([key] * (method == "add"))
        if method == late and (late == "wait" or len(adds) > 1) and not held.is_set():
            arrived.set()
            held.set()
            thawed.wait(PATIENCE_S)

    barrier, other = barrier_of(HookedStore(store, hook), 0, 2, server=server), barrier_of(store, 1, 2, server=server)
    verdicts: list[Verdict] = []

    def be_peer() -> None:
        if late == "wait":
            assert arrived.wait(PATIENCE_S)
        else:
            assert wait_until(lambda: bool(adds))
        verdicts.append(_arrive(other, timeout=PATIENCE_S))

    peer = threading.Thread(target=be_peer)
    peer.start()
    is_full = (lambda: held.is_set() and bool(verdicts)) if server is None else (lambda: held.is_set() and _is_full())

    def _is_full() -> bool:
        return any(store.add(key, 0) & 0xFFFF == 2 for key in adds[:1] for key in [f"collective_scope/2/0/{key}"])

    with pytest.raises(KeyboardInterrupt), interrupted_when(is_full):
        _arrive(barrier, timeout=PATIENCE_S)
    thawed.set()
    peer.join(PATIENCE_S)

    assert [True] == [verdict.ok for verdict in verdicts]


@pytest.mark.parametrize("wakes", [True, False], ids=["wakes", "does-not-wake"])
def test_barrier_interrupted_rank_ends_the_round_for_all(wakes: bool) -> None:  # noqa: FBT001  (parametrized)
    """Ctrl-C ends the wait at once, there and on the peers, who read whose wait was ended and why."""
    store = dist.HashStore()
    barrier, other = barrier_of(store, 0, 3), barrier_of(store, 1, 3)
    verdicts: list[Verdict] = []
    peer = threading.Thread(target=lambda: verdicts.append(_arrive(other, timeout=PATIENCE_S)))
    peer.start()
    start = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        interrupted_when(lambda: is_waiting(store, 0, 3) and is_waiting(store, 1, 3), wakes=wakes),
    ):
        _arrive(barrier, timeout=PATIENCE_S)
    peer.join(PATIENCE_S)

    assert time.monotonic() - start < SOON_S
    assert "rank 0 stopped waiting at the barrier: KeyboardInterrupt" == verdicts[0].reason
    assert {0: ("barrier", "KeyboardInterrupt")} == {
        rank: (o.phase, o.type_name) for rank, o in verdicts[0].failures.items()
    }
    assert (False, False) == (barrier.in_step, other.in_step)


@pytest.mark.parametrize("outcome", [OK, _FAILED], ids=["ok", "failed"])
def test_barrier_interrupted_rank_that_the_store_has_not_heard_of_lets_nobody_go_in_peace(
    outcome: Outcome, thawed: threading.Event
) -> None:
    """Ctrl-C that comes before a rank is counted ends the round for all alike, whoever reads of it first."""
    store, others = dist.HashStore(), {0: threading.Event(), 2: threading.Event()}
    verdicts: dict[int, Verdict] = {}

    def starve() -> dist.Store:
        thawed.wait(PATIENCE_S)
        return store

    def read_last(_: str, key: str) -> None:
        if key == "0/news":
            others[0].wait(PATIENCE_S)

    def be_peer(rank: int, barrier: Barrier) -> None:
        verdicts[rank] = _arrive(barrier, timeout=PATIENCE_S)
        others[rank].set()

    barrier = Barrier(starve, 1, 3)
    barrier.greet()  # now it has the thread that counts it, which is held up; others of its threads are not
    barrier.connect = lambda: store
    peers = [barrier_of(store, 0, 3), barrier_of(HookedStore(store, read_last), 2, 3)]
    threads = [threading.Thread(target=be_peer, args=(peer.rank, peer)) for peer in peers]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        interrupted_when(lambda: barrier.rounds == 1 and is_waiting(store, 0, 3) and is_waiting(store, 2, 3)),
    ):
        _arrive(barrier, outcome=outcome, timeout=PATIENCE_S)
    for thread in threads:
        thread.join(PATIENCE_S)

    assert time.monotonic() - start < SOON_S
    assert [1] == list(verdicts[0].failures)
    assert (0, 2) == verdicts[0].arrived
    assert "rank 1 stopped waiting at the barrier: KeyboardInterrupt" == verdicts[0].reason
    assert verdicts[0] == verdicts[2]
    thawed.set()
    ranks = (peers[0], barrier, peers[1])
    assert all(verdict.ok for verdict in values(run_threads(3, lambda rank, *_: _arrive(ranks[rank], 1))))


def test_barrier_rank_that_gave_up_before_the_store_heard_of_it_never_arrives(thawed: threading.Event) -> None:
    """When the store thaws, the peers are told alike that the rank gave up, and nobody waits for it to read that."""
    store = dist.HashStore()
    verdicts: dict[int, Verdict] = {}
    ranks = [barrier_of(store, 0, 3), barrier_of(HookedStore(store, lambda *_: thawed.wait(PATIENCE_S)), 1, 3)]
    ranks.append(barrier_of(store, 2, 3))

    def be_peer(barrier: Barrier) -> None:
        verdicts[barrier.rank] = _arrive(barrier, timeout=PATIENCE_S)

    threads = [threading.Thread(target=be_peer, args=(ranks[rank],)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    alone = _arrive(ranks[1], timeout=0.5)
    thawed.set()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert "has not answered for" in alone.reason
    assert "rank 1 gave up, because the store did not answer in time" == verdicts[0].reason
    assert (0, 2) == verdicts[0].arrived
    assert verdicts[0] == verdicts[2]
    assert all(verdict.ok for verdict in values(run_threads(3, lambda rank, *_: _arrive(ranks[rank], 1))))


def test_barrier_interrupted_rank_that_had_failed_keeps_its_failure() -> None:
    """What the peers read of a rank that failed, and was then interrupted, is its failure."""
    store = dist.HashStore()
    barrier, late = barrier_of(store, 0, 2), barrier_of(store, 1, 2)
    with pytest.raises(KeyboardInterrupt), interrupted_when(lambda: is_waiting(store, 0, 2)):
        _arrive(barrier, outcome=_FAILED, timeout=PATIENCE_S)
    verdict = _arrive(late)

    assert ("ValueError", "no") == (verdict.failures[0].type_name, verdict.failures[0].message)
    assert verdict.reason


def test_barrier_interrupt_with_a_store_that_hangs_is_prompt(
    thawed: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C works while the store hangs; that the peers could not be told is logged."""
    waiting = threading.Event()

    def hook(*_: Any) -> None:
        waiting.set()
        thawed.wait(PATIENCE_S)

    store = HookedStore(dist.HashStore(), hook)
    barrier = barrier_of(store, 0, 2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted_when(waiting.is_set):
        _arrive(barrier, timeout=PATIENCE_S)

    assert time.monotonic() - start < SOON_S
    assert not barrier.in_step
    assert any("could not tell its peers" in each for each in caplog.messages)


# What stays in the store


def _rounds_ok(rank: int, barrier: Barrier, round_: int, _: Sequencer) -> None:
    assert _arrive(barrier, round_).ok, rank


def _rounds_failed(rank: int, barrier: Barrier, round_: int, _: Sequencer) -> None:
    if rank == 1:
        barrier.publish(Record(0, "exit", "scope", round_, _FAILED))
    assert _arrive(barrier, round_, outcome=_FAILED if rank == 1 else OK).failures


def _rounds_pending(rank: int, barrier: Barrier, round_: int, _: Sequencer) -> None:
    assert _arrive(barrier, round_, cleanups=(("a", ""),)).agreed, rank


def _rounds_mismatched(rank: int, barrier: Barrier, round_: int, _: Sequencer) -> None:
    assert _arrive(barrier, round_, scope=f"scope {rank}").names


def _rounds_late(rank: int, barrier: Barrier, round_: int, sequencer: Sequencer) -> None:
    if rank == 1:
        sequencer.wait_for(f"round {round_} is over")
    verdict = _arrive(barrier, round_, timeout=0.05 if rank == 0 else LONG_S)
    if rank == 0:
        sequencer.announce(f"round {round_} is over")
    assert 1 in verdict.missing


@pytest.mark.parametrize("server", [pytest.param(None, id="hosted-outside"), pytest.param(0, id="hosted-by-0")])
@pytest.mark.parametrize(
    ("play", "rounds"),
    [
        pytest.param(_rounds_ok, 200, id="ok"),
        pytest.param(_rounds_failed, 50, id="failed"),
        pytest.param(_rounds_pending, 50, id="collective-cleanups"),
        pytest.param(_rounds_mismatched, 50, id="mismatch"),
        pytest.param(_rounds_late, 5, id="late-rank"),
    ],
)
def test_barrier_after_any_rounds_the_store_has_not_grown(
    play: Callable[[int, Barrier, int, Sequencer], None], rounds: int, server: int | None
) -> None:
    """Once all ranks have been told, nothing of a round stays in the store, whatever its verdict."""
    stores = []

    def run(rank: int, store: dist.HashStore, sequencer: Sequencer) -> Barrier:
        stores.append(store)
        barrier = barrier_of(store, rank, 2, server=server)
        for i in range(rounds):
            play(rank, barrier, i, sequencer)
        return barrier

    barriers = values(run_threads(2, run, timeout=60.0))

    assert _few_keys(stores[0], 2)
    assert 2 == len(barriers)


def test_barrier_that_is_dropped_ends_its_threads() -> None:
    """A barrier that nobody refers to any more leaves no thread behind."""

    def ours() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "collective_scope-store"}

    before = ours()
    meet(2, lambda _, barrier, __: _arrive(barrier))
    meet(2, lambda rank, barrier, __: _arrive(barrier, timeout=0.1) if rank == 0 else None)
    gc.collect()

    assert wait_until(lambda: not ours() - before)


def test_barrier_thread_that_comes_to_its_wait_when_the_round_is_over_ends() -> None:
    """A thread that is starved until the key that it waits for has come and gone does not wait for ever."""

    def ours() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "collective_scope-store"}

    store, waits, removes = dist.HashStore(), threading.Event(), threading.Event()

    def hook(method: str, key: str) -> None:
        if method == "delete_key" and key.endswith("/ok"):
            removes.set()
        if method == "wait" and key.endswith("/ok"):
            waits.set()
            assert wait_until(lambda: removes.is_set() and not store.check([f"collective_scope/2/0/{key}"]))

    def run(rank: int, _: dist.HashStore, __: Sequencer) -> Verdict:
        barrier = kept[rank]
        if rank == 1:
            assert waits.wait(PATIENCE_S)
            return _arrive(barrier, outcome=_FAILED)
        return _arrive(barrier)

    before = ours()
    kept = [barrier_of(HookedStore(store, hook), rank, 2) for rank in range(2)]
    verdicts = values(run_threads(2, run, timeout=60.0))
    assert wait_until(removes.is_set)
    kept.clear()

    assert verdicts[0] == verdicts[1]
    assert [1] == list(verdicts[0].failures)
    assert wait_until(lambda: not ours() - before)


# A second life on the same store


def _live(
    store: dist.Store, plays: list[Callable[[int, Barrier], Any]], *, first: int | None = None
) -> list[list[Any]]:
    """Have two ranks with new barriers do *plays*; where *first* is given, that rank arrives before the other begins."""
    kept: list[Barrier] = []

    def run(rank: int, _: dist.HashStore, sequencer: Sequencer) -> list[Any]:
        barrier = barrier_of(store, rank, 2)
        kept.append(barrier)
        if first is not None and rank != first:
            sequencer.wait_for("the first has begun")
        elif first is not None:
            threading.Thread(target=announce, args=(sequencer,)).start()
        return [play(rank, barrier) for play in plays]

    def seats(rank: int | None) -> int:
        return sum(store.check([f"collective_scope/2/{life}/seat/{rank}"]) for life in range(9))

    def announce(sequencer: Sequencer) -> None:
        if wait_until(lambda: seats(first) > before):
            sequencer.announce("the first has begun")

    def life() -> int:
        key = "collective_scope/2/life"
        return int(store.get(key)) if store.check([key]) else 0

    before, life_before = seats(first), life()
    results = values(run_threads(2, run, timeout=60.0))
    kept.clear()  # the group is destroyed, which ends this life of it
    assert life() > life_before
    return results


def test_barrier_that_is_dropped_has_ended_its_life_when_the_process_goes_on() -> None:
    """Who is told by this process that the group is made again finds none of its keys, however slow the store is."""
    dropped = threading.Event()

    def hook(method: str, key: str) -> None:
        if method == "compare_set" and key == "life" and dropped.is_set():
            time.sleep(0.1)  # a slow store: who does not wait for it goes on before

    store = dist.HashStore()
    barrier = barrier_of(HookedStore(store, hook), 0, 2)
    _arrive(barrier, timeout=0.1)
    dropped.set()
    del barrier

    assert b"1" == store.get("collective_scope/2/life")


def test_barrier_that_is_dropped_does_not_wait_for_a_store_that_hangs(thawed: threading.Event) -> None:
    """The end of a group is not held up by a frozen store for longer than half a second."""
    dropped, hangs, answers = threading.Event(), threading.Event(), threading.Event()

    def hook(method: str, key: str) -> None:
        if method == "compare_set" and key == "life" and dropped.is_set():
            hangs.set()
            thawed.wait(PATIENCE_S)
            answers.set()

    barrier = barrier_of(HookedStore(dist.HashStore(), hook), 0, 2)
    _arrive(barrier, timeout=0.1)
    dropped.set()
    del barrier

    assert hangs.wait(PATIENCE_S)
    assert not answers.is_set()


@pytest.mark.parametrize("is_served", [True, False], ids=["there", "gone"])
def test_barrier_of_a_store_whose_host_is_unknown_ends_its_life_if_it_is_still_there(
    is_served: bool,  # noqa: FBT001  (parametrized)
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 never came to say whether the store lives in its process: then the store is asked, if it is there."""
    monkeypatch.setattr(_store_thread, "FAREWELL_S", PATIENCE_S)  # a busy machine is not what this is about
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    barrier = Barrier(client.clone, 1, 2, server=0)  # type: ignore[attr-defined]  # torch's stub lacks it
    verdict = _arrive(barrier, timeout=0.1)
    key = _protocol._count_key(Record(0, "exit", verdict.scope, 0))  # noqa: SLF001  (as it is called in the store)
    stale = f"collective_scope/2/0/{key}/ok"
    assert wait_until(lambda: not client.check([stale]))  # removing it from a store that is gone is not tried here
    capfd.readouterr()
    if not is_served:
        del server
    del barrier

    assert ("", "") == capfd.readouterr()
    assert not is_served or b"1" == client.get("collective_scope/2/life")


def _all_arrive(_: int, barrier: Barrier) -> Verdict:
    return _arrive(barrier)


def _rank_1_stays_away(rank: int, barrier: Barrier) -> Verdict | None:
    return _arrive(barrier, timeout=0.2) if rank == 0 else None


def _rank_1_fails_and_leaves(rank: int, barrier: Barrier) -> Verdict | None:
    if rank == 1:
        barrier.publish(Record(0, "exit", "scope", 0, _FAILED))
        return None
    return _arrive(barrier, failure_timeout=0.2)


def _different_scopes(rank: int, barrier: Barrier) -> Verdict:
    return _arrive(barrier, scope=f"scope {rank}")


@pytest.mark.parametrize("first", [0, 1], ids=["rank-0-first", "rank-1-first"])
@pytest.mark.parametrize(
    "earlier",
    [
        pytest.param([_all_arrive], id="ok"),
        pytest.param([_all_arrive, _all_arrive, _all_arrive], id="more-rounds"),
        pytest.param([_all_arrive, _rank_1_stays_away], id="rank-1-missed-the-last-round"),
        pytest.param([_rank_1_fails_and_leaves], id="rank-1-failed-and-left"),
        pytest.param([_different_scopes], id="mismatch"),
        pytest.param([_rank_1_stays_away], id="rank-1-never-came"),
    ],
)
def test_barrier_second_life_on_the_same_store_starts_afresh(
    earlier: list[Callable[[int, Barrier], Any]], first: int
) -> None:
    """A new group on a store with an old group's keys meets only its own ranks, whoever comes first."""
    store = dist.HashStore()
    _live(store, earlier)

    start = time.monotonic()
    for _ in range(2):
        assert [[True, True], [True, True]] == [
            [verdict.ok for verdict in each]
            for each in _live(store, [lambda _, barrier: _arrive(barrier, timeout=SOON_S)] * 2, first=first)
        ]
    assert time.monotonic() - start < SOON_S
