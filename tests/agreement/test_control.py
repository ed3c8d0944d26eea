"""The control thread: news, questions and answers, heartbeats, lost ranks, the end of a process."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch.distributed as dist

from collective_scope.agreement import control, process, watch
from collective_scope.agreement.control import WAITING_S
from collective_scope.agreement.peers import CONTROL, NEWS
from collective_scope.agreement.process import Process, me
from collective_scope.agreement.records import OK, Outcome, Record, Verdict
from collective_scope.agreement.wait import GRACE_S, Wait
from tests.agreement.conftest import Other
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


SOON_S = 5.0
"""Longer than anything takes that does not wait for a timeout."""

ANSWER_S = 2.0
"""A timeout that is meant to run out, long enough for a peer on a busy machine to answer a question."""

FAILED = Outcome("body", "ValueError", "no", "Traceback ...")

ELSEWHERE = Process("another-host", 4711, 1, "another-machine")
"""A process of which nothing is seen from here."""

RankOn = Callable[..., Rank]

BEATS = f"collective_scope/beat/{ELSEWHERE.key}"


# Questions and answers


@pytest.mark.frozen_store
def test_pause_of_a_control_thread_in_a_large_group_is_no_silence_of_the_store(rank_on: RankOn) -> None:
    """It looks less often the larger the group is, and more often than a store may be silent that works."""
    rank = rank_on(dist.HashStore(), 0, 100_000)
    with rank.scope() as span:
        span.wait = Wait(rank.record(), 0.0, math.inf, math.inf, None, SimpleQueue())

        assert WAITING_S < rank.control._pause() < GRACE_S  # noqa: SLF001  (nothing else shows it without a delay)

        span.wait.over = True


def test_question_is_answered_with_the_place_of_the_rank(rank_on: RankOn) -> None:
    """A rank that does not come is asked, and its control thread says in which scope it is, for how long, and where."""
    store, over = dist.HashStore(), threading.Event()
    waiting, working = (rank_on(store, rank, 2) for rank in range(2))

    def work() -> None:
        with working.scope():
            assert over.wait(PATIENCE_S)  # here it is

    def wait() -> Verdict:
        assert wait_until(lambda: record_of(store, 1) is not None)
        verdict = waiting.arrive(timeout=ANSWER_S)
        over.set()
        return verdict

    place = at_once(wait, work)[0].where[1]

    assert (me(), "0 scope", "in the body of scope 'scope'", 0.0) == (
        place.process,
        place.scope,
        place.phase,
        place.silence,
    )
    assert 0.0 < place.seconds < PATIENCE_S
    assert "# here it is" in place.frames


def test_question_to_a_rank_in_a_scope_of_another_group_is_answered_with_that(rank_on: RankOn) -> None:
    """A rank's thread may have gone on to another group: that is where it is said to be."""
    store, over = dist.HashStore(), threading.Event()
    waiting, working = (rank_on(store, rank, 2) for rank in range(2))
    elsewhere = Rank(dist.HashStore(), 0, 2)
    elsewhere.end()
    elsewhere.control = working.control  # all groups of a process share its control thread

    def work() -> None:
        with working.scope(), elsewhere.scope("0 of another group"):
            assert over.wait(PATIENCE_S)

    def wait() -> Verdict:
        assert wait_until(lambda: record_of(store, 1) is not None)
        verdict = waiting.arrive(timeout=ANSWER_S)
        over.set()
        return verdict

    assert "in the body of scope 'of another group'" == at_once(wait, work)[0].where[1].phase


def test_question_to_a_rank_outside_of_any_scope_is_answered_with_the_one_it_left(rank_on: RankOn) -> None:
    """A rank that is in no scope says so, and which one it was in before."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 2) for rank in range(2)]
    at_once(*(rank.arrive for rank in ranks))
    verdict = ranks[0].arrive("1 next", timeout=ANSWER_S)

    assert "outside of any scope, after scope 'scope'" == verdict.where[1].phase


def test_question_that_is_announced_and_comes_later_is_answered(rank_on: RankOn) -> None:
    """The number of an item may be there before the item."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 2)
    rank.barrier.join()
    assert wait_until(lambda: record_of(store, 0) is not None and store.check([f"collective_scope/beat/{me().key}"]))
    number = store.add(NEWS, 1) % CONTROL
    looks = rank.control.heard_at
    assert wait_until(lambda: rank.control.heard_at > looks)
    store.set(f"{NEWS}/{number}", f"asked {rank.part.life} ")

    assert wait_until(lambda: (record := record_of(store, 0)) is not None and record.answered == number, SOON_S)


@pytest.mark.parametrize("count", [1, 3 * control.OLD_NEWS], ids=["one", "more-than-are-read"])
def test_question_after_many_items_is_answered(rank_on: RankOn, count: int) -> None:
    """However many ranks ask at once, each learns that the rank has answered."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 2)
    rank.barrier.join()
    assert wait_until(lambda: record_of(store, 0) is not None and store.check([f"collective_scope/beat/{me().key}"]))
    numbers = [rank.part.announce(store, f"asked {rank.part.life} ") for _ in range(count)]

    assert wait_until(lambda: (record := record_of(store, 0)) is not None and record.answered >= numbers[-1], SOON_S)


def test_question_in_a_world_of_a_million_processes_is_answered(rank_on: RankOn) -> None:
    """The count of the news and that of the control threads share a key, and neither reaches the other."""
    store = dist.HashStore()
    store.add(NEWS, 1_000_000 * CONTROL + 10**12)
    asking, rank = (rank_on(store, rank, 2) for rank in range(2))
    rank.barrier.join()
    assert wait_until(lambda: record_of(store, 1) is not None and _controls(store) == 1_000_002)
    number = asking.part.announce(store, f"asked {rank.part.life} ")

    asking.publish(FAILED)

    assert 10**12 + 1 == number
    assert wait_until(lambda: store.check([f"{NEWS}/{10**12 + 2}"]))
    assert wait_until(lambda: (record := record_of(store, 1)) is not None and record.answered == number, SOON_S)
    rank.control.close()
    assert wait_until(lambda: _has_ended(rank))
    assert (1_000_001, 10**12 + 2) == divmod(store.add(NEWS, 0), CONTROL)  # the one that asks is there


def test_survey_tells_where_all_ranks_are(rank_on: RankOn) -> None:
    """A process that is about to end learns where each rank is, at work or at the barrier."""
    store, over = dist.HashStore(), threading.Event()
    ranks = [rank_on(store, rank, 3) for rank in range(3)]

    def work() -> None:
        with ranks[1].scope():
            assert over.wait(PATIENCE_S)
            ranks[1].arrive()

    def look() -> Any:
        with ranks[2].scope() as span:
            assert wait_until(lambda: is_waiting(store, 0) and record_of(store, 1) is not None)
            assert wait_until(lambda: {0, 1} <= set(ranks[2].part.records))
            places = ranks[2].control.survey(span, PATIENCE_S)
            over.set()
            ranks[2].arrive()
        return {rank: place.phase for rank, place in places.items()}

    _, _, phases = at_once(ranks[0].arrive, work, look)

    expected = ["at the barrier of scope 'scope'", "in the body of scope 'scope'", "in the body of scope 'scope'"]
    assert dict(enumerate(expected)) == phases


def test_surveys_of_ranks_that_end_together_answer_each_other(rank_on: RankOn) -> None:
    """Two processes whose time is up at the same moment still say where they are."""
    store, both_ask, end = dist.HashStore(), threading.Barrier(2), threading.Barrier(2)

    def hook(method: str, key: str) -> None:
        if method == "set" and "/news/" in key:  # the question: both have begun to ask when either is heard
            both_ask.wait(PATIENCE_S)

    ranks = [rank_on(HookedStore(store, hook), rank, 2) for rank in range(2)]

    def look(rank: int, peer: int) -> str:
        with ranks[rank].scope() as span:
            assert wait_until(lambda: peer in ranks[rank].part.records)
            places = ranks[rank].control.survey(span, PATIENCE_S)
            end.wait(PATIENCE_S)
        return places[peer].phase

    phases = at_once(functools.partial(look, 0, 1), functools.partial(look, 1, 0))

    assert ["in the body of scope 'scope'"] * 2 == phases


def test_survey_of_a_store_that_hangs_is_bounded(rank_on: RankOn, thawed: threading.Event) -> None:
    """A process that is about to end does not wait for the store, and says where it is itself."""
    rank = rank_on(HookedStore(dist.HashStore(), lambda *_: thawed.wait(PATIENCE_S)), 0, 2)
    with rank.scope() as span:
        places = rank.control.survey(span, 0.2)

    assert {0: "in the body of scope 'scope'"} == {each: place.phase for each, place in places.items()}
    assert not thawed.is_set()


def test_rank_that_has_left_its_group_is_known_by_its_last_word(rank_on: RankOn) -> None:
    """A rank that destroyed its group, and lives on, is never said to be held by native code."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 2) for rank in range(2)]
    at_once(*(rank.arrive for rank in ranks))
    ranks[1].barrier.leave("has destroyed its group after scope 'scope'")
    ranks[1].end()
    verdict = ranks[0].arrive("1 next", timeout=ANSWER_S)

    assert ((1,), ()) == (verdict.missing, verdict.lost)
    assert ("has destroyed its group after scope 'scope'", 0.0) == (verdict.where[1].phase, verdict.where[1].silence)


# Late messages


@pytest.mark.parametrize(
    "told",
    [pytest.param({"outcome": FAILED}, id="failed"), pytest.param({"cleanups": (("free", "", ""),)}, id="cleanups")],
)
def test_what_a_rank_told_is_not_replaced_by_its_silent_record_of_the_round_before(
    rank_on: RankOn, thawed: threading.Event, told: dict[str, Any]
) -> None:
    """A control thread that is held up while it tells of one round leaves alone what the rank tells in the next."""
    store, is_telling = dist.HashStore(), threading.Event()

    def hook(method: str, key: str) -> None:
        if is_control() and (method, key) == ("compare_set", "rank/0"):
            is_telling.set()
            thawed.wait(PATIENCE_S)

    rank, other = rank_on(HookedStore(store, hook), 0, 2), rank_on(store, 1, 2)

    def first() -> Verdict:
        with rank.scope("1 scope") as span:
            rank.arrive("0 scope")
            is_next = threading.Thread(target=lambda: wait_until(lambda: span.wait is not None) and thawed.set())
            is_next.start()
            return rank.arrive("1 scope", **told)

    def second() -> Verdict:
        assert is_telling.wait(PATIENCE_S)
        other.arrive("0 scope")
        assert wait_until(lambda: is_waiting(store, 0) and record_of(store, 0).scope == "1 scope")  # type: ignore[union-attr]  # it is there, or the test fails
        return other.arrive("1 scope", cleanups=told.get("cleanups", ()))

    verdicts = at_once(first, second)

    assert verdicts[0] == verdicts[1]
    assert told.get("outcome", OK).type_name == verdicts[0].outcomes[0].type_name
    assert bool(told.get("cleanups")) == verdicts[0].pending
    assert {} == verdicts[0].cleanups


# Ranks that are gone


def test_rank_whose_process_has_ended_is_lost_at_once(rank_on: RankOn, other: Other) -> None:
    """A rank that is seen to have ended ends the wait, with how it ended."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 3) for rank in range(2)]
    tell_as(2, ranks[0], Record(process=other.process))

    def end() -> None:
        assert wait_until(lambda: is_waiting(store, 0) and is_waiting(store, 1))
        other.kill()

    start = time.monotonic()
    first, second, _ = at_once(ranks[0].arrive, ranks[1].arrive, end)

    assert time.monotonic() - start < SOON_S
    assert first == second
    assert ((2,), (), (0, 1)) == (first.lost, first.missing, first.arrived)
    assert "exited (killed by SIGKILL)" == first.where[2].state


def test_rank_that_is_told_to_be_lost_is_lost_also_where_it_cannot_be_seen(rank_on: RankOn) -> None:
    """One rank that sees another go tells those on other machines; it stays lost in later rounds."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 3) for rank in range(2)]
    tell_as(2, ranks[0], Record(process=ELSEWHERE))

    def tell() -> None:
        assert wait_until(lambda: is_waiting(store, 0))
        ranks[1].part.announce(store, f"lost {ranks[0].part.life} 2")

    first, _ = at_once(ranks[0].arrive, tell)
    second = ranks[0].arrive("1 scope", "entry")

    assert [(2,), (2,)] == [first.lost, second.lost]


def test_rank_that_cannot_be_looked_at_is_not_lost(
    rank_on: RankOn, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this process has no file descriptor left to look with, a healthy peer is not taken for gone."""

    def fail(_: int) -> list[str]:
        raise OSError(24, os.strerror(24))

    rank = rank_on(dist.HashStore(), 0, 2)
    tell_as(1, rank, Record(process=other.process))
    monkeypatch.setattr(process, "_stat", fail)
    verdict = rank.arrive(timeout=ANSWER_S)

    assert ((1,), ()) == (verdict.missing, verdict.lost)
    other.kill()
    monkeypatch.undo()
    assert (1,) == rank.arrive("1 scope").lost


@pytest.mark.parametrize("has_beaten", [True, False])
def test_rank_on_another_machine_without_a_heartbeat_is_lost(
    rank_on: RankOn, monkeypatch: pytest.MonkeyPatch, *, has_beaten: bool
) -> None:
    """A rank that is not seen counts as lost when its heart has been silent for as long as that may be."""
    monkeypatch.setattr(watch, "BEATS_S", 0.1)
    store = dist.HashStore()
    rank = rank_on(store, 0, 2, silence=0.5)
    tell_as(1, rank, Record(process=ELSEWHERE))
    if has_beaten:
        store.set(BEATS, "7")
    start = time.monotonic()
    verdict = rank.arrive()

    assert (1,) == verdict.lost
    assert 0.5 <= time.monotonic() - start < 0.5 + SOON_S


def test_rank_on_another_machine_with_a_heartbeat_is_not_lost(rank_on: RankOn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is not seen and does not answer, but whose heart beats, is missing and no more."""
    monkeypatch.setattr(watch, "BEATS_S", 0.1)
    beats = iter(range(10**6))
    store = dist.HashStore()

    def beat(method: str, key: str) -> None:
        if method == "compare_set" and key == BEATS:
            store.set(BEATS, str(next(beats)))

    rank = rank_on(HookedStore(store, beat), 0, 2, silence=0.2)
    tell_as(1, rank, Record(process=ELSEWHERE))
    verdict = rank.arrive(timeout=1.0)

    assert ((1,), ()) == (verdict.missing, verdict.lost)
    assert next(beats) > 1


def test_rank_on_another_machine_is_not_lost_because_the_store_was_silent(
    rank_on: RankOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that stood still keeps all hearts from being heard: that says nothing of the ranks."""
    monkeypatch.setattr(watch, "BEATS_S", 0.1)
    store, frozen, thaws = dist.HashStore(), threading.Event(), threading.Event()
    looks: list[str] = []

    def hook(method: str, key: str) -> None:
        if method == "compare_set" and key == BEATS:
            looks.append(key)
            if len(looks) == 3:
                frozen.set()
                assert thaws.wait(PATIENCE_S)
            if len(looks) > 4:  # the first thing that the other rank does then; this one has looked a moment before
                store.set(BEATS, str(len(looks)))

    rank = rank_on(HookedStore(store, hook), 0, 2, silence=0.5)
    tell_as(1, rank, Record(process=ELSEWHERE))
    store.set(BEATS, "1")

    def freeze() -> None:
        assert frozen.wait(PATIENCE_S)
        time.sleep(0.7)  # for so long the store answers nobody
        thaws.set()

    verdict, _ = at_once(lambda: rank.arrive(timeout=1.5), freeze)

    assert ((1,), ()) == (verdict.missing, verdict.lost)


def test_rank_that_was_taken_for_lost_and_lives_is_waited_for_again(
    rank_on: RankOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stood still, and whose heart beats again, costs its group the one round."""
    monkeypatch.setattr(watch, "BEATS_S", 0.1)
    store = dist.HashStore()
    rank, other = rank_on(store, 0, 2, silence=0.4), rank_on(store, 1, 2)
    other.barrier.join()
    assert wait_until(lambda: record_of(store, 1) is not None)
    tell_as(1, rank, Record(process=ELSEWHERE))
    assert (1,) == rank.arrive("0 scope").lost
    store.set(BEATS, "1")

    def come() -> Verdict:
        other.arrive("0 scope")
        assert wait_until(lambda: is_waiting(store, 0, "entry"))
        return other.arrive("1 scope", "entry")

    assert [True, True] == [
        v.ok for v in at_once(lambda: rank.arrive("1 scope", "entry", timeout=SOON_S), come, timeout=PATIENCE_S)
    ]


# A control thread that breaks, or is not there


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["while-it-waits", "before-it-waits"])
def test_control_thread_that_breaks_is_not_silent(rank_on: RankOn, when: str) -> None:
    """A defect surfaces where the rank waits, at once if it waits already, and not as a word about the store."""
    breaks = threading.Event()

    def hook(*_: str) -> None:
        if is_control() and breaks.is_set():
            msg = "broken"
            raise TypeError(msg)

    store = dist.HashStore()
    rank = rank_on(HookedStore(store, hook), 0, 2)

    def end() -> None:
        assert wait_until(lambda: is_waiting(store, 0))
        breaks.set()

    def wait() -> None:
        if when == "before-it-waits":
            breaks.set()
            assert wait_until(lambda: rank.control.broken is not None)
        with pytest.raises(TypeError, match=r"^broken$"):
            rank.arrive(timeout=LONG_S if when == "while-it-waits" else 0.5)

    at_once(wait, *([end] if when == "while-it-waits" else []))


@pytest.fixture(name="deny")
def _deny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what keeps the system from giving any more threads of a certain name."""

    def deny(name: str) -> None:
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith(name):
                msg = "can't start new thread"
                raise RuntimeError(msg)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)

    return deny


_THREADS = ["collective_scope-", "collective_scope-control", "collective_scope-store"]


@pytest.mark.parametrize("name", _THREADS)
def test_rank_without_more_threads_meets_its_peers(rank_on: RankOn, deny: Callable[[str], None], name: str) -> None:
    """A process to which the system gives no thread goes through its rounds all the same, and its peers with it."""
    store = dist.HashStore()
    other = rank_on(store, 1, 2)
    other.barrier.join()
    deny(name)
    rank = rank_on(store, 0, 2)

    def run(each: Rank) -> list[Verdict]:
        return [each.arrive(f"{i} scope", outcome=FAILED if i == 1 and each is rank else OK) for i in range(3)]

    first, second = at_once(functools.partial(run, rank), functools.partial(run, other))

    assert first == second
    assert [[], [0], []] == [list(verdict.failures) for verdict in first]


@pytest.mark.parametrize("name", _THREADS)
def test_rank_without_more_threads_is_bounded_and_agrees(
    rank_on: RankOn, deny: Callable[[str], None], name: str
) -> None:
    """Where a peer is late, the wait of such a rank ends with its timeout, with a verdict that the peer finds too."""
    store = dist.HashStore()
    late = rank_on(store, 1, 2)
    late.barrier.join()
    deny(name)
    rank = rank_on(store, 0, 2)
    start = time.monotonic()
    verdict = rank.arrive(timeout=1.0)

    assert 1.0 <= time.monotonic() - start < 1.0 + SOON_S
    assert ((1,), "") == (verdict.missing, verdict.reason)
    assert verdict == late.arrive(timeout=2.0)


@pytest.mark.parametrize("name", _THREADS)
def test_rank_without_more_threads_waits_no_longer_for_a_peer_that_failed(
    rank_on: RankOn, deny: Callable[[str], None], name: str
) -> None:
    """A rank without threads waits for a rank that failed within the same bound."""
    store = dist.HashStore()
    failing = rank_on(store, 1, 2)
    failing.publish(FAILED)
    deny(name)
    rank = rank_on(store, 0, 2)
    start = time.monotonic()
    verdict = rank.arrive(timeout=0.3 + SOON_S, failure_timeout=0.3)

    assert time.monotonic() - start < 0.3 + SOON_S
    assert ((1,), [1]) == (verdict.missing, list(verdict.failures))


# The end


def _controls(store: dist.Store) -> int:
    return store.add(NEWS, 0) // CONTROL


def _joined(ranks: list[Rank], store: dist.Store) -> None:
    for rank in ranks:
        rank.barrier.join()
    assert wait_until(lambda: all(rank.part.life for rank in ranks) and _controls(store) == len(ranks))


def _has_ended(rank: Rank) -> bool:
    return rank.control.broken is not None


def test_host_of_the_store_leaves_last(rank_on: RankOn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that serves the store stays while a peer waits at a barrier, and goes when all have left."""
    monkeypatch.setattr(control, "CLOSING_S", LONG_S)  # it does not go because that is over
    store = dist.HashStore()
    host, *peers = ranks = [rank_on(store, rank, 3, serves=rank == 0) for rank in range(3)]
    _joined(ranks, store)
    order: list[str] = []

    def close() -> None:
        assert wait_until(lambda: is_waiting(store, 1))
        host.control.close()
        assert wait_until(lambda: _has_ended(host))
        order.append("host")

    verdicts: list[Verdict] = []

    def wait() -> None:
        verdicts.append(peers[0].arrive(timeout=1.5))
        order.append("rank 1")

    at_once(wait, close)
    assert ["rank 1", "host"] == order
    assert ((0, 2), "") == (verdicts[0].missing, verdicts[0].reason)
    assert 0 == _controls(store)


def test_host_of_the_store_waits_for_its_peers_a_short_time_only(
    rank_on: RankOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that is there and does not leave keeps the host of the store for a few seconds at most."""
    monkeypatch.setattr(control, "CLOSING_S", 0.4)
    store = dist.HashStore()
    host = rank_on(store, 0, 2, serves=True)
    _joined([host], store)
    store.add(NEWS, CONTROL)
    start = time.monotonic()
    host.control.close()

    assert wait_until(lambda: _has_ended(host))
    assert 0.4 <= time.monotonic() - start < SOON_S


def test_host_of_the_store_does_not_wait_for_a_process_that_was_killed(rank_on: RankOn, other: Other) -> None:
    """A peer that went without taking leave does not keep the host, also if that has destroyed its groups before."""
    store = dist.HashStore()
    host = rank_on(store, 0, 2, serves=True)
    _joined([host], store)
    host.part.records[1] = Record(process=other.process)
    store.add(NEWS, CONTROL)
    store.set(f"collective_scope/beat/{other.process.key}", "7")
    other.kill()
    assert wait_until(lambda: other.process.has_ended)
    for _ in range(2):
        looked = host.control.heard_at
        assert wait_until(lambda looked=looked: host.control.heard_at > looked)
    host.control.groups.clear()  # as when its last group is gone
    start = time.monotonic()
    host.control.close()

    assert wait_until(lambda: _has_ended(host))
    assert time.monotonic() - start < control.CLOSING_S / 2


def test_host_of_the_store_waits_for_a_peer_although_another_has_left_and_ended(
    rank_on: RankOn, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that took leave before it ended does not stand for one that is still there."""
    monkeypatch.setattr(control, "CLOSING_S", 0.4)
    store = dist.HashStore()
    host = rank_on(store, 0, 3, serves=True)
    _joined([host], store)
    host.part.records[1] = Record(process=other.process)
    other.kill()
    assert wait_until(lambda: other.process.has_ended)
    store.add(NEWS, CONTROL)  # rank 2
    start = time.monotonic()
    host.control.close()

    assert wait_until(lambda: _has_ended(host))
    assert 0.4 <= time.monotonic() - start < SOON_S


def test_ranks_agree_although_the_host_of_the_store_was_about_to_leave(rank_on: RankOn) -> None:
    """A host that said that it leaves, and whose store is still there, does not take its peers' agreement along."""
    store = dist.HashStore()
    host, *peers = ranks = [rank_on(store, rank, 3, serves=rank == 0) for rank in range(3)]
    _joined(ranks, store)
    host.control.close()
    assert wait_until(lambda: all(_has_ended(rank) for rank in ranks))
    verdict = peers[0].arrive(timeout=0.3)

    assert ((0, 2), "") == (verdict.missing, verdict.reason)
    assert verdict == peers[1].arrive(timeout=2.0)


def test_control_thread_that_ends_leaves_no_key_of_its_process(rank_on: RankOn) -> None:
    """Its heartbeat and its news go with it."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 2)
    rank.publish(FAILED)
    rank.arrive(outcome=FAILED, failure_timeout=0.1)
    rank.end()

    keys = [key for key in store.list_keys() if "beat" in key or "news/" in key]
    assert [] == keys


def test_item_of_the_news_goes_after_a_while(rank_on: RankOn, monkeypatch: pytest.MonkeyPatch) -> None:
    """News do not pile up in the store; those that the control thread wrote, and those of the store thread."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 2)
    rank.publish(FAILED)
    rank.part.announce(store, f"asked {rank.part.life} ")

    def items() -> list[str]:
        return [key for key in store.list_keys() if key.startswith(f"{NEWS}/")]

    assert 2 == len(items())
    monkeypatch.setattr(control, "NEWS_S", 0.0)
    assert wait_until(lambda: not items(), SOON_S)
    assert 2 == store.add(NEWS, 0) % CONTROL
