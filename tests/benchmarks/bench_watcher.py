"""
What the watcher costs: a thread that answers for its process, one in each.

Three figures, of two ranks on this machine:

* the cost of an empty scope with the watcher and without, interleaved in the same
  processes on the same group, and as a control without and without;
* the CPU time of the watcher's thread while its process idles, as a share of a core;
* how many connections to the store it keeps.

Run: ``python -m tests.benchmarks.bench_watcher [--seconds 60] [--batches 40]``
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import _groups, collective_scope


BATCH_S = 0.5
"""A batch: longer than the period of the watcher."""

SETTLE_S = 2.0
"""A new watcher looks more often at first."""


def empty_scope() -> None:
    with collective_scope(name="bench"):
        pass


def connections(port: int) -> int:
    """Count the connections of this process to the store."""
    links = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # what this loop itself had opened
            links.add(os.readlink(fd))  # noqa: PTH115
    count = 0
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:]:
            fields = row.split()
            is_to_store = int(fields[2].rpartition(":")[2], 16) == port and fields[3] == "01"
            count += is_to_store and f"socket:[{fields[9]}]" in links
    return count


def cpu_s(thread: threading.Thread) -> float:
    """Return the CPU time that a thread has taken so far."""
    return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9


def watcher_thread() -> threading.Thread:
    (thread,) = (each for each in threading.enumerate() if each.name == "collective_scope-watcher")
    return thread


class Switch:
    """Turns the watcher of this process off and on."""

    def __init__(self) -> None:
        group = dist.group.WORLD
        assert group is not None
        self.store = group.get_group_store()
        self.barrier: Any = _groups._barriers[group]  # noqa: SLF001  (no user turns it off)

    def set(self, *, on: bool) -> None:
        """Start the watcher, or stop it and wait until it has."""
        if on == (self.barrier.watcher is not None):
            return
        if on:
            self.barrier.watcher = _groups._watcher(self.store, self.barrier.connect)  # noqa: SLF001
        else:
            thread = watcher_thread()
            self.barrier.watcher = None
            thread.join()


def time_batch() -> float:
    """Return the median of the microseconds that an empty scope takes; of the slower rank."""
    dist.barrier()
    taken, stop = [], torch.zeros(1)
    end = time.perf_counter() + BATCH_S
    while not stop.item():
        for _ in range(50):
            start = time.perf_counter()
            empty_scope()
            taken.append((time.perf_counter() - start) * 1e6)
        stop = torch.tensor([float(time.perf_counter() > end)])
        dist.all_reduce(stop)
    median = torch.tensor([statistics.median(taken)], dtype=torch.float64)
    dist.all_reduce(median, dist.ReduceOp.MAX)
    return median.item()


def measure(rank: int, world_size: int, port: int, seconds: float, batches: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    empty_scope()
    switch = Switch()
    with_it = connections(port)
    dist.barrier()
    switch.set(on=False)
    without_it = connections(port)
    taken: dict[str, list[float]] = {"on": [], "off": [], "off again": []}
    for batch in range(batches):
        for name in (list(taken), list(reversed(taken)))[batch % 2]:
            dist.barrier()
            switch.set(on=name == "on")
            if name == "on":
                time.sleep(SETTLE_S)
            taken[name].append(time_batch())
    switch.set(on=True)
    time.sleep(SETTLE_S)
    dist.barrier()
    thread = watcher_thread()
    before, start = cpu_s(thread), time.monotonic()
    time.sleep(seconds)
    share = torch.tensor([(cpu_s(thread) - before) / (time.monotonic() - start)])
    dist.all_reduce(share, dist.ReduceOp.MAX)
    if rank == 0:
        medians = {name: statistics.median(values) for name, values in taken.items()}
        ratios = sorted(on / off for on, off in zip(taken["on"], taken["off"], strict=True))
        quarters = statistics.quantiles(ratios, n=4) if batches > 1 else [ratios[0]] * 3
        print(f"empty scope, us: {', '.join(f'{name} {value:.0f}' for name, value in medians.items())}")
        print(f"with / without: {medians['on'] / medians['off']:.3f}, quartiles of the batches {quarters[0]:.3f} to"
              f" {quarters[2]:.3f}; without / without: {medians['off again'] / medians['off']:.3f}")  # fmt: skip
        print(f"idle: {share.item() * 100:.3f} % of a core over {seconds:.0f} s, the busier of {world_size} watchers")
        print(f"connections to the store: {with_it} with the watcher, {without_it} without", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--batches", type=int, default=40)
    args = parser.parse_args()
    server = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    mp.spawn(measure, (2, server.port, args.seconds, args.batches), nprocs=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
