"""
One rank fails before its collectives: its peer comes back, and the next subtest runs.

Run it with ``python examples/failing_rank.py``. In the second of three subtests, rank 1 raises
while rank 0 waits for it in an all-reduce. The group is revoked, which frees rank 0 within a second,
and made again for the third subtest. Rank 0 prints the report: the cause first, then what followed.
With `dist.barrier()` in a ``finally`` instead, both ranks would wait for half an hour.
"""

import logging

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import RenewableGroup, Subtests


def subtest(rank: int, value: int) -> None:
    if value == 20 and rank == 1:
        msg = "no room for 20"
        raise ValueError(msg)
    total = torch.tensor(value + rank)
    dist.all_reduce(total)
    assert total.item() == 2 * value + 1


def main(rank: int, world_size: int, port: int) -> None:
    logging.basicConfig(level=logging.CRITICAL)  # the report says it all
    store = dist.TCPStore("127.0.0.1", port)
    world = RenewableGroup(store=store, rank=rank, world_size=world_size)
    try:
        with Subtests(world, verbose=True) as subtests:
            for value in (10, 20, 30):
                subtests.run(f"value-{value}", subtest, rank, value)
    except ExceptionGroup as group:  # on every rank, with what that rank raised
        print(f"[rank {rank}] {', '.join(type(error).__name__ for error in group.exceptions)}", flush=True)
    print(f"[rank {rank}] the group was made {world.made} times", flush=True)
    world.destroy()


if __name__ == "__main__":
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(main, (2, server.port), nprocs=2)
