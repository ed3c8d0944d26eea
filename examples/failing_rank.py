"""
One rank fails: every rank learns of it, and the next subtest runs.

Run it with ``python examples/failing_rank.py``. In the second of three
subtests, rank 1's check fails after its collectives, as a comparison of
numbers does. Rank 1 gets its own AssertionError and logs it at once; rank 0,
on which all went well, gets a PeerFailedError with rank 1's traceback. Without
a scope, rank 0 would go on to the third subtest alone.
"""

import logging
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import collective_scope


def subtest(rank: int, value: int) -> None:
    total = torch.tensor(value + rank)
    dist.all_reduce(total)
    expected = 2 * value + (2 if value == 20 and rank == 1 else 1)
    assert total.item() == expected, f"expected {expected}, got {total.item()}"


def main(rank: int, world_size: int, port: int) -> None:
    logging.basicConfig(format=f"[rank {rank}] %(levelname)s %(message)s", stream=sys.stdout)
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for value in (10, 20, 30):
        try:
            with collective_scope(name=f"value-{value}", failure_timeout=10):
                subtest(rank, value)
        except Exception as error:  # noqa: BLE001  (a suite goes on to its next subtest)
            print(f"[rank {rank}] value-{value} FAILED: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"[rank {rank}] value-{value} passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(main, (2, server.port), nprocs=2)
