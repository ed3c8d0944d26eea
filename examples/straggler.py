"""
One rank is stuck: every other rank says which, where, and since when.

Run it with ``python examples/straggler.py``. Rank 1 enters an all-reduce that rank 0 never enters.
After one second the log of rank 0 shows the line that rank 1 is in. At the timeout of four seconds
the scope gives up: rank 0 raises a BarrierTimeoutError, and the group is revoked, which frees rank 1.
The all-reduce of rank 1 raises, and the same BarrierTimeoutError is in the notes of that error.
"""

import logging
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import BarrierTimeoutError, RenewableGroup, collective_scope


def combine(value: torch.Tensor) -> None:
    dist.all_reduce(value)


def main(rank: int, world_size: int, port: int) -> None:
    logging.basicConfig(format=f"[rank {rank}] %(message)s", stream=sys.stdout)
    store = dist.TCPStore("127.0.0.1", port)
    world = RenewableGroup(store=store, rank=rank, world_size=world_size)
    try:
        with collective_scope(world, name="combine", warn_after=1, timeout=4):
            if rank == 1:
                combine(torch.ones(4))
    except BarrierTimeoutError as error:
        print(f"[rank {rank}] BarrierTimeoutError: {error}", flush=True)
    except RuntimeError as error:
        print(f"[rank {rank}] was freed: {type(error).__name__}", *error.__notes__, sep="\n", flush=True)
    world.destroy()


if __name__ == "__main__":
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(main, (2, server.port), nprocs=2)
