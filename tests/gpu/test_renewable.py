"""One bad subtest costs one subtest, over NCCL: stuck ranks come back, and the group is made again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.carry_on import HOWS, Event, defects, figures, plan, run, world_of
from tests.ranks import RankPool, here, values


GPUS = torch.cuda.device_count()

HOWS_OF_NCCL = [how for how in HOWS if how != "queue"]
"""An abort while a device has a queue full of collectives may cost the device: a limit that the README names."""

pytestmark = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs (here are {GPUS})")


@pytest.fixture(name="pool")
def _pool() -> Any:
    with RankPool(GPUS, init=False, host="parent") as pool:
        yield pool


def _carry_on(rank: int, world_size: int, seed: int) -> list[Event]:
    torch.cuda.set_device(rank)
    store = dist.PrefixStore(f"carry-on-{seed}", here().new_store())
    world = world_of(store, rank, world_size)
    events = run(world, plan(seed, 20, 8, world_size, HOWS_OF_NCCL))
    world.destroy()
    return events


@pytest.mark.parametrize("seed", range(10))
def test_world_over_nccl_after_any_failures_has_exactly_these_and_right_numbers(seed: int, pool: RankPool) -> None:
    """Of twenty subtests, the eight that fail on one rank fail on every rank, with the cause; the others are right."""
    failures = plan(seed, 20, 8, GPUS, HOWS_OF_NCCL)

    events = values(pool.run(_carry_on, seed, timeout=180.0))

    assert [] == defects(failures, events)
    measured = figures(failures, events, grace=0.5)
    print(f"{GPUS} GPUs, seed {seed}: {measured}")
    assert max(measured.freed) < 1.2 + 5.0
    assert max(measured.next_body) < 2.0 + 5.0
