"""
The smallest possible use: a body, a cleanup, and two ranks that leave together.

Run it with ``python examples/hello_scope.py``. Each rank prints a line when its
body ends, when it cleans up, and when it has left; no rank leaves before both
have cleaned up, although rank 1 is much slower.
"""

import time

import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import collective_scope


def main(rank: int, world_size: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)

    with collective_scope() as scope:
        scope.cleanup(print, f"rank {rank} cleans up", flush=True)
        time.sleep(rank)  # the test that would be here
        print(f"rank {rank} ends its body", flush=True)
    print(f"rank {rank} has left", flush=True)

    dist.destroy_process_group()


if __name__ == "__main__":
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(main, (2, server.port), nprocs=2)
