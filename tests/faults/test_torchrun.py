"""Faults of torchrun's own workers: the program ends, with the agent's verdict and the scope's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_torchrun


_PROGRAM = """
import os, pathlib, signal, sys, time
import torch.distributed as dist
from collective_scope import collective_scope

folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank = dist.get_rank()
# Longer than this program may take: what ends it is the fault.
with collective_scope(name="subtest", timeout=300, failure_timeout=300) as scope:
    scope.cleanup((folder / f"cleaned-{rank}").touch)
    if rank == 1:
        while not (folder / "cleaned-0").exists():
            time.sleep(0.002)  # A file cannot be waited for.
        if how == "raises":
            raise ValueError("rank 1 gives up")
        if how == "exits":
            sys.exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("how", "says", "cleaned"),
    [
        pytest.param("raises", ["ValueError: rank 1 gives up", "PeerFailedError: rank 1 of 2 failed"], 2, id="raises"),
        pytest.param("exits", ["PeerFailedError: rank 1 of 2 failed in scope 'subtest': SystemExit: 3"], 2, id="exits"),
        # The agent ends the others as soon as it sees that; which of the two comes first is not ours to say.
        pytest.param("is killed", ["Signal 9 (SIGKILL) received"], 1, id="is-killed"),
    ],
)
def test_torchrun_worker_that_fails_ends_the_program(how: str, says: list[str], cleaned: int, tmp_path: Path) -> None:
    """The program ends at once with the agent's exit code, what ran is cleaned up, and the cause is told."""
    script = tmp_path / "program.py"
    script.write_text(_PROGRAM)
    result = run_torchrun(script, tmp_path, how, timeout=90.0, expect_exit=1)

    for words in says:
        assert words in result.stderr
    assert cleaned == len(list(tmp_path.glob("cleaned-*")))
