"""The suites to copy, as a user runs them: a loop of subtests, and tests of the plugin under torchrun."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.ranks import run_script, run_torchrun


EXAMPLES = Path(__file__).parent.parent / "examples"


def test_subtests_to_copy_pass() -> None:
    """The test to copy is one pytest item, and passes."""
    run = run_script("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES / "test_subtests.py", timeout=120)

    assert "1 passed" in run.stdout


_LOSES_A_RANK = """
import os, signal
import test_subtests as example

whole = example.worker

def lose_a_rank(size):
    if example.dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if COLLECTIVE:
        example.dist.barrier()

def worker(rank, port):
    example.subtest = lose_a_rank
    whole(rank, port)

if __name__ == "__main__":
    example.worker = worker
    example.test_subtests()
"""


@pytest.mark.parametrize("collective", [False, True], ids=["at-the-exit", "in-a-collective"])
def test_subtests_to_copy_that_lose_a_rank_say_which_and_run_no_more(collective: bool, tmp_path: Path) -> None:  # noqa: FBT001  (parametrized)
    """The rank that is left fails the subtest, does not begin the next one, and says which rank is gone."""
    shutil.copy(EXAMPLES / "test_subtests.py", tmp_path)
    script = tmp_path / "script.py"
    script.write_text(_LOSES_A_RANK.replace("COLLECTIVE", str(collective)))
    run = run_script(script, timeout=120, expect_exit=1)

    assert "process 1 terminated with signal SIGKILL" in run.stderr
    assert "FAILED size-10" in run.stdout.splitlines()
    if not collective:
        assert "  rank 1 of 2 lost at the exit of scope 'size-10'" in run.stdout
    # Neither the scope nor the seconds, which differ: subtests that are not run for one reason are counted together.
    assert "not run: 1 subtest, because rank 1 of 2 lost" in run.stdout.splitlines()
    assert re.search(r"^1 failed, 1 not run in ", run.stdout, re.MULTILINE)


_LOSES_RANK_0 = """
import io, os, signal, sys, time
import torch.distributed as dist, torch.multiprocessing as mp
from collective_scope import RenewableGroup, Subtests

def worker(rank, port):
    world = RenewableGroup(store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=3)
    subtests = Subtests(world)
    try:
        with subtests:
            for name in "abc":
                with subtests.test(name):
                    if name == "b" and rank == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
    finally:
        subtests.write_junit(sys.argv[1])
        began = time.monotonic()
        subtests.write_trace(sys.argv[1] + ".json")
        print(f"rank {rank}: trace took {time.monotonic() - began:.0f} s", flush=True)

if __name__ == "__main__":
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers = mp.spawn(worker, (server.port,), nprocs=3, join=False)
    while not workers.join(grace_period=60):
        pass
"""


def test_subtests_that_lose_rank_0_are_reported_by_the_next_one(tmp_path: Path) -> None:
    """The lowest rank that is left prints the summary, and writes what CI reads; nobody waits for the dead one."""
    script, junit = tmp_path / "script.py", tmp_path / "junit.xml"
    script.write_text(_LOSES_RANK_0)
    run = run_script(script, str(junit), timeout=120, expect_exit=1)

    assert 1 == run.stdout.count("FAILED b\n  rank 0 of 3 lost at the exit of scope 'b'")
    assert 'failures="1"' in junit.read_text()
    for rank in (1, 2):
        assert int(run.stdout.partition(f"rank {rank}: trace took ")[2].split()[0]) <= 5


@pytest.mark.parametrize(
    ("world_size", "broken", "line"),
    [
        pytest.param(2, "", "3 passed", id="two-ranks"),
        pytest.param(2, "1", "1 failed, 2 passed", id="one-of-two-broken"),
        pytest.param(1, "", "3 passed", id="no-launcher"),
    ],
)
def test_pytest_torchrun_costs_one_test_a_failure(world_size: int, broken: str, line: str) -> None:
    """The suite to copy for the plugin: one that fails before its collectives costs one test, and it runs alone."""
    command = ("-m", "pytest", "-p", "no:cacheprovider", EXAMPLES / "pytest_torchrun")
    env = {"BREAK_RANK": broken}
    code = 1 if broken else 0

    if world_size == 1:
        result = run_script(*command, env=env, expect_exit=code)
    else:
        result = run_torchrun(*command, world_size=world_size, env=env, expect_exit=code)

    assert re.search(rf"=+ {line} in ", result.stdout)
    assert bool(re.search("^E +ValueError: shapes differ$", result.stdout, re.MULTILINE)) == bool(broken)
