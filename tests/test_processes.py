"""
The scope over real processes: timeouts, stragglers, interrupts, stores that fail, groups that change.

Ranks are put in order by `here().announce()` and `here().wait_for()`, which go past the
store, and by looking at where the main thread of a rank is; nothing here sleeps in the
hope that something has happened meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import attrs
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from collective_scope import (
    BarrierTimeoutError,
    CollectiveScope,
    Outcome,
    PeerFailedError,
    PeerLostError,
    ScopeMismatchError,
    Verdict,
    collective_scope,
)
from collective_scope._groups import find
from collective_scope.agreement import control
from tests.ranks import RankPool, freeze, here, process_state, run_script, thaw, values
from tests.stores import wait_until


# Where a scope is not supposed to wait for long. Above every bound that is tested.
_LONG_S = 20.0
# A timeout that is meant to run out, long enough for a peer to stop the store once this rank waits.
_FREEZE_S = 2.0
# For what is promised within a second, on a machine that has other things to do.
_AT_ONCE_S = 6.0
# A wait may exceed its timeout by this on such a machine, also when the store does not answer.
_SLACK_S = 6.0


Run = Callable[..., list[Any]]


@attrs.frozen
class Left:
    """
    How one rank left a scope.

    Attributes:
        surfaced: Type of what it raised, without the module; empty if nothing.

        text: Its message.

        attached: Types of what is attached to it.

        missing: Ranks in a `BarrierTimeoutError`, raised or attached.

        lost: Ranks in a `PeerLostError`, raised or attached.

        names: Names in a `ScopeMismatchError`, raised or attached.

        failures: Those of a `PeerFailedError`, raised or attached.

        is_own: Whether what it raised is what the body raised.

        entered: Whether the body ran.

        verdict: The scope's verdict on all ranks.

        took_s: Seconds from the end of the body, or the call if it did not run.

        at: When it had left, in seconds of the clock that all processes share.
    """

    surfaced: str
    text: str
    attached: tuple[str, ...]
    missing: tuple[int, ...]
    lost: tuple[int, ...]
    names: dict[int, str]
    failures: dict[int, Outcome]
    is_own: bool
    entered: bool
    verdict: Verdict | None
    took_s: float
    at: float

    @property
    def is_ok(self) -> bool:
        """Whether all ranks left quietly."""
        return self.verdict is not None and self.verdict.ok and not self.surfaced


def _leave(scope: CollectiveScope, body: Callable[[CollectiveScope], object] = lambda _: None) -> Left:
    """Run *body* in *scope*, and tell how that ended."""
    own = surfaced = None
    entered = False
    since = time.monotonic()
    try:
        with scope:
            entered = True
            try:
                body(scope)
            except BaseException as error:
                own = error
                raise
            finally:
                since = time.monotonic()
    except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
        surfaced = error
    at = time.monotonic()
    attached = getattr(surfaced, "collective_scope_errors", ())
    errors = (surfaced, *attached)
    missing = next((e.missing for e in errors if isinstance(e, BarrierTimeoutError)), ())
    lost = next((e.lost for e in errors if isinstance(e, PeerLostError)), ())
    names = next((dict(e.names) for e in errors if isinstance(e, ScopeMismatchError)), {})
    failures = next((dict(e.failures) for e in errors if isinstance(e, PeerFailedError)), {})
    try:
        text = str(surfaced)
    except BaseException:  # noqa: BLE001  (kept, and looked at by the test)
        text = "?"
    return Left(
        "" if surfaced is None else type(surfaced).__name__,
        text,
        tuple(type(error).__name__ for error in attached),
        missing,
        lost,
        names,
        failures,
        is_own=own is not None and surfaced is own,
        entered=entered,
        verdict=scope.verdict,
        took_s=at - since,
        at=at,
    )


def _leave_next(group: Any = None) -> Left:
    """Go through one more scope, to see whether the group can be used."""
    return _leave(collective_scope(group, name="next", timeout=_LONG_S))


def _call(fn: Callable[[], object], _: CollectiveScope) -> None:
    fn()


def _raise(error: BaseException) -> None:
    raise error


def _control() -> Any:
    """Return what looks, answers and warns for this process."""
    found = find(None)
    assert found is not None
    assert found[0].barrier is not None
    return found[0].barrier.control


def _announce_at_barrier(name: str, scope: CollectiveScope) -> None:
    """Announce *name* as soon as this rank waits at a barrier of *scope*, and the store has counted it there."""

    def watch() -> None:
        while (wait := scope._wait) is None or wait.over or not wait.counted:  # noqa: SLF001  (nothing public tells)
            time.sleep(0.002)  # A field of another thread cannot be waited for.
        context.announce(name)

    context = here()
    threading.Thread(target=watch, daemon=True).start()


def _meet(name: str) -> None:
    """Let all ranks come here, past the store."""
    context = here()
    context.announce(f"{name} {context.rank}")
    for rank in range(context.world_size):
        context.wait_for(f"{name} {rank}")


@pytest.fixture(scope="module", name="pools")
def _pools(rank_pools: Callable[[int], RankPool]) -> Iterator[Callable[[str], RankPool]]:
    """Return pools by name, to start each only if a test needs it."""
    with contextlib.ExitStack() as stack:
        own = {
            "own groups": RankPool(2, init=False),
            # As under torchrun, whose agent serves the store.
            "agent": RankPool(2, init=False, store="env", host="parent"),
            "process": RankPool(2, host="process"),
            "file": RankPool(2, store="file"),
        }
        for pool in own.values():
            stack.enter_context(pool)
        yield lambda name: own[name] if name in own else rank_pools(int(name))


@pytest.fixture(name="run")
def _run(pools: Callable[[str], RankPool]) -> Run:
    """Return a way to run a function on all ranks of a pool; after a failure, the next one gets fresh ones."""

    def run(pool: str, fn: Callable[..., Any], *args: Any, timeout: float = 30.0) -> list[Any]:
        is_healthy = False
        try:
            results = values(pools(pool).run(fn, *args, timeout=timeout))
            is_healthy = all(values(pools(pool).run(_is_healthy, timeout=timeout)))
        finally:
            if not is_healthy:
                pools(pool).close()
        return results

    return run


def _is_healthy(rank: int, world_size: int) -> bool:
    """Tell whether the next test finds the ranks in step and nothing else."""
    if not here().init:
        return not dist.is_initialized()
    left = _leave(collective_scope(name="healthy", timeout=1.0))
    return left.is_ok and left.verdict is not None and rank < world_size == left.verdict.world_size


# Missing ranks


def _miss(rank: int, world_size: int, missing: list[int], timeout: float) -> tuple[Left, Left]:
    def body(_: CollectiveScope) -> None:
        if rank in missing:
            for peer in set(range(world_size)) - set(missing):
                here().wait_for(f"{peer} has left")

    left = _leave(collective_scope(name="missed", timeout=timeout), body)
    here().announce(f"{rank} has left")
    return left, _leave_next()


@pytest.mark.parametrize(
    ("pool", "missing"),
    [
        pytest.param("4", [0], id="rank-0"),
        pytest.param("4", [2], id="rank-2"),
        pytest.param("4", [1, 3], id="two"),
        pytest.param("4", [0, 1, 2], id="all-but-one"),
        pytest.param("file", [0], id="rank-0-on-a-file"),
    ],
)
def test_timeout_ranks_missing_are_named_on_every_rank(pool: str, missing: list[int], run: Run) -> None:
    """Every rank, the stragglers included, is told the same missing ranks; then the group works again."""
    timeout = 0.5
    results = run(pool, _miss, missing, timeout)
    lefts = [left for left, _ in results]

    assert ["BarrierTimeoutError"] * len(lefts) == [left.surfaced for left in lefts]
    assert [tuple(missing)] * len(lefts) == [left.missing for left in lefts]
    assert all(lefts[0].verdict == left.verdict for left in lefts)
    assert all("missing at the exit of scope 'missed'" in left.text.splitlines()[0] for left in lefts)
    for rank, left in enumerate(lefts):
        assert left.took_s < (_AT_ONCE_S if rank in missing else timeout + _SLACK_S)
    # The first to run out of patience decides for all.
    assert max(left.took_s for rank, left in enumerate(lefts) if rank not in missing) > 0.9 * timeout
    assert all(after.is_ok for _, after in results)


def _follow(rank: int, world_size: int, timeout: float) -> tuple[Left, Left, Left]:  # noqa: ARG001  (given to every function of a rank)
    log = here().directory / "log"

    def write(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line}\n")

    def first_body(_: CollectiveScope) -> None:
        if rank == 1:
            here().wait_for("rank 0 goes on")
            # It must not come: bodies would overlap.
            with contextlib.suppress(TimeoutError):
                here().wait_for("rank 0 is in its second body", 0.3)
                write("overlap")
            if timeout < 1.0:
                here().wait_for("rank 0 was refused")
        write(f"first body ends on {rank}")

    def second_body(_: CollectiveScope) -> None:
        if rank == 0:
            here().announce("rank 0 is in its second body")
        write(f"second body starts on {rank}")

    first = _leave(collective_scope(name="first", timeout=0.3), first_body)
    if rank == 0:
        here().announce("rank 0 goes on")
    second = _leave(collective_scope(name="second", timeout=timeout), second_body)
    here().announce(f"rank {rank} was refused")
    if rank == 0:
        # Until the straggler is back, further scopes are refused at once.
        here().wait_for("rank 1 was refused")
    third = _leave_next()
    write(f"third ends on {rank}")
    _meet("log")
    lines = log.read_text().splitlines()
    assert "overlap" not in lines
    starts = [i for i, line in enumerate(lines) if line.startswith("second body starts")]
    ends = [i for i, line in enumerate(lines) if line.startswith("first body ends")]
    assert 2 == len(ends)
    assert not starts or max(ends) < min(starts)
    return first, second, third


@pytest.mark.parametrize("pool", ["2", "file"])
def test_straggler_still_in_its_body_holds_up_the_next_body(pool: str, run: Run) -> None:
    """After a timeout, the next body starts nowhere before the straggler has left, and then it does."""
    results = run(pool, _follow, 20.0)

    assert [(1,), (1,)] == [first.missing for first, _, _ in results]
    assert results[0][0].verdict == results[1][0].verdict
    assert all(second.is_ok and third.is_ok for _, second, third in results)


def test_straggler_that_stays_in_its_body_has_the_next_body_refused(run: Run) -> None:
    """If the straggler does not leave in time, the next scope raises on all ranks before its body."""
    results = run("2", _follow, 0.4)
    seconds = [second for _, second, _ in results]

    assert ["BarrierTimeoutError"] * 2 == [second.surfaced for second in seconds]
    assert [(1,)] * 2 == [second.missing for second in seconds]
    assert [False] * 2 == [second.entered for second in seconds]
    assert seconds[0].verdict == seconds[1].verdict
    assert "at the entry of scope 'second'" in seconds[0].text.splitlines()[0]
    assert all(third.is_ok for _, _, third in results)


# Failures


def _fail_before_a_long_cleanup(rank: int, world_size: int) -> tuple[Left, Left, float]:  # noqa: ARG001  (given to every function of a rank)
    raised_at = 0.0

    def body(scope: CollectiveScope) -> None:
        nonlocal raised_at
        if rank == 0:
            _announce_at_barrier("rank 0 waits", scope)
        else:
            scope.cleanup(here().wait_for, "rank 0 has left")
            here().wait_for("rank 0 waits")
            raised_at = time.monotonic()
            _raise(ValueError("body of rank 1"))

    left = _leave(collective_scope(name="failing", timeout=_LONG_S, failure_timeout=0.5), body)
    here().announce(f"rank {rank} has left")
    return left, _leave_next(), raised_at


def test_failure_of_a_rank_that_does_not_arrive_bounds_the_wait(run: Run) -> None:
    """Once a failure is published, a waiting peer waits for failure_timeout, not for timeout."""
    (healthy, next_0, _), (failed, next_1, raised_at) = run("2", _fail_before_a_long_cleanup)

    assert 0.45 < healthy.at - raised_at < 0.5 + _SLACK_S
    assert (1,) == healthy.missing
    assert "ValueError: body of rank 1" in healthy.text
    assert {1: "body of rank 1"} == {rank: outcome.message for rank, outcome in healthy.failures.items()}
    assert failed.is_own
    assert healthy.verdict == failed.verdict
    assert next_0.is_ok
    assert next_1.is_ok


def _fail_while_peers_wait(rank: int, world_size: int) -> tuple[Left, float]:
    raised_at = 0.0

    def body(scope: CollectiveScope) -> None:
        nonlocal raised_at
        if rank > 0:
            _announce_at_barrier(f"rank {rank} waits", scope)
            return
        for peer in range(1, world_size):
            here().wait_for(f"rank {peer} waits")
        raised_at = time.monotonic()
        _raise(ValueError("body of rank 0"))

    return _leave(collective_scope(name="failing", timeout=_LONG_S), body), raised_at


@pytest.mark.parametrize("pool", ["4", "file"])
def test_failure_of_the_last_rank_reaches_waiting_peers_at_once(pool: str, run: Run) -> None:
    """A rank that fails releases the peers that wait for it."""
    (_, raised_at), *peers = run(pool, _fail_while_peers_wait)

    assert ["PeerFailedError"] * len(peers) == [left.surfaced for left, _ in peers]
    assert all(left.at - raised_at < _AT_ONCE_S for left, _ in peers)


def _time_out_in_a_collective(rank: int, world_size: int) -> Left:  # noqa: ARG001  (given to every function of a rank)
    group = dist.new_group(timeout=timedelta(seconds=3))  # a pair that timed out stays closed

    def body(_: CollectiveScope) -> None:
        if rank == 1:
            _raise(ValueError("the cause"))
        if rank == 0:
            dist.recv(torch.ones(1), src=1, group=group)

    left = _leave(collective_scope(name="failing", timeout=_LONG_S), body)
    dist.destroy_process_group(group)
    return left


def test_failure_whose_peer_times_out_in_a_collective_is_told_as_the_cause(run: Run) -> None:
    """The rank that failed comes first; what the collective of its peer then raised is marked as a consequence."""
    timed_out, cause, *healthy = run("4", _time_out_in_a_collective)

    assert timed_out.is_own
    assert cause.is_own
    assert ["PeerFailedError"] * 2 == [left.surfaced for left in healthy]
    for left in healthy:
        first, told, consequence, ok, *_ = left.text.splitlines()
        assert "ranks 0 and 1 of 4 failed in scope 'failing', rank 1 first: ValueError: the cause" == first
        assert "  arrived:  1 (body failed: ValueError: the cause)" == told
        assert consequence.startswith("            0 (body failed: ")
        assert consequence.endswith("; likely a consequence)")
        assert "            2, 3 (ok)" == ok


# The store


def _freeze_store(rank: int, world_size: int, waits: int | None) -> tuple[Left, Left, Left]:  # noqa: ARG001  (given to every function of a rank)
    """Stop the process that hosts the store while rank *waits* waits, or before any does."""
    pid = here().store_pid
    assert pid is not None

    def body(scope: CollectiveScope) -> None:
        if rank == waits:
            _announce_at_barrier("one waits", scope)
        elif waits is not None:
            here().wait_for("one waits")
            freeze(pid)
        elif rank == 0:
            freeze(pid)
        if waits is None:
            _meet("frozen")

    left = _leave(collective_scope(name="frozen", timeout=_FREEZE_S), body)
    _meet("left")
    if rank == 0:
        assert "T" == process_state(pid)
        thaw(pid)
    return left, _leave_next(), _leave_next()


@pytest.mark.parametrize(
    "waits", [pytest.param(None, id="in-the-body"), pytest.param(0, id="rank-0-waits"), pytest.param(1, id="1-waits")]
)
def test_store_frozen_bounds_the_wait_and_says_why(waits: int | None, run: Run) -> None:
    """With the store's process stopped, every rank leaves in time, with the reason; thawed, it works again."""
    results = run("process", _freeze_store, waits)

    for left, _, _ in results:
        assert left.took_s < _FREEZE_S + _SLACK_S
        assert "BarrierTimeoutError" == left.surfaced
        assert "has not answered" in left.text
    assert all(last.is_ok for _, _, last in results)


def _freeze_store_before_the_first_scope(rank: int, world_size: int) -> tuple[Left, Left, Left]:  # noqa: ARG001  (given to every function of a rank)
    group = dist.new_group()
    pid = here().store_pid
    assert pid is not None
    _meet("made")
    if rank == 0:
        freeze(pid)
    _meet("frozen")
    left = _leave(collective_scope(group, name="frozen", timeout=0.5))
    _meet("left")
    if rank == 0:
        thaw(pid)
    return left, _leave_next(group), _leave_next(group)


def test_store_frozen_from_before_the_first_scope_joins_the_ranks_when_it_goes_on(
    pools: Callable[[str], RankPool],
) -> None:
    """A rank that gave up before it had joined its group joins it once, meets its peers there, and ends as others do."""
    pools("process").close()  # in these processes, there shall have been no scope
    with contextlib.closing(pools("process")) as pool:
        for left, _, last in values(pool.run(_freeze_store_before_the_first_scope)):
            assert left.took_s < 0.5 + _SLACK_S
            assert "has not answered" in left.text
            assert last.is_ok


def _freeze_rank_0(rank: int, world_size: int) -> tuple[Left, list[Left]]:  # noqa: ARG001  (given to every function of a rank)
    pid = here().pids[0]

    def body(_: CollectiveScope) -> None:
        if rank == 1:
            here().wait_for("rank 0 is in its body")
            freeze(pid)
        else:
            here().announce("rank 0 is in its body")
            here().wait_for("rank 1 has left")

    left = _leave(collective_scope(name="frozen", timeout=0.5), body)
    if rank == 1:
        thaw(pid)
        # By then, the store has answered what was asked while it was stopped, and the round has been ended for all.
        assert wait_until(lambda: not _control().spans)
        here().announce("rank 1 has left")
    return left, [_leave_next() for _ in range(3)]


def test_store_frozen_with_rank_0_bounds_the_wait_of_its_peer(run: Run) -> None:
    """Rank 0 hosts the store and is stopped: its peer leaves in time, and later all are in step again."""
    (_, nexts_0), (left, nexts_1) = run("2", _freeze_rank_0)

    assert left.took_s < 0.5 + _SLACK_S
    assert "BarrierTimeoutError" == left.surfaced
    assert (0,) == left.missing
    assert "served by rank 0" in left.text
    assert nexts_0[-1].is_ok
    assert nexts_1[-1].is_ok


def test_store_frozen_with_rank_0_gives_both_ranks_the_same_end(run: Run) -> None:
    """A rank that gave up on a stopped store does not count as arrived when the store goes on."""
    (left_0, _), (left_1, _) = run("2", _freeze_rank_0)

    assert bool(left_0.surfaced) == bool(left_1.surfaced)


def _lose_store(rank: int, world_size: int, waits: int | None) -> Left:  # noqa: ARG001  (given to every function of a rank)
    pid = here().store_pid
    assert pid is not None

    def body(scope: CollectiveScope) -> None:
        if rank == waits:
            _announce_at_barrier("one waits", scope)
        elif waits is not None or rank == 0:
            if waits is not None:
                here().wait_for("one waits")
            os.kill(pid, signal.SIGKILL)
        if waits is None:
            _meet("killed")

    first = _leave_next()  # Has the scope connect to the store while there is one.
    _meet("connected")
    left = _leave(collective_scope(name="killed", timeout=_LONG_S), body)
    return left if first.is_ok else first


@pytest.mark.parametrize("waits", [pytest.param(None, id="in-the-body"), pytest.param(1, id="one-waits")])
def test_store_gone_ends_the_wait_at_once_and_says_why(waits: int | None, pools: Callable[[str], RankPool]) -> None:
    """With the store's process killed, every rank leaves at once with the reason, and calls no living rank lost."""
    with contextlib.closing(pools("process")) as pool:
        lefts = values(pool.run(_lose_store, waits, timeout=30.0))

    for left in lefts:
        assert left.took_s < _AT_ONCE_S
        assert left.surfaced in {"BarrierTimeoutError", "PeerLostError"}
        assert "is gone" in left.text
    # Nobody knows who hosted it; both ranks are alive.
    assert [(), ()] == [left.lost for left in lefts]


# Interrupts


def _interrupt_while_waiting(rank: int, world_size: int, victim: int, busy: int) -> tuple[Left, Left, float]:
    sent_at = 0.0

    def body(scope: CollectiveScope) -> None:
        nonlocal sent_at
        if rank != busy:
            _announce_at_barrier(f"rank {rank} waits", scope)
            return
        waiting = [peer for peer in range(world_size) if peer != busy]
        for peer in waiting:
            here().wait_for(f"rank {peer} waits")
        sent_at = time.monotonic()
        os.kill(here().pids[victim], signal.SIGINT)
        for peer in waiting:
            here().wait_for(f"rank {peer} has left")

    left = _leave(collective_scope(name="interrupted", timeout=_LONG_S), body)
    here().announce(f"rank {rank} has left")
    return left, _leave_next(), sent_at


@pytest.mark.parametrize(
    ("pool", "victim", "busy"),
    [
        pytest.param("2", 0, 1, id="rank-0-of-2"),
        pytest.param("2", 1, 0, id="rank-1-of-2"),
        pytest.param("4", 1, 3, id="rank-1-of-4"),
        pytest.param("4", 0, 1, id="rank-0-of-4"),
    ],
)
def test_interrupt_of_a_waiting_rank_ends_the_wait_of_all(pool: str, victim: int, busy: int, run: Run) -> None:
    """Ctrl-C surfaces within a second where it was sent, and peers learn of it as of any failure."""
    results = run(pool, _interrupt_while_waiting, victim, busy)
    sent_at = results[busy][2]
    lefts = {rank: left for rank, (left, _, _) in enumerate(results)}

    assert "KeyboardInterrupt" == lefts[victim].surfaced
    assert lefts[victim].at - sent_at < _AT_ONCE_S
    for rank in lefts.keys() - {victim}:
        assert "PeerFailedError" == lefts[rank].surfaced
        assert [victim] == list(lefts[rank].failures)
        assert "KeyboardInterrupt" == lefts[rank].failures[victim].type_name
        assert rank == busy or lefts[rank].at - sent_at < _AT_ONCE_S
    assert all(after.is_ok for _, after, _ in results)


def _stop_past_its_time(rank: int, world_size: int) -> tuple[Left, Left]:  # noqa: ARG001  (given to every function of a rank)
    pid = here().pids[0]

    def body(scope: CollectiveScope) -> None:
        if rank == 0:
            _announce_at_barrier("rank 0 waits", scope)
            return
        here().wait_for("rank 0 waits")
        freeze(pid)
        time.sleep(_FREEZE_S + 2.0)  # the standstill itself: longer than a rank waits for its peers, and for the store
        thaw(pid)
        here().wait_for("rank 0 has left")

    left = _leave(collective_scope(name="stopped", timeout=_FREEZE_S), body)
    here().announce(f"rank {rank} has left")
    return left, _leave_next()


def test_rank_that_stands_still_past_its_time_does_not_take_the_store_for_frozen(run: Run) -> None:
    """A rank whose process has stood still finds that its peer is missing, and that one reads the same."""
    (left, after), (left_1, after_1) = run("2", _stop_past_its_time)

    assert left.verdict is not None
    assert left.verdict == left_1.verdict
    assert ((1,), "") == (left.verdict.missing, left.verdict.reason)
    assert after.is_ok
    assert after_1.is_ok


def _stop_after_arriving(rank: int, world_size: int) -> tuple[Left, float]:  # noqa: ARG001  (given to every function of a rank)
    pid = here().pids[1]

    def body(scope: CollectiveScope) -> None:
        if rank == 1:
            _announce_at_barrier("rank 1 waits", scope)
        else:
            here().wait_for("rank 1 waits")
            freeze(pid)

    control.CLOSING_S = 1.0
    store = _host_of_rank_0(rank)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    left = _leave(collective_scope(name="stopped", timeout=_LONG_S), body)
    since = time.monotonic()
    if rank == 1:
        here().wait_for("rank 0 has destroyed its group")
    dist.destroy_process_group()
    del store
    took_s = time.monotonic() - since
    if rank == 0:
        here().announce("rank 0 has destroyed its group")
        thaw(pid)
    return left, took_s


def test_peer_stopped_after_it_arrived_holds_up_the_host_of_the_store_for_a_few_seconds_only(run: Run) -> None:
    """Rank 0 leaves at once. When it takes the store away, it waits for its peer, which has not read, but not for ever."""
    (left, took_s), (peer, _) = run("own groups", _stop_after_arriving)

    assert left.is_ok
    assert took_s < control.CLOSING_S + _SLACK_S
    assert peer.is_ok or "is gone" in peer.text


def _end_body_with(rank: int, world_size: int, name: str) -> tuple[Left, Left]:  # noqa: ARG001  (given to every function of a rank)
    def body(_: CollectiveScope) -> None:
        if rank == 0:
            here().wait_for("rank 1 has left")
        else:
            _raise({"exit": SystemExit(3), "interrupt": KeyboardInterrupt("now")}[name])

    left = _leave(collective_scope(name="ended", timeout=_LONG_S, failure_timeout=0.5), body)
    here().announce(f"rank {rank} has left")
    return left, _leave_next()


@pytest.mark.parametrize("name", ["exit", "interrupt"])
def test_body_that_exits_waits_for_failure_timeout_at_most(name: str, run: Run) -> None:
    """SystemExit and KeyboardInterrupt wait for missing peers for failure_timeout, then go on as themselves."""
    (peer, next_0), (left, next_1) = run("2", _end_body_with, name)

    assert left.is_own
    assert 0.45 < left.took_s < 0.5 + _SLACK_S
    assert (0,) == left.missing
    assert ("BarrierTimeoutError",) == left.attached
    assert peer.verdict == left.verdict
    assert peer.surfaced
    assert next_0.is_ok
    assert next_1.is_ok


# A body that changes its process


def _replace_the_clock(rank: int, world_size: int, value: float | None) -> tuple[Left, Left]:  # noqa: ARG001  (given to every function of a rank)
    def body(_: CollectiveScope) -> None:
        found = find(None)
        assert found is not None
        assert found[0].barrier is not None
        control = found[0].barrier.control
        effect = None if value is None else {"return_value": value}
        with mock.patch("time.monotonic", **(effect or {"side_effect": AssertionError("not yours")})):
            for _ in range(2):  # the control thread goes on looking
                before = control.heard_at
                while control.heard_at == before and control.broken is None:
                    threading.Event().wait(0.01)

    return _leave(collective_scope(name="clock", timeout=_LONG_S), body if rank == 0 else lambda _: None), _leave_next()


@pytest.mark.parametrize("value", [1e9, 0.0, None], ids=["future", "past", "raises"])
def test_scope_whose_body_replaces_the_clock_ends_like_any_other(value: float | None, run: Run) -> None:
    """A test that puts its own function into the time module does not set the clock of the library's threads."""
    for left, left_next in run("2", _replace_the_clock, value):
        assert left.is_ok
        assert left_next.is_ok


class _ClosedHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        msg = f"closed: {record.levelname}"
        raise SystemExit(msg)


def _speak_to_a_handler_that_exits(rank: int, world_size: int) -> tuple[Left, Left, str]:  # noqa: ARG001  (given to every function of a rank)
    logger, handler = logging.getLogger("collective_scope"), _ClosedHandler()
    logger.addHandler(handler)
    read, write, real = *os.pipe(), os.dup(2)
    os.dup2(write, 2)
    try:
        if rank == 1:
            scope = collective_scope(name="late", timeout=_LONG_S)
            left = _leave(scope, lambda _: here().wait_for("rank 0 has spoken"))
        else:
            threading.Thread(target=lambda: here().announce("rank 0 has spoken") if os.read(read, 1) else None).start()
            left = _leave(collective_scope(name="late", timeout=_LONG_S, warn_after=0.1), lambda _: None)
    finally:
        os.dup2(real, 2)
        logger.removeHandler(handler)
        os.close(write)
    with os.fdopen(read, "rb") as said:
        return left, _leave_next(), said.read().decode()


def test_warning_that_a_handler_refuses_is_written_to_stderr_and_ends_nothing(run: Run) -> None:
    """A handler whose stream is closed must not end the thread that looks after all scopes of the process."""
    (waiting, next_0, said), (late, next_1, _) = run("2", _speak_to_a_handler_that_exits)

    assert all(left.is_ok for left in (waiting, late, next_0, next_1))
    assert "missing" in said
    assert "(This could not be logged: SystemExit: closed: WARNING)" in said


# Exceptions that are hard to pass on


class _TwoArgumentError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class _LockingError(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class _UnprintableError(Exception):
    def __str__(self) -> str:
        msg = "no words"
        raise RuntimeError(msg)


class _ExitingError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


class _AssertingError(Exception):
    def __str__(self) -> str:
        raise asyncio.CancelledError  # which is no Exception, as those of pytest are not


class _SecretiveError(Exception):
    def __getattribute__(self, name: str) -> Any:
        if name in ("args", "__traceback__", "__cause__", "__notes__"):
            msg = "secret"
            raise RuntimeError(msg)
        return super().__getattribute__(name)


class _FalsyError(Exception):
    def __bool__(self) -> bool:
        return False


class _SealedError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("__"):
            msg = "sealed"
            raise AttributeError(msg)
        super().__setattr__(name, value)

    def add_note(self, _: str, /) -> None:
        msg = "sealed"
        raise TypeError(msg)


def _cyclic() -> BaseException:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


_ODD: dict[str, Callable[[], BaseException]] = {
    "two-arguments": lambda: _TwoArgumentError("two", "words"),
    "lock": lambda: _LockingError("holds a lock"),
    "unprintable": _UnprintableError,
    "unprintable-exit": _ExitingError,
    "unprintable-no-exception": _AssertingError,
    "secretive": lambda: _SecretiveError("secretive"),
    "megabyte": lambda: ValueError("<" + "x" * 1_000_000 + ">"),
    "surrogates": lambda: ValueError("lone \ud800, NUL \0, emoji \U0001f600, line\nline"),
    "falsy": lambda: _FalsyError("falsy"),
    "sealed": lambda: _SealedError("sealed"),
    "cyclic-cause": _cyclic,
    "group": lambda: ExceptionGroup("several", [ValueError("one"), _UnprintableError()]),
}


def _raise_odd(rank: int, world_size: int, name: str, options: dict[str, Any]) -> tuple[Left, Left]:  # noqa: ARG001  (given to every function of a rank)
    scope = collective_scope(name="odd", timeout=3.0, failure_timeout=3.0, **options)
    body: Callable[[CollectiveScope], object] = (lambda _: _raise(_ODD[name]())) if rank == 1 else (lambda _: None)
    return _leave(scope, body), _leave_next()


@pytest.mark.parametrize(
    ("name", "type_name", "message"),
    [
        ("two-arguments", "tests.test_processes._TwoArgumentError", "two words"),
        ("lock", "tests.test_processes._LockingError", "holds a lock"),
        ("unprintable", "tests.test_processes._UnprintableError", None),
        ("unprintable-exit", "tests.test_processes._ExitingError", None),
        ("unprintable-no-exception", "tests.test_processes._AssertingError", None),
        ("secretive", "tests.test_processes._SecretiveError", "secretive"),
        ("surrogates", "ValueError", "lone \ud800, NUL \0, emoji \U0001f600, line\nline"),
        ("falsy", "tests.test_processes._FalsyError", "falsy"),
        ("sealed", "tests.test_processes._SealedError", "sealed"),
        ("cyclic-cause", "ValueError", "first"),
        ("group", "ExceptionGroup", "several (2 sub-exceptions)"),
    ],
    ids=lambda value: value if value in _ODD else "",
)
def test_exception_of_any_kind_arrives_as_text(name: str, type_name: str, message: str | None, run: Run) -> None:
    """A foreign exception stays itself, whatever it holds or does. Peers learn its type and message."""
    (peer, next_0), (left, next_1) = run("2", _raise_odd, name, {})

    assert left.is_own
    assert "PeerFailedError" == peer.surfaced
    assert (type_name, "body") == (peer.failures[1].type_name, peer.failures[1].phase)
    assert message is None or message == peer.failures[1].message
    assert next_0.is_ok
    assert next_1.is_ok


def test_exception_with_a_megabyte_of_message_arrives_shortened(run: Run) -> None:
    """Of a message too long to send, beginning, end and length arrive."""
    (peer, next_0), (left, _) = run("2", _raise_odd, "megabyte", {})
    message = peer.failures[1].message

    assert left.is_own
    assert message.startswith("<xxx")
    assert message.endswith("xxx>")
    assert "1000002" in message
    assert len(message) < 100_000
    assert next_0.is_ok


@pytest.mark.parametrize("name", ["cyclic-cause", "falsy"])
def test_exception_of_odd_shape_does_not_hang_lockstep_gc(name: str, run: Run) -> None:
    """Clearing the frames of a failed body ends, however its exceptions refer to each other."""
    (peer, next_0), (left, next_1) = run("2", _raise_odd, name, {"lockstep_gc": True}, timeout=8.0)

    assert left.is_own
    assert "PeerFailedError" == peer.surfaced
    assert next_0.is_ok
    assert next_1.is_ok


# Ranks at different scopes


def _differ(rank: int, world_size: int) -> tuple[Left, Left]:  # noqa: ARG001  (given to every function of a rank)
    left = _leave(collective_scope(name=f"scope of {rank}", timeout=_LONG_S))
    _meet("left")
    return left, _leave_next()


@pytest.mark.parametrize("pool", ["2", "4", "file"])
def test_scopes_with_different_names_are_a_mismatch_at_once(pool: str, run: Run) -> None:
    """Ranks at scopes of different names do not wait for the timeout, say where they are, and go on afterwards."""
    for rank, (left, after) in enumerate(run(pool, _differ)):
        assert "ScopeMismatchError" == left.surfaced
        assert left.took_s < _LONG_S
        assert {each: f"scope of {each}" for each in left.names} == left.names
        assert rank in left.names
        assert 1 < len(left.names)
        assert after.is_ok


def _one_more(rank: int, world_size: int) -> tuple[list[Left], Left, Left]:
    group = dist.new_group(range(world_size))
    count = 3 if rank == 0 else 2
    lefts: list[Left] = []

    def outer(_: CollectiveScope) -> None:
        for _ in range(count):
            lefts.append(_leave(collective_scope(group, name="inner", timeout=_LONG_S)))
            if lefts[-1].surfaced:
                _raise(RuntimeError("out of step"))

    left = _leave(collective_scope(group, name="outer", timeout=_LONG_S, failure_timeout=_LONG_S), outer)
    return lefts, left, _leave_next(group)


def test_scope_more_on_one_rank_is_a_mismatch_at_once(run: Run) -> None:
    """A loop that is longer on one rank is found when the other rank leaves the scope around it."""
    (lefts, own, after), (_, peer, next_1) = run("2", _one_more)

    assert ["", "", "ScopeMismatchError"] == [each.surfaced for each in lefts]
    assert {0: "inner", 1: "outer"} == lefts[-1].names
    assert own.is_own
    assert "PeerFailedError" == peer.surfaced
    assert "RuntimeError: out of step" in peer.text
    assert own.verdict == peer.verdict
    assert max(lefts[-1].took_s, peer.took_s) < _LONG_S
    assert after.is_ok
    assert next_1.is_ok


def _one_more_in_a_row(rank: int, world_size: int) -> list[Left]:
    group = dist.new_group(range(world_size))
    names = ["a", "b", "c", "d"] if rank == 0 else ["a", "c", "d", "e"]
    return [_leave(collective_scope(group, name=name, timeout=_LONG_S)) for name in names]


def test_scope_more_on_one_rank_has_later_scopes_refused_with_the_reason(run: Run) -> None:
    """Ranks that are out of step for good never run a body together, and are told so each time."""
    results = run("2", _one_more_in_a_row)

    for lefts in results:
        assert [True, True, False, False] == [left.entered for left in lefts]
        assert ["", *["ScopeMismatchError"] * 3] == [left.surfaced for left in lefts]
        assert all(left.took_s < _AT_ONCE_S for left in lefts)


# Groups


def _nest_in_subgroups(rank: int, world_size: int, failing: int | None) -> tuple[Left, Left, Left, list[str]]:
    half = world_size // 2
    groups = [dist.new_group(range(half)), dist.new_group(range(half, world_size))]
    mine = groups[rank // half]
    ran: list[str] = []
    inner_left: list[Left] = []

    def inner(scope: CollectiveScope) -> None:
        scope.cleanup(ran.append, "inner")
        if rank == failing:
            _raise(ValueError("inside"))

    def outer(scope: CollectiveScope) -> None:
        scope.cleanup(ran.append, "outer")
        for group in groups:  # a rank is outside of one of them
            with collective_scope(group, name="visited", timeout=10.0) as visited:
                visited.cleanup(ran.append, "visited")
        with collective_scope(name="same group", timeout=10.0):
            pass
        inner_left.append(_leave(collective_scope(mine, name="half", timeout=10.0), inner))
        if inner_left[0].surfaced:
            msg = f"after {inner_left[0].surfaced}"
            raise RuntimeError(msg)

    outer_left = _leave(collective_scope(name="outer", timeout=10.0, failure_timeout=5.0), outer)
    return inner_left[0], outer_left, _leave_next(), ran


def test_scopes_nested_over_groups_and_subgroups_leave_quietly(run: Run) -> None:
    """Scopes nest on one group and on several; outside of its group, a rank's cleanups run without a barrier."""
    for inner, outer, after, ran in run("4", _nest_in_subgroups, None):
        assert inner.is_ok
        assert outer.is_ok
        assert after.is_ok
        assert ["visited", "visited", "inner", "outer"] == ran


def test_failure_in_a_nested_subgroup_reaches_its_members_then_all(run: Run) -> None:
    """The members of the subgroup learn of the failure there, the others at the outer scope."""
    results = run("4", _nest_in_subgroups, 3)
    inners = [inner for inner, _, _, _ in results]
    outers = [outer for _, outer, _, _ in results]

    assert ["", "", "PeerFailedError", "ValueError"] == [inner.surfaced for inner in inners]
    assert [1] == list(inners[2].failures)
    assert "rank 1 (global rank 3)" in inners[2].text.splitlines()[0]
    assert ["PeerFailedError", "PeerFailedError", "RuntimeError", "RuntimeError"] == [o.surfaced for o in outers]
    assert [2, 3] == sorted(outers[0].failures)
    assert all(outers[0].verdict == outer.verdict for outer in outers)
    for _, _, after, ran in results:
        assert after.is_ok
        assert ["visited", "visited", "inner", "outer"] == ran


def _change_group(
    rank: int,
    world_size: int,  # noqa: ARG001  (given to every function of a rank)
    how: str,
    life: str,
) -> tuple[Left, Left | None, bool, list[str], float]:
    # A wait for threads that go on would be seen.
    control.CLOSING_S = _LONG_S
    ran: list[str] = []
    if how != "made":
        here().init_process_group(f"{life} before")

    def body(scope: CollectiveScope) -> None:
        scope.cleanup(ran.append, "cleanup")
        scope.collective_cleanup(ran.append, "collective")
        if how.startswith("destroyed"):
            dist.destroy_process_group()
        if how.startswith("remade"):
            dist.destroy_process_group()
            here().init_process_group(f"{life} after")
        if how == "made":
            here().init_process_group(f"{life} made")
        if how.endswith("failing") and rank == 1:
            _raise(ValueError("body"))
        if how.endswith("by one") and rank == 0:
            dist.destroy_process_group()

    left = _leave(collective_scope(name=how, timeout=_LONG_S), body)
    if how.endswith("by one"):
        _meet("left")
    is_initialized = dist.is_initialized()
    after = _leave_next() if is_initialized and not how.endswith("by one") else None
    since = time.monotonic()
    if is_initialized:
        dist.destroy_process_group()
    return left, after, is_initialized, ran, time.monotonic() - since


@pytest.mark.parametrize(
    ("how", "surfaced", "remains"),
    [
        pytest.param("destroyed", ["", ""], [False, False], id="destroyed"),
        pytest.param("destroyed failing", ["PeerFailedError", "ValueError"], [False, False], id="destroyed-failing"),
        pytest.param("left by one", ["", ""], [False, True], id="destroyed-by-one"),
        pytest.param("remade", ["", ""], [True, True], id="remade"),
        pytest.param("remade failing", ["PeerFailedError", "ValueError"], [True, True], id="remade-failing"),
        pytest.param("made", ["", ""], [True, True], id="made"),
    ],
)
def test_default_group_changed_in_the_body_keeps_the_barrier(
    how: str, surfaced: list[str], remains: list[bool], run: Run
) -> None:
    """Cleanups run, ranks leave together, and nothing hangs, whatever the body does to the default group."""
    # The library must not depend on how far its threads have come when the body changes the group.
    for _ in range(4):
        results = run("own groups", _change_group, how, uuid4().hex)

        assert surfaced == [left.surfaced for left, *_ in results]
        assert remains == [is_initialized for _, _, is_initialized, _, _ in results]
        assert [["collective", "cleanup"]] * 2 == [ran for _, _, _, ran, _ in results]
        assert all(left.took_s < _AT_ONCE_S for left, *_ in results)
        assert all(after is None or after.is_ok for _, after, *_ in results)
        assert all(destroying_s < _AT_ONCE_S for *_, destroying_s in results)


class _Idle(dist.ProcessGroup):
    """A communicator that does nothing: gloo would take addresses that an earlier group left for its own."""


dist.Backend.register_backend("idle", lambda _store, rank, size, _timeout: _Idle(rank, size), devices=["cpu"])


def _live_again(rank: int, world_size: int, how: str) -> list[Left]:
    lefts = []
    for life in range(3):
        store = dist.PrefixStore(how, here().new_store())
        dist.init_process_group("idle", store=store, rank=rank, world_size=world_size)
        following = collective_scope(name="next", timeout=_LONG_S)
        if how == "one alone" and life == 2:
            # Rank 0 never had a scope before, and comes first.
            if rank == 0:
                _announce_at_barrier("rank 0 waits", following)
            else:
                here().wait_for("rank 0 waits")
        if how == "good before" or life == 2:
            lefts.append(_leave(following))
            here().announce(f"rank {rank} waits")  # not seen there, if it did not have to wait
        if how == "failed":
            failing = collective_scope(name="failing", timeout=_LONG_S)
            _leave(failing, lambda _: _raise(ValueError(f"rank {rank}")) if rank == 1 else None)
        if rank == 1 or how == "all timed out":
            _leave(collective_scope(name=f"only {rank}", timeout=0.2))
        dist.destroy_process_group()
        _meet(f"life {life}")
    return lefts


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("failed", id="failed"),
        pytest.param("all timed out", id="mismatched"),
        pytest.param("good before", id="timed-out-after-a-good-one"),
        pytest.param("one alone", id="one-rank-alone"),
    ],
)
def test_group_made_again_on_a_store_with_old_keys_works(how: str, run: Run) -> None:
    """Keys that failed rounds of an earlier group left in the store do not reach the next one."""
    results = run("agent", _live_again, how)

    assert results[0]
    for lefts in results:
        assert [""] * len(lefts) == [left.surfaced for left in lefts]
        assert all(left.is_ok for left in lefts)


def _make_again_on_a_port(rank: int, world_size: int) -> list[str]:
    port = here().directory / "port"
    if rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port.write_text(str(listener.getsockname()[1]))
        here().announce("port")
    here().wait_for("port")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port.read_text(),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    lefts = []
    for life in range(4):
        dist.init_process_group("gloo")
        scope = collective_scope(name="short", timeout=_LONG_S)
        lefts.append(_leave(scope, lambda _: dist.all_reduce(torch.ones(1))).surfaced)
        dist.destroy_process_group()
        gc.collect()
        # torch itself does not stand a rank that connects while another one is still at the old server.
        _meet(f"life {life}")
    return lefts


def test_group_destroyed_and_made_again_on_the_same_port_works(run: Run) -> None:
    """Once a group is destroyed, the library keeps no server on its port; the next group finds that free, and no old keys."""
    assert [[""] * 4] * 2 == run("own groups", _make_again_on_a_port)


def _enter_many_subgroups(rank: int, world_size: int) -> list[float]:  # noqa: ARG001  (given to every function of a rank)
    groups = [dist.new_group([1, 2], backend="idle") for _ in range(50)]
    took = []
    for group in groups if rank in (1, 2) else []:
        since = time.monotonic()
        with collective_scope(group, name="first", timeout=_LONG_S):
            pass
        took.append(time.monotonic() - since)
    return took


def test_first_scope_of_each_of_fifty_subgroups_without_rank_0_costs_milliseconds(run: Run) -> None:
    """A group in which no rank serves the store is as fast to begin with as any other: less than 20 ms."""
    _, first, second, _ = run("4", _enter_many_subgroups)

    print("milliseconds:", [round(1000 * each, 1) for each in sorted((*first, *second))])
    assert 50 == len(first) == len(second)
    assert max(sum(first), sum(second)) < 50 * 0.02 + 5


class _Coordinator:
    def __init__(self, group: Any) -> None:
        self.cpu_group = self.device_group = group
        self.rank_in_group = group.rank()


def _use_other_groups(rank: int, world_size: int) -> dict[str, bool]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[rank // 2]
    groups: dict[str, Any] = {
        "mesh of one dimension": mesh["inner"],
        "the other dimension": mesh["outer"],
        "flattened mesh": mesh._flatten("all"),  # noqa: SLF001  (a message recommends it)
        "coordinator": _Coordinator(pair),
        "function": lambda: pair,
        "function with a mesh": lambda: mesh["inner"],
        "group": pair,
    }
    results = {}
    for name, group in groups.items():
        left = _leave(collective_scope(group, name=name, timeout=10.0))
        size = 4 if name == "flattened mesh" else 2
        results[name] = left.is_ok and left.verdict is not None and left.verdict.world_size == size
    left = _leave(collective_scope(mesh, name="mesh of two dimensions"))
    results["refused"] = left.surfaced == "ValueError" and "one dimension" in left.text and not left.entered
    left = _leave(collective_scope("group", name="text"))  # type: ignore[arg-type]  # wrong on purpose
    results["text"] = left.surfaced == "TypeError" and "ProcessGroup" in left.text and not left.entered
    results["next"] = world_size == 4 and _leave_next().is_ok
    return results


def test_group_of_every_accepted_kind_has_its_barrier(run: Run) -> None:
    """Meshes, coordinators, groups, and functions that return them, are accepted; others are refused."""
    for results in run("4", _use_other_groups):
        assert dict.fromkeys(results, True) == results


# Leftovers


def _underlying(store: dist.Store) -> dist.Store:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _settled_keys(store: dist.Store, expected: list[str] | None = None) -> list[str]:
    """Return the keys when many looks in a row have found no other number; in time, as many as *expected*."""
    keys, same, until = store.list_keys(), 0, time.monotonic() + 20.0
    while same < 35 if expected is None else len(keys) != len(expected) and time.monotonic() < until:
        time.sleep(0.02)  # Keys are removed when there is nothing else to do.
        now = store.list_keys()
        same, keys = same + 1 if len(now) == len(keys) else 0, now
    return sorted(keys)


@contextlib.contextmanager
def _short_news() -> Iterator[None]:
    """Have what is written for the control threads of all ranks removed soon."""
    before, control.NEWS_S = control.NEWS_S, 0.25
    try:
        yield
    finally:
        control.NEWS_S = before


def _repeat(rank: int, world_size: int, count: int, how: str) -> tuple[list[str], list[str], int]:
    with _short_news():
        return _repeat_scopes(rank, world_size, count, how)


def _repeat_scopes(rank: int, world_size: int, count: int, how: str) -> tuple[list[str], list[str], int]:  # noqa: ARG001  (given to every function of a rank)
    logging.disable(logging.CRITICAL)

    def go(times: int) -> None:
        for i in range(times):
            with (
                contextlib.suppress(ValueError, PeerFailedError),
                collective_scope(name="repeated", timeout=20.0) as scope,
            ):
                scope.cleanup(int)
                if i % 2:
                    scope.collective_cleanup(int)
                if how != "healthy" and i % 3 == rank:
                    _raise(ValueError("all the time"))
                if how == "failing around it":
                    with collective_scope(name="nested", timeout=20.0):
                        pass

    group = dist.group.WORLD
    assert group is not None
    store = _underlying(group.get_group_store())
    go(6)
    _meet("warm")
    before = _settled_keys(store) if rank == 0 else []
    _meet("counted")
    resident = _resident_bytes()
    go(count)
    grown = _resident_bytes() - resident
    _meet("done")
    after = _settled_keys(store, before) if rank == 0 else []
    logging.disable(logging.NOTSET)
    _meet("over")
    return before, after, grown


@pytest.mark.parametrize(
    ("pool", "count", "how"),
    [
        pytest.param("2", 1_000, "healthy", id="1000"),
        pytest.param("2", 60, "failing", id="60-failing"),
        pytest.param("2", 12, "failing around it", id="12-failing-around-it"),
        pytest.param("process", 12, "failing around it", id="12-failing-around-it-elsewhere"),
        pytest.param("file", 12, "failing around it", id="12-failing-around-it-on-a-file"),
        pytest.param("file", 24, "healthy", id="24-on-a-file"),
        pytest.param("file", 24, "failing", id="24-failing-on-a-file"),
        pytest.param("2", 100_000, "healthy", id="100000", marks=pytest.mark.long),
    ],
)
def test_store_after_many_scopes_holds_as_many_keys_as_before(pool: str, count: int, how: str, run: Run) -> None:
    """Scopes leave no keys behind, and no memory."""
    results = run(pool, _repeat, count, how, timeout=600.0)

    before, after, _ = results[0]
    more, fewer = set(after) - set(before), set(before) - set(after)
    assert len(more) == len(fewer), (more, fewer)
    assert all(grown < 8_000_000 for _, _, grown in results)


def _leave_nothing(rank: int, world_size: int) -> tuple[set[str], set[str]]:
    store = here().new_store()
    assert isinstance(store, dist.TCPStore)
    view = dist.PrefixStore("left behind", store)
    _meet("before")
    before = set(store.list_keys())
    _meet("counted")
    dist.init_process_group("idle", store=view, rank=rank, world_size=world_size)
    part = dist.new_group([0, 1], backend="idle")
    for group in (None, part):
        for how in ("healthy", "failing", "nested", "timed out"):
            scope = collective_scope(group, name=how, timeout=0.2 if how == "timed out" else _LONG_S)
            _leave(scope, partial(_do_one_thing, group, how, rank))
            here().announce(f"{how} {rank} {group is None}")
        _leave_next(group)
    _meet("through")
    del group, part, scope
    dist.destroy_process_group()
    gc.collect()
    _meet("destroyed")
    left: set[str] = set()

    def is_gone() -> bool:
        nonlocal left
        left = {key for key in set(store.list_keys()) - before if not key.startswith("left behind/store_based_barrier")}
        return left <= {"collective_scope/news"}

    wait_until(is_gone)
    _meet("seen")
    return before, left


def _do_one_thing(group: Any, how: str, rank: int, scope: CollectiveScope) -> None:
    scope.collective_cleanup(int)
    if how == "nested":
        _leave(collective_scope(group, name="inner", timeout=_LONG_S))
    if how == "failing" and rank == 1:
        _raise(ValueError("body"))
    if how == "timed out" and rank == 1:
        here().wait_for(f"{how} 0 {group is None}")


def test_store_after_its_groups_are_destroyed_holds_no_key_of_theirs(pools: Callable[[str], RankPool]) -> None:
    """A group leaves only the two counters that the next one goes on with, whatever happened in its scopes."""
    for _, left in values(pools("agent").run(_leave_nothing)):
        assert left <= {"collective_scope/news"}


def _miss_many(rank: int, world_size: int, count: int) -> tuple[list[str], list[str]]:
    with _short_news():
        return _miss_scopes(rank, world_size, count)


def _miss_scopes(rank: int, world_size: int, count: int) -> tuple[list[str], list[str]]:  # noqa: ARG001  (given to every function of a rank)
    group = dist.group.WORLD
    assert group is not None
    store = _underlying(group.get_group_store())

    def go(times: int, label: str) -> None:
        for i in range(times):
            stay = partial(here().wait_for, f"{label} {i} 0") if rank == 1 else int
            scope = collective_scope(name="late", timeout=0.05)
            _leave(scope, partial(_call, stay))
            here().announce(f"{label} {i} {rank}")
            _leave_next()

    go(2, "warm")
    _meet("warm")
    before = _settled_keys(store) if rank == 0 else []
    _meet("counted")
    go(count, "count")
    _meet("done")
    after = _settled_keys(store, before) if rank == 0 else []
    _meet("over")
    return before, after


def test_store_after_timeouts_holds_as_many_keys_as_before(run: Run) -> None:
    """The keys of a round that timed out go when the straggler has been there."""
    (before, after), _ = run("2", _miss_many, 5)

    assert len(before) == len(after), (before, after)


def _be_quiet(rank: int, world_size: int) -> None:  # noqa: ARG001  (given to every function of a rank)
    for _ in range(20):
        with collective_scope(name="quiet", timeout=20.0) as scope:
            scope.cleanup(int)
            scope.collective_cleanup(int)
    # Longer than the second to which a FileStore rounds; the wait itself is the point.
    long_s = 1.5 if here().store == "file" else 0.3
    with collective_scope(name="waiting", timeout=20.0), contextlib.suppress(TimeoutError):
        if rank == 1:
            here().wait_for("never", long_s)
    _leave(collective_scope(name="timed out", timeout=0.3), lambda _: here().wait_for("rank 0 left") if rank else None)
    here().announce(f"rank {rank} left")
    _leave_next()


@pytest.mark.parametrize("pool", ["2", "file", "process"])
def test_streams_of_healthy_waiting_and_timed_out_ranks_stay_empty(pool: str, pools: Callable[[str], RankPool]) -> None:
    """Neither torch nor the library writes a line where nothing failed in a body or a cleanup."""
    results = pools(pool).run(_be_quiet, timeout=30.0)

    values(results)
    assert [("", "")] * 2 == [(result.stdout, result.stderr) for result in results]


def _host_of_rank_0(rank: int, number: int = 0) -> dist.TCPStore:
    """Return a store that lives in rank 0 as long as it is used there."""
    port = here().directory / f"port-{number}"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.write_text(str(store.port))
        here().announce(f"port {number}")
        return store
    here().wait_for(f"port {number}")
    return dist.TCPStore("127.0.0.1", int(port.read_text()), wait_for_workers=False)


def _live_shortly(rank: int, world_size: int, last: int | None) -> None:
    for life in range(5):
        store = _host_of_rank_0(rank, life)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        del store
        for _ in range(100):
            with collective_scope(name="short", timeout=_LONG_S):
                pass
        if rank == last:
            here().wait_for(f"destroyed {life}")
        if rank == 1 - (last or 0):
            # Destroying takes as long as the other one does something with the store.
            here().announce(f"destroyed {life}")
        dist.destroy_process_group()


@pytest.mark.parametrize("last", [None, 0, 1])
def test_groups_destroyed_after_scopes_without_a_pause_leave_no_line(
    last: int | None, pools: Callable[[str], RankPool]
) -> None:
    """No thread speaks to a store that is going, whichever rank goes first, so torch has nothing to print."""
    results = pools("own groups").run(_live_shortly, last)

    values(results)
    assert [("", "")] * 2 == [(result.stdout, result.stderr) for result in results]


# Programs

# Forked ranks need not import torch again: a repetition takes half a second, not five.
_FORKS = """
import gc, json, logging, os, signal, socket, sys, threading
import torch.distributed as dist
from collective_scope import collective_scope

hows = sys.argv[1:]
logging.disable(logging.CRITICAL)


def at_barrier():
    frame = sys._current_frames()[threading.main_thread().ident]
    return frame.f_code.co_filename.endswith(("agreement/barrier.py", "agreement/store_thread.py"))


def interrupt_at_barrier():
    seen = 0
    while seen < 5:
        seen = seen + 1 if at_barrier() else 0
        threading.Event().wait(0.002)
    os.kill(os.getpid(), signal.SIGINT)


def be(rank, port, fd):
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
    else:
        store = dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    failing = rank == 1
    if how == "interrupted" and failing:
        threading.Thread(target=interrupt_at_barrier, daemon=True).start()
    with collective_scope(name="last", timeout=20.0, failure_timeout=5.0 if how != "missed" else 0.2):
        if how == "exits" and failing:
            sys.exit(3)
        if how == "interrupts" and failing:
            raise KeyboardInterrupt
        if how == "raises" and failing:
            raise ValueError("body")
        if how == "interrupted" and not failing:
            os.read(gate[0], 1)
    if how == "leaves" and rank == 0:
        os._exit(0)
    if how == "destroys":
        dist.destroy_process_group()


gc.collect()
gc.freeze()
codes = []
for how in hows:
    gate = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pids = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                sys.stderr = open(os.devnull, "w")
                os.close(gate[1])
                be(rank, listener.getsockname()[1], os.dup(listener.fileno()))
                sys.exit(0)
            pids.append(pid)
    ends = {}
    while len(ends) < 2:
        pid, status = os.wait()
        ends[pids.index(pid)] = os.waitstatus_to_exitcode(status)
        if len(ends) == 1:
            os.close(gate[1])
            os.close(gate[0])
    codes.append([ends[0], ends[1]])
print(json.dumps(codes))
"""


_CODES = {
    "goes": [0, 0],
    "destroys": [0, 0],
    "exits": [1, 3],
    "interrupts": [1, -signal.SIGINT],
    "interrupted": [1, -signal.SIGINT],
    "raises": [1, 1],
}


def _fork(tmp_path: Path, hows: list[str]) -> dict[str, list[list[int]]]:
    """Have pairs of ranks end in each of *hows*; return their exit codes."""
    script = tmp_path / "forks.py"
    script.write_text(_FORKS)
    result = run_script(script, *hows, timeout=60.0 + 5.0 * len(hows))
    codes: dict[str, list[list[int]]] = {}
    for how, pair in zip(hows, json.loads(result.stdout), strict=True):
        codes.setdefault(how, []).append(pair)
    return codes


@pytest.fixture(scope="module", name="codes")
def _codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    return _fork(tmp_path_factory.mktemp("forks"), ["leaves"] * 3 + list(_CODES))


@pytest.mark.parametrize("how", _CODES)
def test_process_that_ends_right_after_a_scope_has_its_own_exit_code(
    how: str, codes: dict[str, list[list[int]]]
) -> None:
    """The exit code is the program's own, whatever is still to be done for the peers."""
    assert [_CODES[how]] == codes[how]


def test_process_whose_peer_takes_the_store_along_ends_with_a_code_of_its_own(
    codes: dict[str, list[list[int]]],
) -> None:
    """After ``os._exit`` of the rank that serves the store, its peer has left the scope, or is told that the store is gone."""
    assert 3 == len(codes["leaves"])
    assert all(pair in ([0, 0], [0, 1]) for pair in codes["leaves"])


@pytest.mark.long
@pytest.mark.parametrize("how", _CODES)
def test_process_that_ends_right_after_a_scope_keeps_its_exit_code_many_times(how: str, tmp_path: Path) -> None:
    """The same, a thousand times."""
    (codes,) = _fork(tmp_path, [how] * 1000).values()

    assert [_CODES[how]] * 1000 == codes


_SPAWN = r"""
import os
import torch.distributed as dist
import torch.multiprocessing as mp
from collective_scope import collective_scope, current_scope


@collective_scope(timeout=20.0)
def checked(rank, fails):
    current_scope().cleanup(os.write, 1, f"cleanup of {rank}\n".encode())
    if fails and rank == 1:
        raise ValueError("body of rank 1")
    return rank


@collective_scope(timeout=20.0)
def worker(rank, port):
    # The group is made in the body: this scope finds it when it ends.
    store = dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    current_scope().after_barrier(dist.destroy_process_group)
    assert checked(rank, fails=False) == rank
    checked(rank, fails=True)


if __name__ == "__main__":
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(worker, args=(server.port,), nprocs=2)
"""


def test_decorator_under_spawn_works_and_fails_the_program(tmp_path: Path) -> None:
    """Decorated functions can be spawned; a failure is the body's own, and ends the program."""
    script = tmp_path / "spawned.py"
    script.write_text(_SPAWN)
    result = run_script(script, timeout=60.0, expect_exit=1)

    assert ["cleanup of 0"] * 2 + ["cleanup of 1"] * 2 == sorted(result.stdout.splitlines())
    assert "ValueError: body of rank 1" in result.stderr
    assert "process 1 terminated" in result.stderr.lower() or "PeerFailedError" in result.stderr
