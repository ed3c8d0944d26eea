"""Runs each example as its reader would and checks what it prints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.ranks import run_script


EXAMPLES = Path(__file__).parent.parent / "examples"


def lines_of(example: str) -> list[str]:
    """Run an example; it must exit with 0 and leave nothing on stderr."""
    result = run_script(EXAMPLES / example, timeout=120)
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_hello_scope_slow_rank_keeps_the_fast_one() -> None:
    """No rank leaves before every rank has cleaned up."""
    lines = lines_of("hello_scope.py")

    assert {"rank 0 cleans up", "rank 1 cleans up"} < set(lines[:4])
    assert {"rank 0 has left", "rank 1 has left"} == set(lines[4:])


def test_decorated_worker_shared_folder_is_removed_after_the_barrier() -> None:
    """Each call is a scope, and the folder outlives all writers."""
    assert ["4 shards, folder still there: True", "6 shards, folder still there: True"] == lines_of(
        "decorated_worker.py"
    )


def test_failing_rank_fails_one_subtest_on_all_ranks() -> None:
    """The failing rank keeps its own error, its peer is told, and both go on."""
    text = "\n".join(lines_of("failing_rank.py"))

    for rank in (0, 1):
        assert f"[rank {rank}] value-10 passed" in text
        assert f"[rank {rank}] value-30 passed" in text
    assert "[rank 1] value-20 FAILED: AssertionError: expected 42, got 41" in text
    assert (
        "[rank 0] value-20 FAILED: PeerFailedError: rank 1 of 2 failed in scope 'value-20':"
        " AssertionError: expected 42, got 41"
    ) in text
    assert "[rank 1] ERROR rank 1 of 2 failed in scope 'value-20', body; its peers are told now" in text
    assert "assert total.item() == expected" in text.partition("[rank 0] value-20 FAILED")[2]


def test_straggler_is_located_by_its_peer() -> None:
    """The peer's error names the stuck rank, its phase, and the line that it is in."""
    text = "\n".join(lines_of("straggler.py"))

    assert "[rank 0] BarrierTimeoutError: rank 1 of 2 missing at the exit of scope 'combine' after 2." in text
    assert "in the body of scope 'combine' for 2." in text
    assert "dist.all_reduce(value)" in text
    assert "[rank 1] was freed when its peer left" in text


def test_subtests_of_the_readme_pass_and_are_what_it_shows() -> None:
    """The test that the README shows to be copied is this file, without its first lines, and passes."""
    run = run_script("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES / "test_subtests.py", timeout=120)
    code = (EXAMPLES / "test_subtests.py").read_text().split('"""\n', 2)[2].strip()

    assert "1 passed" in run.stdout
    assert f"```python\n{code}\n```" in (EXAMPLES.parent / "README.md").read_text()


_LOSES_A_RANK = """
import os, signal
import test_subtests as example

whole = example.worker

def lose_a_rank(scope, size):
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
def test_subtests_of_the_readme_that_lose_a_rank_say_which(collective: bool, tmp_path: Path) -> None:  # noqa: FBT001  (parametrized)
    """What `mp.spawn` does not show is printed by the ranks that are left, subtest by subtest, as an error or a note."""
    shutil.copy(EXAMPLES / "test_subtests.py", tmp_path)
    script = tmp_path / "script.py"
    script.write_text(_LOSES_A_RANK.replace("COLLECTIVE", str(collective)))
    run = run_script(script, timeout=120, expect_exit=1)

    assert "process 1 terminated with signal SIGKILL" in run.stderr
    before = "PeerLostError" if collective else "rank 0"
    assert f"{before}: rank 1 of 2 lost at the exit of scope 'size-10'" in run.stdout
    assert "rank 0: rank 1 of 2 lost at the entry of scope 'size-1000'" in run.stdout
