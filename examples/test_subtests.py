"""
A test to copy: ranks that stay, and run subtests in a loop.

Run it with ``python -m pytest examples/test_subtests.py``. It shows each verb where it belongs: a buffer that
all ranks make and destroy together is held, and destroyed by a collective cleanup; a check of
numbers comes after the last collective. For ranks that may be lost, see ``examples/pool``.
"""

import logging

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import RenewableGroup, Subtests, current_scope


WORLD_SIZE = 2


class Buffer:
    """Stands for what all ranks make and destroy together, such as DeepEP's buffers."""

    def __init__(self, size: int) -> None:
        self.value = torch.zeros(size)
        dist.barrier()

    def destroy(self) -> None:
        """Free it, together with all peers."""
        dist.barrier()


def subtest(size: int) -> None:
    scope = current_scope()
    buffer = scope.hold(Buffer(size))  # alive on every rank until after the barrier
    scope.collective_cleanup(buffer.destroy, fingerprint=lambda: buffer.value.shape)
    buffer.value += dist.get_rank() + 1
    dist.all_reduce(buffer.value)
    assert buffer.value.eq(3).all()  # after the collectives: a rank that fails strands nobody


def worker(rank: int, port: int) -> None:
    logging.basicConfig(force=True)  # where a failing rank logs its traceback; force, if pytest has forked this process
    store = dist.TCPStore("127.0.0.1", port)
    world = RenewableGroup(store=store, rank=rank, world_size=WORLD_SIZE)
    with Subtests(world, timeout=60) as subtests:  # raises at the end, on every rank, if a subtest failed on any
        for size in (10, 1000):
            subtests.run(f"size-{size}", subtest, size)
    world.destroy()


def test_subtests() -> None:
    # The store is served by the parent, which outlives all ranks: one that dies does not take it away.
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = mp.spawn(worker, (server.port,), nprocs=WORLD_SIZE, join=False)
    while not ranks.join(grace_period=20):  # when a rank has failed, the others have 20 s to say what they saw
        pass
