"""What happens when a scope has a deadline, and what peers and the system say of a process."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from collective_scope import (
    BarrierTimeoutError,
    _barrier,
    _deadline,
    _groups,
    _process,
    _protocol,
    _watcher,
    collective_scope,
)
from collective_scope._deadline import EXIT_CODE
from collective_scope._lookout import Lookout
from collective_scope._outcome import Record
from collective_scope._plain_barrier import PlainBarrier
from collective_scope._process import NOBODY, Process
from collective_scope._protocol import Protocol, Wait
from tests.ranks import run_ranks
from tests.stores import PATIENCE_S, HookedStore, barrier_of, wait_until


def _sleep_in_rank_1(rank: int, _world_size: int) -> tuple[str, float]:
    logging.basicConfig()
    with collective_scope(name="healthy", deadline=60):
        pass
    start = time.monotonic()
    try:
        with collective_scope(name="late", deadline=1.5):
            if rank == 1:
                time.sleep(60)
    except BarrierTimeoutError as error:
        return str(error), time.monotonic() - start
    return "", 0.0


def test_deadline_ends_the_stuck_process_with_its_stacks_and_bounds_its_peer() -> None:
    """The stuck rank says where everybody is, shows its stacks and exits with 124; its peer raises in time."""
    waiting, stuck = run_ranks(2, _sleep_in_rank_1, host="parent", expect_exit={1: EXIT_CODE}, timeout=60)

    text, took = waiting.unwrap()
    assert text.startswith("rank 1 of 2 missing at the exit of scope 'late' after 1.5 s")
    assert took < 3.5
    assert "scope 'late' was not left within its deadline of 1.5 s; this rank: " in stuck.stderr
    assert "in _sleep_in_rank_1" in stuck.stderr


def test_survey_without_an_answer_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A store that hangs does not keep a rank from saying what it knows itself."""
    thawed = threading.Event()
    barrier = barrier_of(HookedStore(dist.HashStore(), lambda *_: thawed.wait(PATIENCE_S)), 0, 2)

    assert barrier.survey(Record(0, "exit", "scope", 0)) == {}
    thawed.set()

    assert "rank 0 cannot ask its peers where they are: the store did not answer" in caplog.text


def test_survey_without_a_store_has_nobody_to_ask() -> None:
    """A group that has only a barrier knows of no other rank."""

    class Communicator:
        def Barrier(self) -> None:  # noqa: N802  (mpi4py's name)
            """Have no peers."""

    assert PlainBarrier(Communicator()).survey(Record(0, "exit", "scope", 0)) == {}


def test_rank_on_another_machine_without_a_heartbeat_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot tell, a heartbeat that has stopped does, worded as what it is."""
    store = dist.HashStore()
    far, here = barrier_of(store, 1, 2), barrier_of(store, 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(_protocol, "me", lambda: Process("far", 7, 7, "another machine"))
        far.greet()
    verdict = here.arrive(
        Record(0, "exit", "scope", 0), timeout=PATIENCE_S, failure_timeout=PATIENCE_S, heartbeat_timeout=0.5
    )

    assert (1,) == verdict.lost
    assert (NOBODY.pid, "") != (verdict.where[1].process.pid, verdict.where[1].process.host)
    assert verdict.where[1].silence >= 0.5


def test_warning_of_a_store_that_answers_is_left_to_the_lookout(caplog: pytest.LogCaptureFixture) -> None:
    """As long as the store answers, nobody says that it does not."""
    barrier = barrier_of(dist.HashStore(), 0, 2)
    lookout = Lookout(Protocol(0, 2, None), Record(0, "exit", "scope", 0), Wait(), 0.0, 0.0, 1.0, 1.0, 1.0)
    lookout.looked_at = 10.0
    barrier._warn_if_blind(lookout, 10.0 + _barrier.GRACE_S / 2)  # noqa: SLF001

    assert caplog.text == ""


def test_place_without_a_frame_of_the_main_thread_still_says_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that gives something else for a frame does not end the thread that answers."""
    frames: dict[int, object] = {**sys._current_frames(), threading.main_thread().ident or 0: 0.0}  # noqa: SLF001  (documented)
    monkeypatch.setattr(sys, "_current_frames", lambda: frames)
    place = _watcher.here()

    assert "" == place.frames
    assert "outside of any scope" == place.phase or place.phase.startswith("after ")


def test_watcher_whose_store_has_gone_makes_no_more_calls() -> None:
    """Once the process that hosts the store has ended, the watcher ends without touching the store."""
    calls: list[str] = []
    store = HookedStore(dist.HashStore(), lambda method, _: calls.append(method))
    ended = Process(_process.me().host, 2**22 + 1, 1, _process.me().machine)
    _watcher._answer(store, threading.Event(), [ended], is_server=False)  # noqa: SLF001

    assert calls == ["compare_set", "add"]  # on coming


def test_process_on_a_system_without_proc_is_seen_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system tells nothing, nothing is claimed."""

    def refuse(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    process = _process._of.__wrapped__(os.getpid())  # noqa: SLF001

    assert not process.is_here
    assert process.state() == ""
    assert not _process.serves_store(1)


def test_group_barrier_of_a_group_of_one_opens() -> None:
    """The communicator's own barrier is started, not waited for, and tells when it has opened."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        assert wait_until(_groups.group_barrier(group))
    finally:
        dist.destroy_process_group()


def test_log_handler_that_raises_is_reported_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A broken log handler costs neither the cleanups nor the body's error."""

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            msg = f"cannot write {record.levelname}"
            raise OSError(msg)

    handler, calls = Broken(), []
    logging.getLogger("collective_scope").addHandler(handler)
    try:
        with pytest.raises(LookupError, match=r"^body$"), collective_scope(cleanups=[lambda: calls.append("cleanup")]):
            raise LookupError("body")  # noqa: EM101
    finally:
        logging.getLogger("collective_scope").removeHandler(handler)

    assert ["cleanup"] == calls
    assert "OSError: cannot write ERROR" in capsys.readouterr().err


@pytest.mark.parametrize("leaves", ["the-barrier", "the-scope"])
def test_deadline_of_a_rank_at_the_barrier_lets_it_leave(leaves: str) -> None:
    """A rank that waits for its peers at its deadline is not stuck: its process lives on."""
    left, asked = threading.Event(), threading.Event()
    waiting = iter([True, True, True, leaves == "the-barrier"])

    def is_waiting() -> bool:
        answer = next(waiting, False)
        if not answer or (leaves == "the-barrier" and asked.is_set()):
            left.set()
        asked.set()
        return answer

    # It would end this process otherwise.
    _deadline._expire(left, 0.01, is_waiting, lambda: "where everybody is")  # noqa: SLF001

    assert left.is_set()


def test_deadline_of_a_rank_that_leaves_meanwhile_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Who has left the scope when it is known where everybody is has an error that says so, or was in time."""
    left = threading.Event()

    def explain() -> str:
        left.set()
        return "where everybody is"

    _deadline._expire(left, 0.01, lambda: True, explain)  # noqa: SLF001  (it would end this process otherwise)

    assert [] == caplog.messages


def test_process_whose_sockets_cannot_be_seen_serves_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``/proc/net`` is hidden, nobody is taken for the host of a store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    read_text = Path.read_text

    def hide(path: Path) -> str:
        if "net" in path.parts:
            raise FileNotFoundError
        return read_text(path)

    assert _process.serves_store(server.port)

    monkeypatch.setattr(Path, "read_text", hide)

    assert not _process.serves_store(server.port)
