"""The harness keeps its own promises: deadlines, signals, stacks, nothing left over."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.ranks import (
    RankPool,
    RanksError,
    Sequencer,
    freeze,
    here,
    process_state,
    run_ranks,
    run_script,
    run_threads,
    run_torchrun,
    thaw,
    values,
)
from tests.stores import wait_until


class _TwoArgumentError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def _sum_of_ranks(rank: int, world_size: int) -> int:  # noqa: ARG001  (given to every function of a rank)
    tensor = torch.tensor(rank)
    dist.all_reduce(tensor)
    return int(tensor)


def _pid(rank: int, world_size: int) -> int:  # noqa: ARG001  (given to every function of a rank)
    return os.getpid()


def _sum_and_store(rank: int, world_size: int) -> tuple[int, str]:
    store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]  # it is there, or the test fails
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return _sum_of_ranks(rank, world_size), type(store).__name__


def _spin_on_one(rank: int, world_size: int) -> None:  # noqa: ARG001  (given to every function of a rank)
    print(f"this is rank {rank}", flush=True)
    if rank == 1:
        _spin()


def _spin() -> NoReturn:
    while True:
        pass


def _hold_the_gil(rank: int, world_size: int) -> None:  # noqa: ARG001  (given to every function of a rank)
    # One call into C that takes minutes and never lets go.
    pow(7, 10**9)


def _leave(rank: int, world_size: int, how: str) -> str:  # noqa: ARG001  (given to every function of a rank)
    if rank == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "exit":
            os._exit(3)
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
    return "through"


def _kill_peer(rank: int, world_size: int) -> None:  # noqa: ARG001  (given to every function of a rank)
    if rank == 0:
        here().wait_for("rank 1 is there")
        os.kill(here().pids[1], signal.SIGKILL)
    else:
        here().announce("rank 1 is there")
        here().wait_for("never")


def _raise(rank: int, world_size: int) -> None:  # noqa: ARG001  (given to every function of a rank)
    if rank == 1:
        error = _TwoArgumentError("two", "words")
        error.add_note("a note")
        raise error
    if rank == 0:
        raise SystemExit(5)


def _raise_group(rank: int, world_size: int) -> None:  # noqa: ARG001  (given to every function of a rank)
    msg = "both"
    raise ExceptionGroup(msg, [ValueError("one"), KeyError("two")])


def _interrupt_itself(rank: int, world_size: int) -> None:  # noqa: ARG001  (given to every function of a rank)
    os.kill(os.getpid(), signal.SIGINT)
    here().wait_for("never")


def _return_lock(rank: int, world_size: int) -> Any:  # noqa: ARG001  (given to every function of a rank)
    return threading.Lock()


class _UnloadableError(Exception):
    def __init__(self, *, word: str) -> None:
        super().__init__(word)


def _return_unloadable(rank: int, world_size: int) -> Any:  # noqa: ARG001  (given to every function of a rank)
    return _UnloadableError(word="w")


def _start_child(rank: int, world_size: int) -> int:  # noqa: ARG001  (given to every function of a rank)
    command = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
    return subprocess.Popen(command, start_new_session=True).pid


def _freeze_store(rank: int, world_size: int) -> tuple[str, bool]:  # noqa: ARG001  (given to every function of a rank)
    pid = here().store_pid
    assert pid is not None
    if rank == 0:
        freeze(pid)
        here().announce("frozen")
    here().wait_for("frozen")
    state = process_state(pid)
    here().announce(f"rank {rank} has looked")
    here().wait_for(f"rank {1 - rank} has looked")
    thaw(pid)
    store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]  # it is there, or the test fails
    return state, store.add("arrived", 1) > 0


def _meet_twice(rank: int, world_size: int) -> list[int]:
    sums = []
    for prefix in "ab":
        here().init_process_group(prefix)
        sums.append(_sum_of_ranks(rank, world_size))
        dist.destroy_process_group()
    return sums


def _write(rank: int, world_size: int, text: str) -> None:  # noqa: ARG001  (given to every function of a rank)
    print(f"{text} to stdout")
    print(f"{text} to stderr", file=sys.stderr)


def _is_alive(pid: int) -> bool:
    # Whether an orphan's remains are taken away is up to the machine.
    return process_state(pid) not in {"gone", "Z"}


@pytest.fixture(name="started")
def _started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the process ids of all ranks and servers, as they are started."""
    pids: list[int] = []
    start = ranks._Process.start  # noqa: SLF001 - to look over its shoulder

    def note(*args: Any) -> Any:
        process = start(*args)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(ranks._Process, "start", note)  # noqa: SLF001  (looked into on purpose)
    return pids


@pytest.mark.parametrize(
    ("store", "host", "name"),
    [
        ("tcp", "rank0", "TCPStore"),
        ("tcp", "parent", "TCPStore"),
        ("tcp", "process", "TCPStore"),
        ("file", "rank0", "FileStore"),
        ("env", "rank0", "TCPStore"),
        ("env", "parent", "TCPStore"),
    ],
)
def test_run_ranks_each_store_joins_all_ranks(store: Any, host: Any, name: str, started: list[int]) -> None:
    """All ranks meet in one group over the kind of store asked for."""
    results = run_ranks(2, _sum_and_store, store=store, host=host)

    assert [(1, name), (1, name)] == values(results)
    assert [0, 0] == [result.exit for result in results]
    assert not any(map(_is_alive, started))


def test_run_ranks_file_with_host_is_refused() -> None:
    """A host for a file is a mistake, and said to be one."""
    with pytest.raises(ValueError, match=r"^a file has no host \(got 'parent'\)$"):
        run_ranks(2, _pid, store="file", host="parent")


def test_run_ranks_without_init_lets_ranks_meet_themselves() -> None:
    """Without init=True, ranks can make and remake the group on the same store."""
    results = run_ranks(2, _meet_twice, init=False)

    assert [[1, 1], [1, 1]] == values(results)


def test_run_ranks_hung_rank_is_killed_in_time_and_shows_its_stack(
    started: list[int],
) -> None:
    """A rank that hangs is killed at the deadline, and the failure has its stack."""
    with pytest.raises(RanksError) as excinfo:
        run_ranks(2, _spin_on_one, timeout=1.0)
    text = str(excinfo.value)

    assert text.startswith("not done with _spin_on_one() after 1.0 s: rank-1;")
    assert "in _spin\n" in text
    assert "killed by SIGKILL" in text
    assert "this is rank 0" in text
    assert "this is rank 1" in text
    assert not any(map(_is_alive, started))


def test_run_ranks_rank_holding_the_gil_is_killed_and_shows_its_stack(
    started: list[int],
) -> None:
    """A rank that never releases the GIL shows its stack and is killed as well."""
    with pytest.raises(RanksError, match="in _hold_the_gil\n"):
        run_ranks(1, _hold_the_gil, init=False, timeout=1.0)

    assert not any(map(_is_alive, started))


def test_run_ranks_stopped_rank_is_killed_and_shows_its_stack(
    started: list[int],
) -> None:
    """A stopped rank is reported with its state and its stack, and killed."""
    with pytest.raises(RanksError) as excinfo:
        run_ranks(2, _leave, "stop", init=False, timeout=1.0)
    text = str(excinfo.value)

    assert "'rank-1': 'T'" in text
    assert "in _leave\n" in text
    assert not any(map(_is_alive, started))


def test_run_ranks_abandoned_rank_is_killed_without_a_wait(
    started: list[int],
) -> None:
    """A rank that the test gives up is killed once the others are through."""
    begun = time.monotonic()
    results = run_ranks(2, _leave, "stop", init=False, timeout=600.0, abandon={1})

    assert "through" == results[0].unwrap()
    assert (0, -signal.SIGKILL) == (results[0].exit, results[1].exit)
    assert time.monotonic() - begun < 300.0
    assert not any(map(_is_alive, started))


@pytest.mark.parametrize(
    ("how", "code"),
    [
        pytest.param("kill", -signal.SIGKILL, id="killed"),
        pytest.param("exit", 3, id="os-exit"),
    ],
)
def test_run_ranks_rank_that_ends_early_is_reported_with_its_end(how: str, code: int) -> None:
    """A rank that was killed, or left by os._exit(), is reported with how it ended."""
    results = run_ranks(2, _leave, how, init=False, expect_exit={1: code})

    assert [0, code] == [result.exit for result in results]
    assert (True, False) == (results[0].returned, results[1].returned)
    with pytest.raises(RanksError, match=r"^rank 1, pid \d+: said nothing"):
        results[1].unwrap()


def test_run_ranks_rank_killed_by_a_peer_is_reported_with_its_signal() -> None:
    """Ranks know the process ids of their peers and can wait for each other."""
    results = run_ranks(2, _kill_peer, expect_exit={1: -signal.SIGKILL})

    assert -signal.SIGKILL == results[1].exit


def test_run_ranks_unexpected_end_fails() -> None:
    """A rank that ends in a way the test did not expect fails it."""
    with pytest.raises(RanksError, match=r"^rank 1: exit code 3, expected: exit code"):
        run_ranks(2, _leave, "exit", init=False)


def test_run_ranks_raised_error_arrives_as_text() -> None:
    """An error of a rank arrives with type, message, notes and traceback."""
    results = run_ranks(3, _raise, init=False)
    error = results[1].error

    assert error is not None
    assert ("_TwoArgumentError", "tests.test_ranks", "two words", ("a note",)) == (
        error.type_name,
        error.module,
        error.message,
        error.notes,
    )
    assert "raise error" in error.text
    assert results[0].error is not None
    assert ("SystemExit", "5") == (results[0].error.type_name, results[0].error.message)
    assert results[2].returned
    with pytest.raises(RanksError, match="two words"):
        values(results[1:])


def test_pool_exception_group_arrives_with_its_members(
    rank_pools: Callable[[int], RankPool],
) -> None:
    """The members of an exception group are described one by one."""
    (result, _) = rank_pools(2).run(_raise_group)

    assert result.error is not None
    assert ["ValueError", "KeyError"] == [e.type_name for e in result.error.members]


def test_pool_interrupted_rank_raises_keyboard_interrupt(
    rank_pools: Callable[[int], RankPool],
) -> None:
    """SIGINT works in a rank, however the test run itself was started."""
    results = rank_pools(2).run(_interrupt_itself)

    assert ["KeyboardInterrupt"] * 2 == [r.error and r.error.type_name for r in results]


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (_return_lock, "rank 0 returned a lock that cannot be pickled"),
        (_return_unloadable, "rank 0 returned something that cannot be unpickled"),
    ],
)
def test_pool_result_that_does_not_pickle_fails_in_words(
    rank_pools: Callable[[int], RankPool], fn: Any, match: str
) -> None:
    """A result that cannot travel fails the test and says so."""
    with pytest.raises(RanksError, match=match):
        rank_pools(2).run(fn)


def test_pool_function_that_cannot_be_imported_is_refused(
    rank_pools: Callable[[int], RankPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function of the main module is refused, not sent."""
    monkeypatch.setattr(_pid, "__module__", "__main__")

    with pytest.raises(ValueError, match=r"^_pid must be in a module that ranks can"):
        rank_pools(2).run(_pid)


def test_pool_functions_run_in_the_same_processes(started: list[int]) -> None:
    """A pool runs one function after another in the same processes and group."""
    with RankPool(2) as pool:
        first = values(pool.run(_pid))
        sums = values(pool.run(_sum_of_ranks))
        second = values(pool.run(_pid))

    assert first == second == started
    assert [1, 1] == sums
    assert not any(map(_is_alive, started))


def test_pool_output_is_kept_apart(rank_pools: Callable[[int], RankPool]) -> None:
    """Each result has what was written during its function, and nothing else."""
    pool = rank_pools(2)
    pool.run(_write, "first")
    (result, _) = pool.run(_write, "second")

    assert "second to stdout\n" == result.stdout
    assert "second to stderr\n" == result.stderr
    assert result.exit is None


def test_pool_after_a_lost_rank_is_fresh(started: list[int]) -> None:
    """A pool that lost a rank, or its patience, goes on with new processes."""
    with RankPool(2) as pool:
        pool.run(_leave, "kill", expect_exit={1: -signal.SIGKILL})
        assert [1, 1] == values(pool.run(_sum_of_ranks))
        with pytest.raises(RanksError, match="in _spin\n"):
            pool.run(_spin_on_one, timeout=0.5)
        assert [1, 1] == values(pool.run(_sum_of_ranks))

    assert 6 == len(set(started))
    assert not any(map(_is_alive, started))


def test_pool_rank_killed_between_functions_is_replaced() -> None:
    """A rank that ends between two functions is noticed before the second."""
    with RankPool(2, init=False) as pool:
        before = values(pool.run(_pid))
        pidfd = os.pidfd_open(before[1])
        os.kill(before[1], signal.SIGKILL)
        select.select([pidfd], [], [], 60.0)
        os.close(pidfd)
        after = values(pool.run(_pid))

    assert not set(before) & set(after)


def test_pool_child_of_a_rank_is_ended_with_the_pool() -> None:
    """A rank's child is ended as well, even in a session of its own."""
    with RankPool(2, init=False) as pool:
        children = values(pool.run(_start_child))
        assert all(map(_is_alive, children))

    assert not any(map(_is_alive, children))


def test_pool_store_process_can_be_stopped(started: list[int]) -> None:
    """With a process of its own, the store can be frozen without freezing a rank."""
    with RankPool(2, host="process") as pool:
        assert [("T", True)] * 2 == values(pool.run(_freeze_store))

    assert not any(map(_is_alive, started))


def test_run_threads_steps_run_in_order() -> None:
    """Threads on one store take their steps in the order asked for."""
    order = []

    def take_turns(rank: int, store: dist.HashStore, sequencer: Sequencer) -> int:
        with sequencer.step(1 - rank):
            order.append(rank)
        sequencer.announce(f"done {rank}")
        sequencer.wait_for(f"done {1 - rank}")
        return int(store.add("key", 1))

    results = run_threads(2, take_turns)

    assert [1, 0] == order
    assert {1, 2} == set(values(results))


def test_run_threads_error_is_the_object_that_was_raised() -> None:
    """A thread's exception is handed over as itself."""
    error = ValueError("mine")

    def raise_on_one(rank: int, store: dist.HashStore, sequencer: Sequencer) -> None:  # noqa: ARG001  (given to every function of a rank)
        if rank == 1:
            raise error

    results = run_threads(2, raise_on_one)

    assert error is results[1].error
    with pytest.raises(ValueError, match=r"^mine$"):
        values(results)


def test_run_threads_wait_for_nothing_ends_at_the_deadline() -> None:
    """A wait for what never happens raises instead of hanging."""
    sequencer = Sequencer(time.monotonic())

    with pytest.raises(TimeoutError, match=r"^'never' was not reached in time"):
        sequencer.wait_for("never")


def test_run_threads_hung_thread_fails_with_stacks() -> None:
    """A thread that hangs fails the test, by name and with its stack."""
    release = threading.Event()

    def hang_on_one(rank: int, store: dist.HashStore, sequencer: Sequencer) -> None:  # noqa: ARG001  (given to every function of a rank)
        if rank == 1:
            release.wait()

    try:
        with pytest.raises(RanksError) as excinfo:
            run_threads(2, hang_on_one, timeout=0.2)
    finally:
        release.set()

    assert str(excinfo.value).startswith("not done after 0.2 s: rank 1\n")
    assert "in hang_on_one\n" in str(excinfo.value)


def test_run_script_output_is_returned(tmp_path: Path) -> None:
    """A program's output and exit code are returned."""
    script = tmp_path / "script.py"
    script.write_text("import sys; print('out'); sys.exit('err')")
    result = run_script(script, expect_exit=1)

    assert ("out\n", "err\n", 1) == (result.stdout, result.stderr, result.exit)
    with pytest.raises(RanksError, match="exit code 1, expected: exit code 0"):
        run_script(script)


def test_run_script_hung_program_is_killed_with_stacks(tmp_path: Path) -> None:
    """A program that hangs is killed with its children, and shows where it was."""
    script = tmp_path / "script.py"
    child = "import signal; print('child', flush=True); signal.pause()"
    script.write_text(
        "import os, subprocess, sys\n"
        "def wait_here(child):\n"
        "    print('pid', child.pid, flush=True)\n"
        "    child.wait()\n"
        f"command = [sys.executable, '-c', {child!r}]\n"
        "wait_here(subprocess.Popen(command, start_new_session=True))\n"
    )
    with pytest.raises(RanksError) as excinfo:
        run_script(script, timeout=2.0)
    text = str(excinfo.value)

    assert "not done after 2.0 s" in text
    assert "in wait_here\n" in text
    assert not _is_alive(int(text.partition("pid ")[2].split()[0]))


@pytest.mark.parametrize("rdzv_endpoint", [None, "127.0.0.1:0"])
def test_run_torchrun_ranks_meet(tmp_path: Path, rdzv_endpoint: str | None) -> None:
    """Under torchrun, the ranks of a script meet."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "tensor = torch.ones(())\n"
        "dist.all_reduce(tensor)\n"
        "print(f'sum {int(tensor)}\\n', end='', flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    result = run_torchrun(script, rdzv_endpoint=rdzv_endpoint)

    assert 2 == result.stdout.count("sum 2")


def test_standstills_stop_what_runs_and_leave_alone_what_is_stopped_already() -> None:
    """Processes are stopped again and again, and go on; after the block none is stopped that was not before."""
    script = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as root:
        assert root.stdout is not None
        child = int(root.stdout.readline())
        with subprocess.Popen(["sleep", "600"]) as beside, ranks.standstills(root.pid, 0.5):  # noqa: S607  (the system's own)
            for _ in range(2):
                assert wait_until(lambda: ["T", "T"] == [process_state(pid) for pid in (root.pid, child)])
                assert "T" != process_state(beside.pid)
                assert wait_until(lambda: "T" not in map(process_state, (root.pid, child)))
            freeze(child)
            assert wait_until(lambda: "T" == process_state(root.pid))
            assert wait_until(lambda: "T" != process_state(root.pid))
            beside.kill()

        assert ["T", True] == [process_state(child), process_state(root.pid) != "T"]
        os.kill(child, signal.SIGKILL)
        root.kill()


def test_busy_cores_end_with_the_block() -> None:
    """Cores are busy during the block only."""

    def children() -> list[int]:
        path = Path(f"/proc/self/task/{threading.get_native_id()}/children")
        return [int(pid) for pid in path.read_text().split()]

    before = children()
    with ranks.busy_cores(2):
        during = set(children()) - set(before)
        assert 2 == len(during)

    assert not any(map(_is_alive, during))
