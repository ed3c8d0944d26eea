"""Messages while a scope lasts: which ranks are late, working, or lost, and where they are."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from collective_scope.agreement import control, locate, watch
from collective_scope.agreement.clock import warning_times
from collective_scope.agreement.locate import ANSWER_S
from collective_scope.agreement.process import Process
from collective_scope.agreement.records import OK, Outcome, Record, Verdict
from collective_scope.agreement.revocation import Revocation
from collective_scope.exceptions import RevokedInterrupt
from tests.agreement.conftest import Other, World
from tests.stores import (
    LONG_S,
    PATIENCE_S,
    HookedStore,
    Rank,
    at_once,
    is_control,
    is_waiting,
    record_of,
    tell_as,
    wait_until,
)


FAILED = Outcome("body", "ValueError", "no", "Traceback ...")

WARN_S = 0.6
"""When ranks first speak: a little longer than it takes to ask the others where they are."""

RankOn = Callable[..., Rank]


def _joined(ranks: list[Rank], store: dist.Store) -> list[Rank]:
    """Return *ranks* once each can answer."""
    for rank in ranks:
        rank.barrier.join()
    assert wait_until(lambda: all(record_of(store, rank.rank) is not None for rank in ranks))
    return ranks


def _kinds(rank: Rank) -> list[str]:
    return [what for what, _ in rank.said]


def test_warning_times_are_multiples_of_the_first_and_never_end() -> None:
    """A rank speaks at 1, 3, 6 and 12 times what was asked for, then again every 12 times."""
    times = itertools.islice(warning_times(100.0, 10.0), 7)

    assert [110.0, 130.0, 160.0, 220.0, 340.0, 460.0, 580.0] == list(times)


def test_rank_that_waits_says_which_ranks_are_late_and_where_they_are(rank_on: RankOn) -> None:
    """Each rank that waits says it, long before its deadline, and again."""
    store = dist.HashStore()
    ranks = _joined([rank_on(store, rank, 3) for rank in range(3)], store)

    def be_late() -> Verdict:
        with ranks[2].scope():
            assert wait_until(lambda: all(len(rank.said) > 1 for rank in ranks[:2]))  # here it is
            return ranks[2].arrive()

    verdicts = at_once(*(lambda rank=rank: rank.arrive(warn_after=WARN_S) for rank in ranks[:2]), be_late)

    assert all(verdict.ok for verdict in verdicts)
    assert [] == ranks[2].said
    for rank in ranks[:2]:
        for what, facts in rank.said:
            assert ("waiting", (2,), (), (0, 1)) == (what, facts.missing, facts.lost, facts.arrived)
            assert "in the body of scope 'scope'" == facts.where[2].phase
            assert "# here it is" in facts.where[2].frames
        assert WARN_S <= rank.said[0][1].timeout < rank.said[1][1].timeout


def test_rank_that_comes_while_it_is_asked_for_is_not_warned_of(rank_on: RankOn) -> None:
    """A warning that is not out when the wait ends does not come any more."""
    store, asked = dist.HashStore(), threading.Event()

    def hook(method: str, key: str) -> None:
        # Asked, the rank that waits reads the record of the late one; at the time of the warning it does so once more.
        if is_control() and (method, key) == ("compare_set", "rank/1") and is_asked() and not asked.is_set():
            asked.set()
            assert wait_until(lambda: waits.is_idle)

    def is_asked() -> bool:
        return any(key.startswith("collective_scope/news/") for key in store.list_keys())

    def wait() -> Verdict:
        nonlocal waits
        with rank.scope(warn_after=WARN_S) as span:
            waits = span
            return rank.arrive()

    def come() -> Verdict:
        assert asked.wait(PATIENCE_S)
        return late.arrive()

    waits: Any = None
    rank, late = rank_on(HookedStore(store, hook), 0, 2), rank_on(store, 1, 2)
    verdicts = at_once(wait, come)

    assert all(verdict.ok for verdict in verdicts)
    assert [] == rank.said


class _SlowToReply(HookedStore):
    """A store whose reply to the write of a verdict reaches the control thread when nobody waits any more."""

    is_idle: Callable[[], bool] = staticmethod(lambda: True)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        there = super().compare_set(key, expected, desired)
        if is_control() and key.endswith("/exit/v"):
            assert wait_until(self.is_idle)
        return there


def test_ranks_that_are_given_up_on_are_freed_although_the_verdict_is_taken_at_once(rank_on: RankOn) -> None:
    """The control thread says so also if the rank itself has the verdict, and goes on, before it does."""
    base = dist.HashStore()
    store = _SlowToReply(base, lambda *_: None)
    rank = rank_on(store, 0, 2)

    with rank.scope() as span:
        store.is_idle = lambda: span.is_idle
        span.revocation = Revocation(World(int, grace=LONG_S), span.thread, RevokedInterrupt, lambda _: None)
        verdict = rank.arrive(timeout=0.1)

    assert (1,) == verdict.missing
    revoked = f"revoked {rank.part.life} 0 scope".encode()
    assert wait_until(lambda: any(base.get(key) == revoked for key in base.list_keys() if "/news/" in key))


def test_rank_that_gives_up_and_is_on_its_way_out_is_not_at_work(rank_on: RankOn) -> None:
    """An abort of NCCL by a rank that has come frees memory that a kernel of the missing one may be reading."""
    rank = rank_on(dist.HashStore(), 0, 2)
    world = World(int, grace=LONG_S)

    with rank.scope() as span:
        span.revocation = Revocation(world, span.thread, RevokedInterrupt, lambda _: None)
        assert (1,) == rank.arrive(timeout=0.1).missing
        assert wait_until(lambda: bool(world.revoked))

    assert [False] == world.revoked


def test_rank_that_gives_up_says_where_all_are_that_have_answered(
    rank_on: RankOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large group, few records are read at each look: all of them are before the verdict is written."""
    monkeypatch.setattr(watch, "READ_AT_ONCE", 0)
    store = dist.HashStore()
    rank, late = rank_on(store, 0, 2), rank_on(store, 1, 2)

    def give_up() -> Verdict:
        try:
            return rank.arrive(timeout=3 * ANSWER_S)
        finally:
            is_over.set()

    def be_late() -> None:
        with late.scope():
            assert is_over.wait(PATIENCE_S)

    is_over = threading.Event()
    verdict, _ = at_once(give_up, be_late)

    assert "in the body of scope 'scope'" == verdict.where[1].phase


@pytest.mark.parametrize(
    ("warn_after", "timeout"), [pytest.param(None, 1.0, id="gives-up"), pytest.param(1.0, 5.0, id="warns")]
)
def test_rank_that_speaks_after_a_standstill_hears_the_answers_to_what_it_asked_before(
    rank_on: RankOn, monkeypatch: pytest.MonkeyPatch, warn_after: float | None, timeout: float
) -> None:
    """When a machine has stood still, ranks that were asked where they are have a moment more to answer."""
    for module in (locate, watch):
        monkeypatch.setattr(module, "ANSWER_S", 0.8)
    monkeypatch.setattr(control, "GRACE_S", 0.3)
    monkeypatch.setattr(control, "THAW_S", 1.5)
    store, looks = dist.HashStore(), itertools.count()
    asked, goes_on, goes_on_too = threading.Event(), threading.Event(), threading.Event()

    def stand_still(method: str, key: str) -> None:
        if is_control() and asked.is_set():
            assert goes_on.wait(PATIENCE_S)
            if (method, key) == ("add", "collective_scope/news") and next(looks) == 3:  # it would have spoken by now
                goes_on_too.set()
        elif method == "set" and "/news/" in key:
            asked.set()

    def stand_still_longer(*_: object) -> None:
        if is_control() and asked.is_set():
            assert goes_on_too.wait(PATIENCE_S)

    rank, late = rank_on(HookedStore(store, stand_still), 0, 2), rank_on(HookedStore(store, stand_still_longer), 1, 2)

    def give_up() -> Verdict:
        try:
            return rank.arrive(timeout=timeout, warn_after=warn_after)
        finally:
            is_over.set()

    def be_late() -> None:
        with late.scope():
            assert asked.wait(PATIENCE_S)
            is_over.wait(1.2)  # the standstill itself, beyond the time at which the rank speaks
            goes_on.set()
            assert is_over.wait(PATIENCE_S)

    is_over = threading.Event()
    late.barrier.join()
    assert wait_until(lambda: record_of(store, 1) is not None)
    verdict, _ = at_once(give_up, be_late)

    first = rank.said[0][1] if rank.said else verdict
    assert bool(rank.said) == (warn_after is not None)
    assert "in the body of scope 'scope'" == first.where[1].phase


@pytest.mark.parametrize("meets_at_entry", [False, True])
def test_ranks_that_are_all_stuck_in_the_body_are_spoken_for_by_the_lowest(
    rank_on: RankOn, *, meets_at_entry: bool
) -> None:
    """Where no rank has come to the barrier, the lowest one says for all where each is, itself included."""
    store = dist.HashStore()
    ranks = _joined([rank_on(store, rank, 3) for rank in range(3)], store)

    def work(rank: Rank) -> Verdict:
        with rank.scope(warn_after=WARN_S) as span:
            if meets_at_entry:
                assert rank.arrive(stage="entry").ok
                span.stage = "exit"
                span.enter("in the body of")
            assert wait_until(lambda: bool(ranks[0].said))
            return rank.arrive()

    verdicts = at_once(*(lambda rank=rank: work(rank) for rank in ranks))

    assert all(verdict.ok for verdict in verdicts)
    assert [[], []] == [rank.said for rank in ranks[1:]]
    for what, facts in ranks[0].said:
        assert ("working", {0, 1, 2}) == (what, set(facts.where))
        assert {"in the body of scope 'scope'"} == {place.phase for place in facts.where.values()}


def test_ranks_that_are_stuck_are_spoken_for_by_the_lowest_that_is_alive_and_there(
    rank_on: RankOn, other: Other
) -> None:
    """A rank that has ended, one that does not answer, and one that is not in the scope do not speak: the next one does."""
    store = dist.HashStore()
    gone, mute, elsewhere, *ranks = (rank_on(store, rank, 5) for rank in range(5))
    other.kill()
    tell_as(0, ranks[0], Record(process=other.process))
    tell_as(1, ranks[0], Record(process=Process("another-host", 4711, 1, "another-machine")))
    elsewhere.barrier.join()
    assert wait_until(lambda: record_of(store, 2) is not None)
    over = threading.Event()

    def work(rank: Rank) -> None:
        with rank.scope(warn_after=WARN_S):
            assert over.wait(PATIENCE_S)

    def look() -> None:
        try:
            assert wait_until(lambda: "working" in _kinds(ranks[0]))
        finally:
            over.set()

    at_once(*(lambda rank=rank: work(rank) for rank in ranks), look)
    facts = next(facts for what, facts in ranks[0].said if what == "working")

    assert "working" not in _kinds(ranks[1])
    assert (0,) == facts.lost
    assert "outside of any scope" == facts.where[2].phase
    assert ("", True) == (facts.where[1].phase, facts.where[1].silence > 0)
    assert [[], [], []] == [rank.said for rank in (gone, mute, elsewhere)]


def test_rank_that_waits_speaks_and_those_at_work_do_not(rank_on: RankOn) -> None:
    """As soon as one rank has come to the barrier, it is that one which says where the others are."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 3) for rank in range(3)]

    def work(rank: Rank) -> Verdict:
        with rank.scope(warn_after=WARN_S):
            if rank.rank != 2:
                assert wait_until(lambda: bool(ranks[2].said))
            return rank.arrive()

    at_once(*(lambda rank=rank: work(rank) for rank in ranks))

    assert {"waiting"} == set(_kinds(ranks[2]))
    assert "working" not in _kinds(ranks[0]) + _kinds(ranks[1])


def test_rank_that_answers_is_never_said_not_to(rank_on: RankOn) -> None:
    """However soon a rank speaks again, it gives those that it asks the time to answer."""
    store = dist.HashStore()
    ranks = _joined([rank_on(store, rank, 2) for rank in range(2)], store)

    def work(rank: Rank) -> None:
        with rank.scope(warn_after=0.2):
            assert wait_until(lambda: len(ranks[0].said) > 4)  # the last of them comes after a second question

    at_once(*(lambda rank=rank: work(rank) for rank in ranks))

    phases = {place.phase for rank in ranks for _, facts in rank.said for place in facts.where.values()}
    assert {"in the body of scope 'scope'"} == phases


def test_rank_in_its_body_is_told_at_once_that_a_peer_is_gone(rank_on: RankOn, other: Other) -> None:
    """A process that vanishes is told of while a rank works, once, with how it ended."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 2)
    tell_as(1, rank, Record(process=other.process))
    with rank.scope(warn_after=PATIENCE_S):
        assert wait_until(lambda: 1 in rank.part.records)
        other.kill()
        assert wait_until(lambda: bool(rank.said))
        looked = rank.control.heard_at
        assert wait_until(lambda: rank.control.heard_at > looked + 0.5)

    ((what, facts),) = rank.said
    assert ("lost", (1,), "exited (killed by SIGKILL)") == (what, facts.lost, facts.where[1].state)


def test_rank_in_its_body_is_told_that_a_peer_is_gone_that_another_saw_go(rank_on: RankOn) -> None:
    """A rank that cannot see it learns of it from one that can."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 3)
    tell_as(2, rank, Record(process=Process("another-host", 4711, 1, "another-machine")))
    with rank.scope(warn_after=PATIENCE_S):
        rank.part.announce(store, f"lost {rank.part.life} 2")
        assert wait_until(lambda: bool(rank.said))

    assert [("lost", (2,))] == [(what, facts.lost) for what, facts in rank.said]


def test_rank_that_is_told_by_the_verdict_that_a_peer_is_gone_is_not_told_again(rank_on: RankOn, other: Other) -> None:
    """A verdict's news is not said a second time, while the rank is in the rest of its teardown."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 2)
    tell_as(1, rank, Record(process=other.process))
    other.kill()
    with rank.scope(warn_after=PATIENCE_S) as span:
        assert (1,) == rank.arrive().lost
        span.enter("in cleanup 'x' of")
        looked = rank.control.heard_at
        assert wait_until(lambda: rank.control.heard_at > looked + 0.5)

    assert [] == rank.said


def test_rank_that_was_not_asked_to_warn_says_nothing(rank_on: RankOn, other: Other) -> None:
    """Without warn_after there is not a word, whatever happens; the verdict says it."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 3)
    tell_as(1, rank, Record(process=other.process))
    with rank.scope():
        other.kill()
        assert wait_until(lambda: 1 in rank.part.lost)
        verdict = rank.arrive()

    assert (1,) == verdict.lost
    assert [] == rank.said


def test_record_of_a_failed_rank_is_read_first(rank_on: RankOn) -> None:
    """In a group that is too large to look at in one go, the news say where to look."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 64)
    failing = rank_on(store, 63, 64)

    def fail() -> None:
        assert wait_until(lambda: is_waiting(store, 0))
        failing.publish(FAILED)

    verdict, _ = at_once(lambda: rank.arrive(failure_timeout=0.1), fail)

    assert [63] == list(verdict.failures)
    assert OK == verdict.outcomes[0]
