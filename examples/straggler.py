"""
One rank is stuck: every other rank says which, where, and since when.

Run it with ``python examples/straggler.py``. Rank 1 enters an all-reduce that
its peers never enter. At the deadline of two seconds the peers raise the same
BarrierTimeoutError, which shows the line that rank 1 is in. Then they leave,
and rank 1's collective fails because its peer is gone.
"""

import logging
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import BarrierTimeoutError, collective_scope


def combine(value: torch.Tensor) -> None:
    dist.all_reduce(value)


def main(rank: int, world_size: int, port: int) -> None:
    logging.basicConfig(level=logging.CRITICAL)  # the messages below say it all
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        with collective_scope(name="combine", timeout=2):
            if rank == 1:
                combine(torch.ones(4))
    except BarrierTimeoutError as error:
        print(f"[rank {rank}] {type(error).__name__}: {error}", flush=True)
    except RuntimeError:
        print(f"[rank {rank}] was freed when its peer left", flush=True)
        sys.exit(0)


if __name__ == "__main__":
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(main, (2, server.port), nprocs=2)
