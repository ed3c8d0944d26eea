"""One bad subtest costs one subtest, over NCCL: stuck ranks come back, and the group is made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.carry_on import HOWS, Event, Failure, defects, figures, plan, run, world_of
from tests.ranks import RankPool, here, values


GPUS = torch.cuda.device_count()

HOWS_OF_NCCL = [how for how in HOWS if how != "queue"]
"""An abort while a device has a queue full of collectives may cost the device: a limit that the README names."""

pytestmark = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs (here are {GPUS})")


@pytest.fixture(name="pool")
def _pool() -> Any:
    with RankPool(GPUS, init=False, host="parent") as pool:
        yield pool


def _carry_on(rank: int, world_size: int, failures: list[Failure]) -> list[Event]:
    torch.cuda.set_device(rank)
    world = world_of(dist.PrefixStore("carry-on", here().new_store()), rank, world_size)
    events = run(world, failures)
    world.destroy()
    return events


def test_world_over_nccl_whose_bodies_fail_one_after_the_other_before_any_collective_goes_on(pool: RankPool) -> None:
    """No collective has run on a new group when a rank fails, the first one or the last: its peers are freed."""
    failures = [Failure("before", 0), Failure("before", GPUS - 1), Failure("loop", 0), Failure("loop", 1), Failure()]

    events = values(pool.run(_carry_on, failures, timeout=60.0))

    assert [] == defects(failures, events)
    assert max(figures(failures, events, grace=0.5).freed) < 1.2 + 5.0


@pytest.mark.parametrize("seed", range(10))
def test_world_over_nccl_after_any_failures_has_exactly_these_and_right_numbers(seed: int, pool: RankPool) -> None:
    """Of twenty subtests, the eight that fail on one rank fail on every rank, with the cause; the others are right."""
    failures = plan(seed, 20, 8, GPUS, HOWS_OF_NCCL)

    events = values(pool.run(_carry_on, failures, timeout=90.0))

    assert [] == defects(failures, events)
    measured = figures(failures, events, grace=0.5)
    print(f"{GPUS} GPUs, seed {seed}: {measured}")
    assert max(measured.freed) < 1.2 + 5.0
    assert max(measured.next_body) < 2.0 + 5.0
