"""A rank's part in the rounds, and what it leaves in a store: the life of a group, keys, stores of each kind."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from collective_scope.agreement.barrier import LEAVE_S
from collective_scope.agreement.records import OK, Outcome, Record, Verdict
from collective_scope.agreement.rounds import ARRIVED, REPORT, is_uneventful
from collective_scope.agreement.store_thread import ABSENT, base_of, get, knock, peek, set_first
from collective_scope.agreement.wait import Wait
from tests.stores import (
    PATIENCE_S,
    HookedStore,
    Rank,
    at_once,
    interrupted_when,
    is_control,
    is_waiting,
    wait_until,
)


SOON_S = 5.0
"""Longer than anything takes that does not wait for a timeout."""

FAILED = Outcome("body", "ValueError", "no", "Traceback ...")

RankOn = Callable[..., Rank]

LAST_WORD = "has destroyed its group"


# Stores of each kind


def _tcp(*, use_libuv: bool) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=use_libuv)


_STORES: dict[str, Callable[[Path], dist.Store]] = {
    "hash": lambda _: dist.HashStore(),
    "file": lambda path: dist.FileStore(str(path / "store"), 2),
    "tcp": lambda _: _tcp(use_libuv=True),
    "tcp-without-libuv": lambda _: _tcp(use_libuv=False),
    "prefix": lambda _: dist.PrefixStore("a/b", dist.PrefixStore("c", _tcp(use_libuv=True))),
}


@pytest.fixture(name="store", params=list(_STORES))
def _store(request: pytest.FixtureRequest, tmp_path: Path) -> dist.Store:
    """Return a store of each kind in turn."""
    return _STORES[request.param](tmp_path)


def test_peek_reads_and_never_writes_or_waits(store: dist.Store) -> None:
    """A key that is not there stays away; one that is there is read as it is."""
    base = base_of(store)
    assert ABSENT == peek(base, "key")
    assert not base.check(["key"])
    base.set("key", "value")

    assert b"value" == peek(base, "key")
    assert b"value" == base.get("key")


def test_set_first_lets_one_value_stand_and_wakes_those_that_wait(store: dist.Store) -> None:
    """The first value that is written is what every rank reads, also one that waits for it already."""
    base, waits = base_of(store), threading.Event()
    clients = [base.clone() for _ in range(2)]  # type: ignore[attr-defined]  # torch's stub lacks it

    def wait() -> bytes:
        waits.set()
        return get(clients[0], "key")

    def write() -> bytes:
        assert waits.wait(PATIENCE_S)
        time.sleep(0.1)  # nothing announces that the server has heard of the one that waits
        return set_first(clients[1], "key", b"first")

    assert [b"first", b"first"] == at_once(wait, write, timeout=PATIENCE_S)
    assert b"first" == set_first(base, "key", b"second") == base.get("key")


def test_rounds_over_any_store_are_agreed_on(store: dist.Store, rank_on: RankOn) -> None:
    """All goes well, one fails, all agree on a cleanup, one is late: over each kind of store the same."""
    ranks = [rank_on(store, rank, 2) for rank in range(2)]

    def run(rank: Rank) -> list[Verdict]:
        return [
            rank.arrive("0 scope"),
            rank.arrive("1 scope", outcome=FAILED if rank.rank == 1 else OK),
            rank.arrive("2 scope", cleanups=(("free", "", ""),)),
            rank.arrive("2 scope", "exit 2"),
        ]

    first, second = at_once(*(functools.partial(run, rank) for rank in ranks))

    assert first == second
    assert [[], [1], [], []] == [list(verdict.failures) for verdict in first]
    assert [True] * 4 == [verdict.complete for verdict in first]
    assert ("free",) == first[2].agreed
    verdict = ranks[0].arrive("3 scope", timeout=0.2)
    assert (1,) == verdict.missing
    assert verdict == ranks[1].arrive("3 scope")


def test_knock_at_a_store_that_is_not_served_raises_at_once() -> None:
    """Where no process listens that is seen before torch is asked, which prints a page; a store that is there is fine."""
    server = [_tcp(use_libuv=True)]
    client = dist.TCPStore("127.0.0.1", server[0].port, is_master=False)
    knock(dist.PrefixStore("a", client))
    knock(dist.HashStore())
    server.clear()
    start = time.monotonic()

    with pytest.raises(ConnectionRefusedError):
        knock(dist.PrefixStore("a", client))
    assert time.monotonic() - start < SOON_S


# The count of a round in large groups


@pytest.mark.parametrize("world_size", [17_000, 1_000_000])
@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_count_of_a_large_group_all_of_which_has_something_to_tell_does_not_wrap(
    kind: str, world_size: int, tmp_path: Path
) -> None:
    """A store counts the reports of all ranks, however many, beside their arrivals."""
    store = _STORES[kind](tmp_path)
    assert not is_uneventful(store.add("n", REPORT))
    store.add("n", (world_size - 1) * REPORT)
    count = store.add("n", world_size * ARRIVED)

    assert (world_size, world_size) == divmod(count, REPORT)
    assert not is_uneventful(count)


def test_last_rank_of_a_large_group_does_not_overlook_what_one_of_it_told(rank_on: RankOn) -> None:
    """Among 17 000 ranks, one that failed is in the verdict."""
    store, world_size = dist.HashStore(), 17_000
    failing, last = rank_on(store, 16_000, world_size), rank_on(store, 16_999, world_size)
    failing.publish(FAILED)

    def arrive_of_all_others() -> None:
        assert wait_until(lambda: is_waiting(store, 16_000))
        store.add(last.part.key("0 scope/exit/n"), (world_size - 2) * ARRIVED)
        verdicts.append(last.arrive(outcome=OK))

    verdicts: list[Verdict] = []
    last.barrier.join()
    assert wait_until(lambda: bool(last.part.life))
    verdict, _ = at_once(lambda: failing.arrive(outcome=FAILED), arrive_of_all_others)

    assert [16_000] == list(verdict.failures)
    assert verdict.complete
    assert verdict == verdicts[0]


# The life of a group


def _leave(*ranks: Rank) -> None:
    for rank in ranks:
        rank.barrier.leave(LAST_WORD)


def _end(*ranks: Rank) -> None:
    for rank in ranks:
        rank.end()


def test_group_that_all_ranks_have_left_has_no_keys_in_the_store(rank_on: RankOn) -> None:
    """After good rounds and a failure, with the last rank go all keys of the group; those of the processes stay."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 3) for rank in range(3)]

    def run(rank: Rank) -> None:
        for i in range(4):
            rank.arrive(f"{i} scope", outcome=FAILED if (i, rank.rank) == (1, 1) else OK)

    at_once(*(functools.partial(run, rank) for rank in ranks))
    _leave(*ranks)
    _end(*ranks)

    assert {"collective_scope/news"} == set(store.list_keys())


def test_group_that_all_ranks_have_left_after_a_missed_round_has_no_keys_in_the_store(rank_on: RankOn) -> None:
    """Also the keys of rounds that were not complete go with the last rank."""
    store = dist.HashStore()
    early, late = (rank_on(store, rank, 2) for rank in range(2))
    early.arrive("0 scope", timeout=0.1)
    early.arrive("1 scope", "entry", timeout=0.1)
    late.arrive("0 scope")
    late.arrive("1 scope", "entry")
    _leave(early, late)
    _end(early, late)

    assert {"collective_scope/news"} == set(store.list_keys())


def _keys_of(store: dist.Store, scope: str) -> list[str]:
    return [key for key in store.list_keys() if f"/{scope}/" in key]


def test_keys_of_a_round_that_is_decided_after_its_end_do_not_stay(rank_on: RankOn) -> None:
    """A control thread that was held up may decide a round whose keys are gone, and so bring them back."""
    store = dist.HashStore()
    ranks = [rank_on(store, rank, 2) for rank in range(2)]

    def run(rank: Rank) -> Wait | None:
        with rank.scope("0 scope") as span:
            rank.arrive("0 scope")
        rank.arrive("1 scope")
        rank.arrive("2 scope")
        return span.wait

    wait, _ = at_once(*(functools.partial(run, rank) for rank in ranks))
    assert wait_until(lambda: not _keys_of(store, "0 scope"))
    assert b"" == ranks[0].part.decide(wait, store, (), {})
    assert [f"collective_scope/{ranks[0].part.life}/0 scope/exit/n"] == _keys_of(store, "0 scope")

    at_once(*(functools.partial(rank.arrive, "3 scope") for rank in ranks))

    assert wait_until(lambda: not _keys_of(store, "0 scope"))


def test_count_of_a_rank_that_arrives_after_it_stopped_waiting_does_not_stay(rank_on: RankOn) -> None:
    """A store call that was left behind may be made after the peers have removed the count."""
    held, may_go = threading.Event(), threading.Event()

    def hold(method: str, key: str) -> None:
        if (method, key) == ("add", "0 scope/exit/n") and not is_control() and not may_go.is_set():
            held.set()
            may_go.wait(PATIENCE_S)

    store = dist.HashStore()
    ranks = [rank_on(HookedStore(store, hold), 0, 2), rank_on(store, 1, 2)]
    with pytest.raises(KeyboardInterrupt), interrupted_when(held.is_set):
        ranks[0].arrive("0 scope")
    ranks[1].arrive("0 scope")
    at_once(*(functools.partial(rank.arrive, "1 scope") for rank in ranks))
    assert wait_until(lambda: not any(key.endswith("/n") for key in _keys_of(store, "0 scope")))
    may_go.set()
    assert wait_until(lambda: any(key.endswith("/n") for key in _keys_of(store, "0 scope")))

    at_once(*(functools.partial(rank.arrive, "2 scope") for rank in ranks))
    at_once(*(functools.partial(rank.arrive, "3 scope") for rank in ranks))

    assert wait_until(lambda: not any(key.endswith("/n") for key in _keys_of(store, "0 scope")))


def test_groups_made_again_and_again_do_not_fill_the_store(rank_on: RankOn) -> None:
    """A rank may join the next life of the group before another has left this one: nothing of it stays."""
    store = dist.HashStore()
    sizes = []
    ranks = [rank_on(store, rank, 2) for rank in range(2)]
    for _ in range(4):
        at_once(*(rank.arrive for rank in ranks))
        sizes.append(store.num_keys())
        following = [rank_on(store, rank, 2) for rank in range(2)]
        _leave(ranks[0])
        following[0].barrier.join()
        assert wait_until(lambda each=following[0]: bool(each.part.life))
        _leave(ranks[1])
        _end(*ranks)
        ranks = following
    at_once(*(rank.arrive for rank in ranks))

    assert store.num_keys() <= sizes[1]


def _all_arrive(rank: Rank) -> Any:
    return rank.arrive().ok


def _rank_1_stays_away(rank: Rank) -> Any:
    return rank.rank == 1 or rank.arrive("1 scope", timeout=0.1).missing == (1,)


def _rank_1_fails_and_leaves(rank: Rank) -> Any:
    if rank.rank == 1:
        rank.publish(FAILED)
        return True
    return rank.arrive(failure_timeout=0.1, timeout=SOON_S).missing == (1,)


def _different_scopes(rank: Rank) -> Any:
    return rank.arrive(f"0 {rank.rank}").names


@pytest.mark.parametrize("first", [0, 1], ids=["rank-0-first", "rank-1-first"])
@pytest.mark.parametrize("does_leave", [True, False], ids=["left", "killed"])
@pytest.mark.parametrize(
    "plays",
    [
        pytest.param([_all_arrive], id="ok"),
        pytest.param([_all_arrive, _rank_1_stays_away], id="rank-1-missed-the-last-round"),
        pytest.param([_rank_1_fails_and_leaves], id="rank-1-failed-and-left"),
        pytest.param([_different_scopes], id="mismatch"),
    ],
)
def test_group_made_again_on_the_same_store_starts_afresh(
    rank_on: RankOn, plays: list[Callable[[Rank], Any]], first: int, *, does_leave: bool
) -> None:
    """A new group on a store with an old group's keys meets only its own ranks, whichever comes first."""
    store = dist.HashStore()
    old = [rank_on(store, rank, 2) for rank in range(2)]
    for play in plays:
        assert all(at_once(*(functools.partial(play, rank) for rank in old)))
    if does_leave:
        _leave(*old)
    _end(*old)
    start = time.monotonic()
    new = [rank_on(store, rank, 2) for rank in range(2)]

    def run(rank: Rank) -> list[bool]:
        if rank.rank != first:
            assert wait_until(lambda: bool(new[first].part.life))
        return [rank.arrive(f"{i} scope", timeout=SOON_S).ok for i in range(2)]

    assert [[True, True], [True, True]] == at_once(*(functools.partial(run, rank) for rank in new))
    assert new[0].part.life != old[0].part.life
    assert time.monotonic() - start < SOON_S


@pytest.mark.parametrize("how", ["waited", "interrupted"])
def test_group_made_again_starts_afresh_although_one_rank_had_never_joined(rank_on: RankOn, how: str) -> None:
    """A rank that joins for the first time is in the new life of the group, however the other left the old one."""
    store = dist.HashStore()
    old = rank_on(store, 0, 2)
    if how == "interrupted":
        with pytest.raises(KeyboardInterrupt), interrupted_when(lambda: is_waiting(store, 0)):
            old.arrive(timeout=PATIENCE_S)
    else:
        old.arrive(timeout=0.1)
    _leave(old)
    _end(old)
    new = [rank_on(store, rank, 2) for rank in range(2)]
    new[1].barrier.join()
    assert wait_until(lambda: bool(new[1].part.life))

    assert [True, True] == [v.ok for v in at_once(*(functools.partial(rank.arrive, timeout=2.0) for rank in new))]


def test_group_joined_by_all_ranks_at_once_has_one_life(rank_on: RankOn) -> None:
    """Ranks that begin a group at the same moment, over the keys of an old one, find each other."""
    for _ in range(5):
        store, together = dist.HashStore(), threading.Barrier(4)
        old = [rank_on(store, rank, 4) for rank in range(4)]
        at_once(*(rank.arrive for rank in old))
        _leave(*old[:2])

        def meet(method: str, key: str, together: threading.Barrier = together) -> None:
            if key == "life of 4" and method == "compare_set":
                try:
                    together.wait(0.05)
                except threading.BrokenBarrierError:
                    return  # some have gone on already

        new = [rank_on(HookedStore(store, meet), rank, 4) for rank in range(4)]

        assert all(v.ok for v in at_once(*(functools.partial(rank.arrive, timeout=SOON_S) for rank in new)))
        assert 1 == len({rank.part.life for rank in new})


def test_rank_that_leaves_is_done_with_it_when_it_goes_on(rank_on: RankOn) -> None:
    """A rank that tells its peers, by other means, that the group is gone has noted that before, if the store is slow."""
    left = threading.Event()

    def hook(_: str, key: str) -> None:
        if key == "life of 2" and left.is_set():
            time.sleep(0.1)  # the slow store itself

    store = dist.HashStore()
    rank = rank_on(HookedStore(store, hook), 0, 2)
    rank.arrive(timeout=0.1)
    left.set()
    _leave(rank)

    assert f"{rank.part.life} 1 0".encode() == store.get("life of 2")
    record = Record.decode(store.get(rank.part.key("rank/0")))
    assert record is not None
    assert LAST_WORD == record.last_word


def test_rank_that_leaves_does_not_wait_for_a_store_that_hangs(rank_on: RankOn, thawed: threading.Event) -> None:
    """The end of a group is not held up by a frozen store for longer than half a second."""
    left = threading.Event()
    store = HookedStore(dist.HashStore(), lambda *_: left.is_set() and thawed.wait(PATIENCE_S))
    rank = rank_on(store, 0, 2)
    rank.arrive(timeout=0.1)
    left.set()
    start = time.monotonic()
    _leave(rank)

    assert LEAVE_S <= time.monotonic() - start < LEAVE_S + SOON_S
    assert not thawed.is_set()


def test_rank_that_has_left_is_alone(rank_on: RankOn) -> None:
    """A scope that outlives its group says so, at once."""
    rank = rank_on(dist.HashStore(), 0, 2)
    rank.arrive(timeout=0.1)
    _leave(rank)
    verdict = rank.arrive("1 scope")

    assert ((1,), True) == (verdict.missing, verdict.reason.endswith("the group was destroyed"))


def test_rank_whose_store_has_lost_its_arrival_says_so(rank_on: RankOn) -> None:
    """Where the keys are gone, such as those of a file that was removed, that is what a rank says at its timeout."""
    store = dist.HashStore()
    rank = rank_on(store, 0, 2)

    def lose() -> None:
        assert wait_until(lambda: is_waiting(store, 0))
        for key in store.list_keys():
            store.delete_key(key)

    verdict, _ = at_once(lambda: rank.arrive(timeout=2.0), lose)

    assert not verdict.complete
    assert verdict.reason
