"""
What leaving a scope costs, as a ratio against what people do today.

Measured interleaved in the same processes: an empty scope, a bare
``dist.barrier()``, and ``dist.barrier()`` plus ``all_gather_object`` of an
outcome (the usual way to agree). Beside them, what no barrier over a store can
go below: the two calls, ``add`` and ``wait`` or ``set``, made on the main
thread, where nothing bounds them; and the same on a thread of their own, so
that they are bounded, with the confirmations for which a rank that hosts the
store must wait before it may end. Medians over batches, of the slowest rank.
The store is hosted by rank 0, as after a plain ``init_process_group``, or by a
process that is no rank, as under torchrun.

Run: ``python -m tests.benchmarks.bench_exit [--ranks 2 4 8] [--batches 60] [--host rank0 launcher]``
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable

import attrs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import collective_scope
from collective_scope._store_thread import StoreThread


def empty_scope() -> None:
    with collective_scope(name="bench"):
        pass


def barrier_and_gather() -> None:
    dist.barrier()
    outcomes: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (dist.get_rank(), "ok", None))


@attrs.define
class StoreCalls:
    """The least that a barrier over a store does: nothing is told, agreed or removed."""

    store: dist.Store
    prefix: str
    host: int | None = None
    """The rank that waits for confirmations."""
    thread: StoreThread | None = None
    rounds: int = 0

    def __call__(self) -> None:
        """Wait for all ranks, once."""
        self.rounds += 1
        if self.thread is None:
            self._meet(self.store)
        else:
            self.thread.call(self._meet, 60.0)

    def _meet(self, store: dist.Store) -> None:
        key, rank, world_size = f"{self.prefix}/{self.rounds}", dist.get_rank(), dist.get_world_size()
        is_last = store.add(key, 1) == world_size
        if is_last:
            store.set(f"{key}/ok", "")
        if rank == self.host:
            store.wait([f"{key}/seen/{peer}" for peer in range(world_size) if peer != rank])
        elif not is_last:
            store.wait([f"{key}/ok"])
        if self.host not in (None, rank):
            store.set(f"{key}/seen/{rank}", "")


CASES: dict[str, tuple[Callable[[], object], int]] = {
    "empty scope": (empty_scope, 20),
    "dist.barrier": (dist.barrier, 20),
    "barrier + all_gather_object": (barrier_and_gather, 2),
}


def measure(rank: int, world_size: int, host: str, port: int, batches: int) -> None:
    torch.set_num_threads(1)
    meeting = dist.TCPStore("127.0.0.1", port, is_master=False)
    store = meeting
    if host == "rank0":
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            meeting.set("port", str(store.port))
        else:
            store = dist.TCPStore("127.0.0.1", int(meeting.get("port")), is_master=False)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= world_size else "gloo"
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    bounded = StoreCalls(store, "bounded", 0 if host == "rank0" else None, StoreThread(store.clone))
    cases = CASES | {"two store calls": (StoreCalls(store, "bare"), 20), "bounded": (bounded, 20)}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(batches):
        for name, (call, repeats) in cases.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            taken[name].append((time.perf_counter() - start) / repeats * 1e6)
    for name, values in taken.items():
        slowest = torch.tensor(values, dtype=torch.float64)
        if "nccl" in backend:
            slowest = slowest.cuda()
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        taken[name] = slowest.tolist()
    if rank == 0:
        medians = {name: statistics.median(values) for name, values in taken.items()}
        scope = medians["empty scope"]
        row = " | ".join(f"{name} {value:8.0f} us" for name, value in medians.items())
        ratios = (scope / medians["dist.barrier"], scope / medians["barrier + all_gather_object"])
        print(f"{world_size:2} ranks, store in {host} | {row} | scope / barrier {ratios[0]:.2f}"
              f" | scope / (barrier + gather) {ratios[1]:.3f}", flush=True)  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--host", nargs="+", choices=["rank0", "launcher"], default=["rank0", "launcher"])
    args = parser.parse_args()
    for world_size, host in itertools.product(args.ranks, args.host):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        mp.spawn(measure, (world_size, host, server.port, args.batches), nprocs=world_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
