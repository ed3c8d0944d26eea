"""The scope on GPUs, over NCCL. For any number of them from two on; skipped, with the reason, where there are fewer."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from collective_scope import BarrierTimeoutError, PeerFailedError, collective_scope, current_scope
from tests.ranks import RankPool, here, values


GPUS = torch.cuda.device_count()
BACKEND = "cpu:gloo,cuda:nccl"

pytestmark = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs (here are {GPUS})")


@pytest.fixture(scope="module", name="pool")
def _pool() -> Any:
    with RankPool(GPUS, backend=BACKEND, group_timeout_s=60) as pool:
        yield pool


def _all_reduce(rank: int) -> float:
    torch.cuda.set_device(rank)
    value = torch.full((1 << 20,), float(rank + 1), device="cuda")
    dist.all_reduce(value)
    return float(value[0].item())


def _healthy(rank: int, _world_size: int) -> list[Any]:
    seen = []
    with collective_scope(name="healthy") as scope:
        total = _all_reduce(rank)
        # On a stream of its own and not waited for: the scope synchronizes before cleanups.
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)  # noqa: SLF001  (torch has no public name for it)
            done = torch.cuda.Event()
            done.record()
        scope.cleanup(lambda: seen.append(done.query()))
        scope.collective_cleanup(_all_reduce, rank)
    assert scope.verdict is not None
    return [total, seen, scope.verdict.ok]


def test_scope_on_nccl_synchronizes_and_agrees(pool: RankPool) -> None:
    """Cleanups find the device idle, and a collective cleanup runs over NCCL, on all ranks."""
    total = GPUS * (GPUS + 1) / 2

    assert [[total, [True], True]] * GPUS == values(pool.run(_healthy))


def _fails_after_collectives(rank: int, _world_size: int) -> tuple[str, float]:
    try:
        with collective_scope(name="one rank fails", failure_timeout=10):
            _all_reduce(rank)
            assert rank != 1, "wrong numbers"
    except (AssertionError, PeerFailedError) as error:
        name = type(error).__name__
    with collective_scope(name="next"):
        return name, _all_reduce(rank)


def test_failure_after_collectives_costs_one_scope(pool: RankPool) -> None:
    """The failing rank keeps its error, its peers are told, and NCCL works in the next scope."""
    total = GPUS * (GPUS + 1) / 2
    names = ["AssertionError" if rank == 1 else "PeerFailedError" for rank in range(GPUS)]

    assert [(name, total) for name in names] == values(pool.run(_fails_after_collectives))


def _stuck_in_collective(rank: int, _world_size: int, made: bool) -> tuple[float, tuple[int, ...], str]:  # noqa: FBT001  (parametrized)
    """Rank 0 enters an all-reduce that its peers never enter."""
    torch.cuda.set_device(rank)
    if made:
        _all_reduce(rank)
    start = time.monotonic()
    try:
        with collective_scope(name="stuck", timeout=4):
            if rank == 0:
                value = torch.ones(1, device="cuda")
                # NCCL makes a communicator at the first collective, and that waits for all ranks.
                here().announce("entering")
                dist.all_reduce(value)
                torch.cuda.synchronize()
            else:
                here().wait_for("entering")
                start = time.monotonic()
    except BarrierTimeoutError as error:
        return time.monotonic() - start, error.missing, error.verdict.where[0].frames
    return 0.0, (), ""


@pytest.mark.parametrize(
    ("made", "line"),
    [
        pytest.param(True, "torch.cuda.synchronize()", id="kernel"),
        pytest.param(False, "dist.all_reduce(value)", id="making-the-communicator"),
    ],
)
def test_rank_stuck_in_a_collective_is_located_by_its_peers(made: bool, line: str) -> None:  # noqa: FBT001  (parametrized)
    """Peers name the rank that waits, on the device or on the host, and the line in which it waits."""
    with RankPool(GPUS, backend=BACKEND, group_timeout_s=60) as pool:
        results = pool.run(_stuck_in_collective, made, abandon={0}, timeout=60)

    for result in results[1:]:
        waited, missing, frames = result.unwrap()
        assert waited < 4 + 5
        assert missing == (0,)
        assert line in frames


def _decorated(rank: int, _world_size: int) -> float:
    @collective_scope(lambda: dist.group.WORLD)
    def work() -> float:
        current_scope().collective_cleanup(torch.cuda.synchronize)
        return _all_reduce(rank)

    return work()


def test_decorator_on_nccl_runs_a_scope_per_call(pool: RankPool) -> None:
    """A decorated function works on GPUs as on the CPU."""
    assert [GPUS * (GPUS + 1) / 2] * GPUS == values(pool.run(_decorated))
