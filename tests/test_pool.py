"""The pool in examples/: a rank that is lost costs one subtest, and all others run."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from examples.pool import Pool

from collective_scope import Subtests
from tests.ranks import run_script


ROOT = Path(__file__).parent.parent

# Ranks run these.


def note_pid(folder: str) -> None:
    """Show that a group of all ranks works, and in which processes."""
    value = torch.tensor([1.0])
    dist.all_reduce(value)
    assert value.item() == dist.get_world_size() == int(os.environ["WORLD_SIZE"])
    Path(folder, f"rank-{dist.get_rank()}").write_text(str(os.getpid()))


def be_killed() -> None:
    """Lose rank 1 to a signal."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leave(code: int) -> None:
    """Lose rank 1 without a word to anybody."""
    if dist.get_rank() == 1:
        os._exit(code)
    dist.barrier()


def hold_the_interpreter() -> None:
    """Get stuck on rank 1 in native code that holds the GIL."""
    if dist.get_rank() == 1:
        ctypes.PyDLL(None).sleep(600)
    dist.barrier()


def raise_system_exit() -> None:
    """Raise on rank 1 what ends a program, before its collectives."""
    if dist.get_rank() == 1:
        sys.exit(3)
    dist.barrier()


def fail(rank: int) -> None:
    """Raise on one rank before its collectives."""
    if dist.get_rank() == rank:
        msg = "shapes differ"
        raise ValueError(msg)
    dist.barrier()


def skip() -> None:
    """Skip on all ranks."""
    msg = "not here"
    raise unittest.SkipTest(msg)


def spoil() -> None:
    """Fail such that these processes can make no group again."""
    dist.init_process_group = None  # type: ignore[assignment]  # taken away, so that making the group fails
    fail(0)


def interrupt_the_parent(folder: str, parent: int) -> None:
    """Have the parent get a Ctrl-C while this subtest runs."""
    note_pid(folder)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(parent, signal.SIGINT)
    hold_the_interpreter()


def compare_environment(value: str) -> None:
    """Show that the rank has the variable that the pool was given, and where it is."""
    assert os.environ["POOL_VALUE"] == value
    assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == str(dist.get_rank())


@pytest.fixture(scope="module", name="pool")
def _pool() -> Iterator[Pool]:
    with Pool(2, kill_after=3.0, env={"POOL_VALUE": "given"}) as pool:
        yield pool


def pids_of(pool: Pool, folder: Path, ranks: int = 2) -> list[int]:
    """Run a healthy subtest; return the processes of the ranks that it ran in."""
    result = pool.run("healthy", note_pid, str(folder), ranks=ranks)
    assert (result.status, result.reason) == ("passed", "")
    return [int((folder / f"rank-{rank}").read_text()) for rank in range(ranks)]


# A rank is lost


@pytest.mark.parametrize(
    ("fn", "args", "reason"),
    [
        pytest.param(be_killed, (), r"rank 1 was ended by signal 9 \(Killed\)", id="killed"),
        pytest.param(leave, (7,), r"rank 1 ended with exit code 7", id="exits"),
        pytest.param(leave, (0,), r"rank 1 ended with exit code 0", id="exits-as-if-all-were-well"),
        pytest.param(hold_the_interpreter, (), r"rank 1 was ended by kill_after \(exit code 124\)", id="kill-after"),
    ],
)
def test_pool_that_loses_a_rank_fails_one_subtest_and_runs_the_next_on_new_ranks(
    fn: object, args: tuple[object, ...], reason: str, pool: Pool, tmp_path: Path
) -> None:
    """The subtest fails and says how the rank ended; the ones before and after it pass, in other processes."""
    before, starts = pids_of(pool, tmp_path), pool.starts

    lost = pool.run("lost", fn, *args)  # type: ignore[arg-type]  # arguments of any type

    assert lost.status == "failed"
    assert re.search(reason, lost.reason)
    assert lost.reason.endswith("; all ranks are started again")
    after = pids_of(pool, tmp_path)
    assert not set(before) & set(after)
    assert pool.starts == starts + 1
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# No rank is lost


@pytest.mark.parametrize(
    ("fn", "args", "cause"),
    [
        pytest.param(fail, (0,), "ValueError", id="fails-on-rank-0"),
        pytest.param(fail, (1,), "ValueError", id="fails-on-rank-1"),
        pytest.param(raise_system_exit, (), "SystemExit", id="sys-exit"),
    ],
)
def test_pool_whose_subtest_fails_before_its_collectives_keeps_its_ranks(
    fn: object, args: tuple[object, ...], cause: str, pool: Pool, tmp_path: Path
) -> None:
    """The subtest fails with its cause first, and the next one runs in the same processes."""
    before = pids_of(pool, tmp_path)

    failed = pool.run("fails", fn, *args)  # type: ignore[arg-type]  # arguments of any type

    assert failed.status == "failed"
    assert min(failed.failures.values(), key=lambda outcome: outcome.order).type_name == cause
    assert pids_of(pool, tmp_path) == before


def test_pool_whose_ranks_can_make_no_group_runs_the_next_subtest_on_new_ranks(pool: Pool, tmp_path: Path) -> None:
    """Lasting damage to a subtest's processes does not cost the next subtest."""
    before = pids_of(pool, tmp_path)

    assert pool.run("spoils", spoil).status == "failed"

    assert not set(before) & set(pids_of(pool, tmp_path))


def test_pool_with_fewer_ranks_for_a_subtest_runs_it_on_the_lowest(pool: Pool, tmp_path: Path) -> None:
    """One rank, then all, then one again: each has a group of that size, and no process is started."""
    everyone = pids_of(pool, tmp_path)

    assert [pids_of(pool, tmp_path, ranks=1) for _ in range(2)] == [everyone[:1]] * 2
    assert pids_of(pool, tmp_path) == everyone
    with pytest.raises(ValueError, match=r"^ranks must be at least 0 and at most 2 \(got 3\)$"):
        pool.run("too many", note_pid, str(tmp_path), ranks=3)


def test_pool_gives_its_ranks_their_environment(pool: Pool) -> None:
    """The variables given and those that torchrun sets are there."""
    pool.check("environment", compare_environment, "given")


def test_pool_that_is_interrupted_in_a_subtest_leaves_no_rank(tmp_path: Path) -> None:
    """Ctrl-C ends the ranks, whatever they are in."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Pool(2, kill_after=60.0) as pool:
            pool.run("interrupted", interrupt_the_parent, str(tmp_path), os.getpid())
    finally:
        signal.signal(signal.SIGINT, before)

    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"rank-{rank}").read_text()), 0)


# Reports


def test_pool_check_raises_what_each_rank_says_the_cause_first(pool: Pool) -> None:
    """Under pytest, an item fails with all tracebacks, and a skip is a skip."""
    with pytest.raises(RuntimeError) as caught:
        pool.check("fails", fail, 1)
    with pytest.raises(unittest.SkipTest, match=r"^not here$"):
        pool.check("skips", skip)

    text = str(caught.value)
    assert text.startswith("fails failed\nrank 1, body:\nTraceback")
    assert text.index("ValueError: shapes differ") < text.index("rank 0, body")


def _run_four() -> None:
    with Subtests(rerun="run {id}") as report, Pool(2) as pool:
        for name, fn, args in (("a", fail, (5,)), ("b", skip, ()), ("c", fail, (1,)), ("d", fail, (5,))):
            pool.run(name, fn, *args, report=report)


def test_pool_report_has_each_subtest_once_and_no_line_within_a_row_of_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Logs of ranks come in lines of their own, and the report counts all."""
    with pytest.raises(ExceptionGroup, match=r"^1 of 4 subtests failed"):
        _run_four()

    lines = capsys.readouterr().out.splitlines()
    assert ".s" in lines
    assert "F." in lines
    assert any(line.startswith("[rank 1] rank 1 of 2 failed in scope 'c'") for line in lines)
    assert "  again: run c" in lines
    assert lines[-1].startswith("2 passed, 1 failed, 1 skipped in ")


def test_pool_suite_to_copy_reports_three_failures_and_exits_with_one() -> None:
    """The example runs to its end, and its report names each cause."""
    run = run_script("-m", "examples.pool.suite", cwd=ROOT, timeout=120, expect_exit=1)

    for line in (
        "  rank 1, body: ValueError: shapes differ",
        "FAILED is-lost: rank 1 was ended by signal 9 (Killed); all ranks are started again",
    ):
        assert line in run.stdout.splitlines()
    assert "FAILED is-stuck: " in run.stdout
    assert re.search(r"^3 passed, 3 failed in ", run.stdout, re.MULTILINE)
    assert "in holds_the_interpreter" in run.stderr


def test_pool_suite_to_copy_is_one_pytest_item_for_each_subtest() -> None:
    """One pool serves all items."""
    run = run_script("-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/pool", cwd=ROOT, timeout=120)

    assert "3 passed" in run.stdout
