"""
Costs of the library beside the exit: import, one process alone, sub-groups, renewal, and what long runs leave behind.

* ``import``: milliseconds on top of torch.distributed, median of five processes.
* ``alone``: microseconds of a scope on the main thread of a process without peers.
* ``threads``, ``memory``: what the first scope of a process adds.
* ``control``: share of a core that the control thread takes while nothing happens.
* ``sub-groups``: milliseconds of the first scope on each of 50 new groups, and of one gloo barrier on each.
* ``renewable``: a healthy scope on a `RenewableGroup` against one on a plain group, interleaved.
* ``renewal``: seconds from the failure of a rank until its stuck peer is back, and until the next body begins.
* ``scopes``, ``groups``: what a number of each leaves behind: keys, threads, descriptors, memory.

Two ranks on this machine. Run: ``python -m tests.benchmarks.bench_costs [--scopes 50000] [--groups 3000] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.ranks import RankPool, here, values

from collective_scope import PeerFailedError, RenewableGroup, collective_scope


Figures = dict[str, Any]

_IMPORT = """
import time, torch, torch.distributed
start = time.perf_counter()
import collective_scope
print((time.perf_counter() - start) * 1000)
"""


def measure_import() -> float:
    # As installed: compiled once.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", _IMPORT]
    runs = [subprocess.run(command, env=env, capture_output=True, text=True, check=True) for _ in range(6)]
    return statistics.median(float(run.stdout) for run in runs[1:])


def measure_alone(count: int = 20_000) -> float:
    def run(number: int) -> None:
        for _ in range(number):
            with collective_scope(name="alone"):
                pass

    run(1000)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        run(count)
        taken.append((time.perf_counter() - start) / count * 1e6)
    return min(taken)


def state() -> dict[str, float]:
    """Return what this process holds: megabytes, threads, descriptors."""
    rss = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return {
        "MB": round(int(rss.split()[1]) / 1024, 1),
        "threads": threading.active_count(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    }


def cpu_s(thread: threading.Thread) -> float:
    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def first_scope(_rank: int, _world_size: int) -> Figures:
    dist.barrier()
    before = state()
    with collective_scope(name="first"):
        pass
    after = state()
    control = next(thread for thread in threading.enumerate() if thread.name == "collective_scope-control")
    start, used = time.monotonic(), cpu_s(control)
    time.sleep(10)
    share = (cpu_s(control) - used) / (time.monotonic() - start)
    return {"before": before, "after": after, "control_share": share}


def sub_groups(_rank: int, _world_size: int, count: int = 50) -> Figures:
    scopes, barriers = [], []
    for _ in range(count):
        group = dist.new_group()
        dist.barrier()
        start = time.perf_counter()
        with collective_scope(group, name="sub"):
            pass
        scopes.append((time.perf_counter() - start) * 1000)
        start = time.perf_counter()
        dist.barrier(group)
        barriers.append((time.perf_counter() - start) * 1000)
    return {"scope_ms": statistics.median(scopes), "worst_ms": max(scopes), "barrier_ms": statistics.median(barriers)}


def renewable(rank: int, world_size: int, batches: int = 60, repeats: int = 20) -> Figures:
    group, default = dist.new_group(), dist.group.WORLD
    assert default is not None
    store = dist.PrefixStore("renewable", default.get_group_store())
    world = RenewableGroup(lambda _: group, store=store, rank=rank, world_size=world_size, destroy=int)
    # Another plain group shows how much of a difference is chance.
    groups = [("plain", group), ("another", dist.new_group()), ("renewable", world)]
    taken: dict[str, list[float]] = {name: [] for name, _ in groups}
    for batch in range(batches):
        first = batch % len(groups)
        for name, each in groups[first:] + groups[:first]:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                with collective_scope(each, name=name):
                    pass
            if batch > 2:
                taken[name].append((time.perf_counter() - start) / repeats * 1e6)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return {**medians, **{f"{name} / plain": medians[name] / medians["plain"] for name in ("another", "renewable")}}


def renewal(rank: int, world_size: int, count: int = 20) -> Figures:
    world = RenewableGroup(store=here().new_store(), rank=rank, world_size=world_size)
    made, freed, following = [], [], []
    for number in range(count):
        failed_at = here().new_store()
        key = f"failed {number}"
        start = time.monotonic()
        with collective_scope(world, name=f"healthy {number}", timeout=60):
            made.append(time.monotonic() - start)
            dist.all_reduce(torch.ones(1))
            if number:
                following.append(time.monotonic())
        try:
            with collective_scope(world, name=f"failing {number}", timeout=60):
                if rank == number % world_size:
                    failed_at.set(key, str(time.monotonic()))
                    raise ValueError  # noqa: TRY301  (raised into the scope under test)
                dist.all_reduce(torch.ones(1))
        except (RuntimeError, ValueError):
            if rank != number % world_size:
                freed.append(time.monotonic() - float(failed_at.get(key)))
    world.destroy()
    return {"made_s": made[0], "renewed_s": statistics.median(made[1:]), "freed_s": freed, "worst_freed_s": max(freed)}


def many_scopes(rank: int, _world_size: int, count: int) -> Figures:
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  (torch has no public name for it)

    def run(number: int) -> None:
        try:
            with collective_scope(name="many"):
                if number % 10 == rank:
                    raise ValueError(number)  # noqa: TRY301  (raised into the scope under test)
        except (ValueError, PeerFailedError):
            pass

    import logging  # noqa: PLC0415  (imported where it is needed)

    logging.getLogger("collective_scope").setLevel(logging.CRITICAL)
    for number in range(500):
        run(number)
    before = state() | {"keys": store.num_keys()}
    start = time.monotonic()
    for number in range(count):
        run(number)
    seconds = time.monotonic() - start
    time.sleep(31)  # news stays for half a minute
    with collective_scope(name="last"):
        pass
    time.sleep(1)
    return {"before": before, "after": state() | {"keys": store.num_keys()}, "seconds": round(seconds, 1)}


def many_groups(_rank: int, _world_size: int, count: int) -> Figures:
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  (torch has no public name for it)

    def run() -> None:
        group = dist.new_group()
        with collective_scope(group, name="group"):
            pass
        dist.destroy_process_group(group)

    def bare() -> None:
        dist.destroy_process_group(dist.new_group())

    with collective_scope(name="first"):
        pass
    for _ in range(20):
        run()
    dist.barrier()
    keys = [store.num_keys()]
    for _ in range(count):
        bare()
    dist.barrier()
    keys.append(store.num_keys())
    before = state()
    start = time.monotonic()
    for _ in range(count):
        run()
    seconds = time.monotonic() - start
    time.sleep(1)
    dist.barrier()
    keys.append(store.num_keys())
    told = {"keys_of_torch": keys[1] - keys[0], "keys_with_scope": keys[2] - keys[1]}
    return {"before": before, "after": state(), "seconds": round(seconds, 1), **told}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scopes", type=int, default=0)
    parser.add_argument("--groups", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures: Figures = {"import_ms": measure_import(), "alone_us": measure_alone()}
    print(figures, flush=True)
    cases: list[tuple[Any, ...]] = [(first_scope,), (sub_groups,), (renewable,)]
    cases += [(many_scopes, args.scopes)] if args.scopes else []
    cases += [(many_groups, args.groups)] if args.groups else []
    for case, *arguments in cases:
        with RankPool(2, host="parent") as pool:
            figures[case.__name__] = values(pool.run(case, *arguments, timeout=3600.0))
        print(case.__name__, *figures[case.__name__], sep="\n  ", flush=True)
    with RankPool(2, init=False, host="parent") as pool:
        figures["renewal"] = values(pool.run(renewal, timeout=600.0))
    print("renewal", *figures["renewal"], sep="\n  ", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    from tests.benchmarks import bench_costs  # ranks import what they run, so it must not be in __main__

    sys.exit(bench_costs.main())
