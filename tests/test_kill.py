"""The last rung: a process that is stuck for too long is ended, says where it was, and tells its peers."""

from __future__ import annotations

import ctypes
import io
import logging
import re
import sys
import threading
import time

import pytest
import torch.distributed as dist

from collective_scope import BarrierTimeoutError, CollectiveScopeError, PeerLostError, Subtests, _kill, collective_scope
from collective_scope._kill import EXIT_CODE, stacks
from collective_scope.agreement.control import SURVEY_S
from tests.ranks import RankResult, here, process_state, run_ranks
from tests.stores import PATIENCE_S


_STUCK_S = 60.0
_SHORTLY_HELD_S = 2.0


# In processes


def _get_stuck(rank: int, _world_size: int) -> tuple[str, str, float]:
    logging.basicConfig()
    with collective_scope(name="healthy", kill_after=_STUCK_S):
        pass
    start = time.monotonic()
    try:
        # The one that waits is out of patience well before the other one is ended.
        with collective_scope(name="late", kill_after=0.8 if rank == 0 else 2.5):
            if rank == 1:
                time.sleep(_STUCK_S)
    except CollectiveScopeError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", 0.0


def test_kill_after_ends_the_stuck_process_with_its_stacks_and_bounds_its_peer() -> None:
    """The stuck rank says where all ranks are, shows its stacks and exits with 124; its peer raises in time."""
    waiting, stuck = run_ranks(2, _get_stuck, host="parent", expect_exit={1: EXIT_CODE})

    kind, text, took = waiting.unwrap()
    assert BarrierTimeoutError.__name__ == kind
    assert text.startswith("rank 1 of 2 missing at the exit of scope 'late' after ")
    assert "in _get_stuck" in text
    assert took < 0.8 + 5
    assert "scope 'late' was not left within kill_after=2.5 s; this process is ended now" in stuck.stderr
    assert "rank 0: " in stuck.stderr
    assert "rank 1 (this one): " in stuck.stderr
    assert "Thread MainThread:" in stuck.stderr
    assert "Thread collective_scope-" not in stuck.stderr


def _work_until_it_is_gone(pid: int) -> None:
    while process_state(pid) not in {"gone", "Z"}:
        time.sleep(0.01)  # Not our child: nothing to wait on.


def _have_one_ended(rank: int, _world_size: int) -> tuple[str, str, float]:
    logging.basicConfig()
    sys.stderr = io.StringIO()  # as where it is captured
    if rank == 1:
        sys.stdout = None  # type: ignore[assignment]  # as some launchers leave it
    with collective_scope(name="healthy"):
        pass
    start = time.monotonic()
    try:
        with collective_scope(name="uneven", timeout=_STUCK_S, kill_after=1.0 if rank == 1 else None):
            if rank == 1:
                time.sleep(_STUCK_S)
            if rank == 2:
                _work_until_it_is_gone(here().pids[1])
    except CollectiveScopeError as error:
        return type(error).__name__, f"{error}\n{error.verdict.outcomes[1].traceback}", time.monotonic() - start
    return "", "", 0.0


def test_kill_after_surveys_ranks_at_work_and_waiting_and_tells_them() -> None:
    """The report is on the real stderr, with the lines where ranks at work are; each peer is told that this one was ended."""
    waiting, stuck, working = run_ranks(3, _have_one_ended, host="parent", expect_exit={1: EXIT_CODE})

    for peer in (waiting, working):
        kind, text, took = peer.unwrap()
        assert PeerLostError.__name__ == kind
        assert "rank 1 of 3 lost" in text.splitlines()[0]
        assert "not left within 1.0 s; its process was ended" in text
        assert "time.sleep(_STUCK_S)" in text.splitlines()[-1]
        assert took < 1.0 + SURVEY_S + 5
    report = stuck.stderr.split("kill_after=1.0 s", 1)[1]
    at_barrier, here_, at_work = (report.index(words) for words in ("rank 0: ", "rank 1 (this one): ", "rank 2: "))
    assert at_barrier < here_ < at_work
    assert "at the barrier of scope 'uneven'" in report[at_barrier:here_]
    assert "in the body of scope 'uneven'" in report[here_:at_work]
    assert "in _work_until_it_is_gone" in report[at_work:]


def _get_stuck_in_a_loop(rank: int, _world_size: int) -> None:
    group = dist.new_group([0, 1])
    with Subtests(group, kill_after=1.0, timeout=_STUCK_S) as subtests:
        with subtests.test("bad"):
            assert rank != 1, "the real bug"
        with subtests.test("stuck"):
            time.sleep(_STUCK_S)


def test_kill_after_in_a_loop_of_subtests_sums_up_what_was_found_before() -> None:
    """A process that is ended takes no result along, and says which subtest it was in."""
    first, _ = run_ranks(2, _get_stuck_in_a_loop, host="parent", expect_exit={0: EXIT_CODE, 1: EXIT_CODE})

    assert "FAILED bad" in first.stdout
    assert "rank 1, body: AssertionError: the real bug" in first.stdout
    assert "the loop ended in subtest 'stuck', which is not counted either: " in first.stdout
    assert "1 failed in " in first.stdout


def _hold_the_interpreter() -> None:
    # Unlike time.sleep(), a function of a PyDLL keeps the lock of the interpreter.
    ctypes.PyDLL(None).sleep(int(_STUCK_S))


def _get_stuck_in_one_way_of_three(rank: int, _world_size: int) -> None:
    logging.basicConfig()
    _kill.HELD_S, _kill.STACKS_S = _SHORTLY_HELD_S, 1.8  # writing them may take long on a busy machine
    if rank == 0:  # the inner scope ends it
        with collective_scope(name="outer", kill_after=_STUCK_S), collective_scope(name="inner", kill_after=0.2):
            time.sleep(_STUCK_S)
    if rank == 1:  # the outer scope does, after the inner one has been left
        with collective_scope(name="outer", kill_after=1.0):
            with collective_scope(name="inner", kill_after=_STUCK_S):
                sys.stderr.close()
            time.sleep(_STUCK_S)
    with collective_scope(name="held", kill_after=0.5), collective_scope(name="inner", kill_after=_STUCK_S):
        _hold_the_interpreter()


@pytest.fixture(scope="module", name="alone")
def _alone() -> tuple[RankResult, ...]:
    """Return what became of three processes without peers, each stuck in a way of its own."""
    expected = dict.fromkeys(range(3), EXIT_CODE)
    return run_ranks(3, _get_stuck_in_one_way_of_three, init=False, expect_exit=expected)


@pytest.mark.parametrize(
    ("rank", "scope", "seconds"), [pytest.param(0, "inner", 0.2, id="inner"), pytest.param(1, "outer", 1.0, id="outer")]
)
def test_kill_after_of_nested_scopes_counts_for_each(
    rank: int, scope: str, seconds: float, alone: tuple[RankResult, ...]
) -> None:
    """The scope whose time is up first ends the process, whatever the other's time is, also without sys.stderr."""
    assert EXIT_CODE == alone[rank].exit
    assert f"scope '{scope}' was not left within kill_after={seconds:.1f} s" in alone[rank].stderr
    assert "in _get_stuck_in_one_way_of_three" in alone[rank].stderr


def test_kill_after_ends_a_process_whose_interpreter_is_held(alone: tuple[RankResult, ...]) -> None:
    """Native code that keeps the interpreter's lock is ended too, with the same exit code and its stack."""
    assert EXIT_CODE == alone[2].exit
    assert "in _hold_the_interpreter" in alone[2].stderr
    assert alone[2].elapsed_s < 0.5 + _SHORTLY_HELD_S + 30  # the start of the process included


# In this process, which must survive it


@pytest.mark.parametrize("seconds", [1e10, 1e300])
def test_kill_after_of_centuries_is_as_good_as_none(seconds: float) -> None:
    """No limit is too long to be entered, and left."""
    with collective_scope(kill_after=seconds) as scope:
        pass

    assert scope.verdict is not None
    assert scope.verdict.ok


@pytest.mark.parametrize("leaves", ["the-barrier", "the-scope"])
def test_kill_after_of_a_rank_at_the_barrier_lets_it_leave(leaves: str) -> None:
    """A rank that waits for its peers when its time is up is not stuck: its process lives on."""
    left, asked = threading.Event(), threading.Event()
    waiting = iter([True, True, True, leaves == "the-barrier"])

    def is_waiting() -> bool:
        answer = next(waiting, False)
        if not answer or (leaves == "the-barrier" and asked.is_set()):
            left.set()
        asked.set()
        return answer

    # It would end this process otherwise.
    _kill._expire(left, 0.01, is_waiting, lambda: "where all ranks are")  # noqa: SLF001  (looked into on purpose)

    assert left.is_set()


def test_kill_after_of_a_rank_that_leaves_meanwhile_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """A rank that has left the scope when it is known where all are has an error that says so, or was in time."""
    left = threading.Event()

    def explain() -> str:
        left.set()
        return "where all ranks are"

    _kill._expire(left, 0.01, lambda: False, explain)  # noqa: SLF001  (it would end this process otherwise)

    assert ("", "") == capfd.readouterr()


def test_stacks_of_all_threads_are_the_users() -> None:
    """The last dump has each thread by its name, and none of this library's."""
    done = threading.Event()
    names = ("poller", "collective_scope-control")
    threads = [threading.Thread(target=done.wait, args=(PATIENCE_S,), name=name) for name in names]
    for thread in threads:
        thread.start()
    text = stacks()
    done.set()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert "Thread MainThread:" in text
    assert "in test_stacks_of_all_threads_are_the_users" in text
    assert not re.search(r"/(_pytest|pluggy)/", text), "what has called the test tells nothing of it"
    assert "Thread poller:" in text
    assert "Thread collective_scope-" not in text
