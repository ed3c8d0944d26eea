"""A communicator of mpi4py is a group like any other: names, agreement, verdict, location."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_script


_MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")

pytestmark = pytest.mark.skipif(
    _MPIRUN is None or importlib.util.find_spec("mpi4py") is None, reason="needs mpirun and mpi4py"
)


@pytest.fixture(scope="module", name="results", params=[2, 4])
def _results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return what each rank of an MPI job saw, by rank."""
    world_size = request.param
    launcher = [str(_MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", str(world_size)]
    done = run_script("-m", "tests._mpi_program", prefix=launcher, timeout=120.0)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == world_size, f"{done.stdout}\n{done.stderr}"
    return [results for _, results in sorted(lines, key=lambda line: line[0])]


def test_communicator_healthy_ranks_run_their_cleanups_in_lockstep(results: list[dict[str, Any]]) -> None:
    """Every rank has the same verdict on all of them, and ran what all share."""
    assert [[True, len(results), ["collective", "local"]]] * len(results) == [each["healthy"] for each in results]


def test_communicator_failed_rank_is_told_with_its_traceback(results: list[dict[str, Any]]) -> None:
    """A healthy rank learns which rank failed and how; that one raises its own error."""
    *healthy, failed = [each["failing"] for each in results]

    assert ["ValueError", "on the last rank"] == failed
    for kind, text in healthy:
        assert "PeerFailedError" == kind
        assert f"rank {len(results) - 1} of {len(results)} failed in scope 'failing'" in text
        assert "raise ValueError(msg)" in text


def test_communicator_collective_cleanups_that_differ_are_a_mismatch(results: list[dict[str, Any]]) -> None:
    """The ranks agree before a collective cleanup, as over any group."""
    assert {"CleanupMismatchError"} == {each["differing"][0] for each in results}


def test_communicator_missing_rank_is_named_and_located(results: list[dict[str, Any]]) -> None:
    """Only the rank that is late is missing, and the message has the line that it is in."""
    for kind, text in [each["late"] for each in results]:
        assert "BarrierTimeoutError" == kind
        assert text.startswith(f"rank {len(results) - 1} of {len(results)} missing at the exit of scope 'late'")
        assert "released.wait(30)" in text


def test_communicator_barriers_of_the_body_do_not_pair_with_the_scope(results: list[dict[str, Any]]) -> None:
    """Messages of the body over the communicator are its alone."""
    assert all(each["beside_barriers"] for each in results)


def test_communicator_freed_leaves_no_thread(results: list[dict[str, Any]]) -> None:
    """Twenty communicators, used once and freed, leave the process with the threads that it had."""
    assert [0] * len(results) == [each["freed"] for each in results]


def test_communicator_null_is_a_world_of_one(results: list[dict[str, Any]]) -> None:
    """On a rank outside of the communicator, cleanups run and there is no barrier."""
    assert [[1, ["local"]]] * len(results) == [each["outside"] for each in results]
