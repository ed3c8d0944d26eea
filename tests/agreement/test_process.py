"""The system's account of a process, and claims never made of one."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import torch.distributed as dist

from collective_scope.agreement import process
from collective_scope.agreement.process import NOBODY, Place, Process, has_ended, me
from collective_scope.agreement.sockets import serves_store
from tests.forks import in_a_fork
from tests.stores import wait_until


@contextlib.contextmanager
def _child(*command: str | Path) -> Iterator[tuple[subprocess.Popen[bytes], Process]]:
    """Run a program that does nothing until it is killed; yield it, and what this process takes it for."""
    with subprocess.Popen(command or ("sleep", "600")) as popen:
        try:
            start = int(Path(f"/proc/{popen.pid}/stat").read_text().rpartition(")")[2].split()[19])
            yield popen, attrs.evolve(me(), pid=popen.pid, start=start)
        finally:
            popen.kill()


@contextlib.contextmanager
def _no_file_descriptors_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_process_is_the_same_as_long_as_it_runs_and_another_onein_a_fork() -> None:
    """A process knows itself; a forked child is another process, with a key of its own."""
    mine = me()

    assert mine == me()
    assert (os.getpid(), True, False) == (mine.pid, mine.is_here, mine.has_ended)
    assert f"{mine.host} pid {mine.pid}" == str(mine)
    assert in_a_fork(lambda: me().key) not in ("", mine.key)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        pytest.param(signal.SIGKILL, "exited (killed by SIGKILL)", id="named"),
        pytest.param(signal.SIGRTMIN + 6, f"exited (killed by signal {signal.SIGRTMIN + 6})", id="real-time"),
    ],
)
def test_process_state_follows_it_to_its_end(number: int, expected: str) -> None:
    """A process runs, is stopped, is killed by a signal that may have no name, and is gone."""
    with _child() as (popen, process_):
        assert wait_until(lambda: process_.state() == "sleeping")
        # Not send_signal(), which asks for the exit code of a process that has ended: then it is gone.
        os.kill(popen.pid, signal.SIGSTOP)
        assert wait_until(lambda: process_.state() == "stopped")
        assert not process_.has_ended
        os.kill(popen.pid, number)
        os.kill(popen.pid, signal.SIGCONT)
        assert wait_until(lambda: process_.state() == expected)
        assert process_.has_ended
        popen.wait()

        assert ("gone", True) == (process_.state(), process_.has_ended)


def test_process_that_exits_shows_its_code() -> None:
    """An exit code can be seen until the parent of the process asks for it."""
    with _child("sh", "-c", "read line; exit 7") as (_, process_):
        assert wait_until(lambda: process_.state() == "exited (exit code 7)")


def test_process_whose_name_looks_like_its_state_is_seen_as_it_is(tmp_path: Path) -> None:
    """A program may be called anything, parentheses and letters of states included."""
    path = tmp_path / "a) Z 1 (b"
    shutil.copy(shutil.which("sleep") or "", path)
    with _child(path, "600") as (_, process_):
        assert wait_until(lambda: process_.state() == "sleeping")


def test_process_number_that_another_process_has_got_is_gone() -> None:
    """A later process with the same number is not taken for the one that had it."""
    assert "gone" == attrs.evolve(me(), start=me().start - 1).state()


def test_process_that_cannot_be_looked_at_is_not_called_gone() -> None:
    """Without a file descriptor left, a process that runs is unknown; one that does not exist is gone all the same."""
    mine, ended = me(), attrs.evolve(me(), pid=2**22 + 1)
    with _no_file_descriptors_left():
        assert ("", "gone") == (mine.state(), ended.state())


@pytest.mark.parametrize("other", [NOBODY, attrs.evolve(me(), machine="another", pid=2**22 + 1)], ids=["nobody", "far"])
def test_process_elsewhere_is_never_claimed_to_be_anything(other: Process) -> None:
    """Of a process on another machine the system says nothing."""
    assert (False, "", False) == (other.is_here, other.state(), other.has_ended)


def test_process_on_a_system_without_proc_is_seen_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system tells nothing, nothing is claimed."""

    def refuse(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    mine = process._of.__wrapped__(os.getpid())  # noqa: SLF001  (looked into on purpose)

    assert not mine.is_here
    assert mine.state() == ""
    assert not serves_store(1)


@pytest.mark.parametrize(
    ("state", "expected"),
    [("", False), ("running", False), ("stopped", False), ("gone", True), ("exited (exit code 1)", True)],
)
def test_place_of_a_process_that_may_run_has_not_ended(state: str, *, expected: bool) -> None:
    """Only a process that is known to have ended has."""
    assert [expected] * 2 == [has_ended(state), Place(NOBODY, state).has_ended]


def test_store_is_served_by_the_process_that_has_its_thread_and_no_other() -> None:
    """The server is told from its clients, and from a forked child, which has its sockets and not its thread."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False)

    assert server.port == client.port
    assert serves_store(server.port)
    assert not serves_store(1)
    assert "False" == in_a_fork(lambda: serves_store(server.port))


def test_process_whose_threads_cannot_be_seen_serves_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the names of threads are hidden, no process is taken for the host of a store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    read_text = Path.read_text

    def hide(path: Path) -> str:
        if "comm" in path.parts:
            raise FileNotFoundError
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", hide)

    assert not serves_store(server.port)
