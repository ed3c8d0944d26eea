"""
Cost of leaving a scope, as a ratio against what people do today.

Everything is measured interleaved in the same processes. ``floor`` is the least that this design
can cost: ``add`` to the count and ``get`` of the verdict, on a second thread, and nothing else.

* ``tight``: many calls in a row; microseconds a call on the slowest rank, median over batches.
* ``once``: one call after a body of 3 ms, so that no rank is hot; microseconds from the last arrival
  to the last release, which is what a test suite pays; median.
* ``simulated``: up to 1 024 ranks, threads that run the real agreement, or the floor, over one TCPStore.
* ``mpi``: the same in an MPI job, with mpi4py's barrier, which keeps a core busy while it waits.
* ``far``: two ranks on two hosts, network namespaces, with a delay between them.

Prints a table; ``--json FILE`` writes the figures, ``--plot FILE`` draws them (matplotlib, extra ``benchmark``).

Run: ``python -m tests.benchmarks.bench_exit [--ranks 2 4 8 16] [--batches 40] [--simulated 64 1024] [--mpi 2] [--far 1 10]``
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.hosts import HostsError, two_hosts
from torch.distributed.elastic.utils.store import barrier as elastic_barrier

from collective_scope import collective_scope
from collective_scope.agreement.part import Part
from collective_scope.agreement.records import Record
from collective_scope.agreement.wait import Wait


LOOPBACK = "127.0.0.1"
FOREVER = timedelta(days=1)
BODY_S = 0.003

Call = Callable[[], object]
Figures = dict[str, float]


class Floor:
    """``add``, ``get`` and nothing else, on a thread of its own; the keys of the round before are removed."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.round = rank, world_size, 0
        self.jobs: SimpleQueue[Any] = SimpleQueue()
        self.replies: SimpleQueue[Any] = SimpleQueue()
        client = store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def __call__(self) -> None:
        """Wait for all ranks."""
        self.jobs.put(self.round)
        self.round += 1
        self.replies.get(timeout=60)

    def _serve(self, store: dist.Store) -> None:
        store.set_timeout(FOREVER)
        while True:
            number = self.jobs.get()
            is_last = store.add(f"floor/{number}/n", 1) == self.world_size
            if is_last:
                store.compare_set(f"floor/{number}/v", "", "ok")
            else:
                store.get(f"floor/{number}/v")
            self.replies.put(None)
            if is_last and number:
                store.delete_key(f"floor/{number - 1}/n")
                store.delete_key(f"floor/{number - 1}/v")


def empty_scope() -> None:
    with collective_scope(name="bench"):
        pass


def barrier_and_gather() -> None:
    dist.barrier()
    outcomes: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (dist.get_rank(), "ok", None))


def numbered(call: Callable[[int], object]) -> Call:
    """Return a function that calls *call* with a number that is new each time."""
    count = iter(range(10**9))
    return lambda: call(next(count))


def cases_of(store: dist.Store, rank: int, world_size: int) -> dict[str, tuple[Call, int]]:
    """Return what is measured, and how often it is called in a batch."""
    cases: dict[str, tuple[Call, int]] = {
        "scope": (empty_scope, 20),
        "floor": (Floor(store, rank, world_size), 20),
        "dist.barrier": (dist.barrier, 20),
        "barrier + all_gather_object": (barrier_and_gather, 2),
        "elastic barrier": (
            numbered(lambda n: elastic_barrier(store, world_size, f"elastic/{n}", barrier_timeout=60)),
            5,
        ),
    }
    if not torch.cuda.is_available():
        cases["monitored_barrier"] = (functools.partial(dist.monitored_barrier, timeout=timedelta(seconds=60)), 5)
    if "mpi4py.MPI" in sys.modules:
        cases["mpi4py barrier"] = (sys.modules["mpi4py.MPI"].COMM_WORLD.Barrier, 20)
    if hasattr(dist.Store, "barrier"):  # torch 2.12 and newer
        cases["Store.barrier"] = (
            numbered(lambda n: store.barrier(f"store/{n}", world_size, timedelta(seconds=60))),  # type: ignore[attr-defined]  # missing in torch's stubs
            5,
        )
    return cases


def measure_tight(cases: dict[str, tuple[Call, int]], batches: int) -> Figures:
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(batches):
        for name, (call, repeats) in cases.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            taken[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(reduce_max(values)) for name, values in taken.items()}


def measure_once(cases: dict[str, tuple[Call, int]], batches: int) -> Figures:
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in cases}
    for _ in range(batches):
        for name, (call, _) in cases.items():
            arrivals, releases = taken[name]
            if name == "scope":
                with collective_scope(name="bench"):
                    time.sleep(BODY_S)
                    arrivals.append(time.monotonic())  # one clock for all processes of a machine
            else:
                time.sleep(BODY_S)
                arrivals.append(time.monotonic())
                call()
            releases.append(time.monotonic())
    return {
        name: statistics.median(
            (last_out - last_in) * 1e6
            for last_in, last_out in zip(reduce_max(arrivals), reduce_max(releases), strict=True)
        )
        for name, (arrivals, releases) in taken.items()
    }


def reduce_max(values: list[float]) -> list[float]:
    """Return, for each of the *values*, the greatest of all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64)
    tensor = tensor.cuda() if torch.cuda.is_available() else tensor
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [float(value) for value in tensor]


def run_rank(  # noqa: PLR0917  (passed on by mp.spawn)
    rank: int, world_size: int, host: str, port: int, batches: int, result: SimpleQueue[Any]
) -> None:
    torch.set_num_threads(1)
    meeting = dist.TCPStore(host, port, wait_for_workers=False)
    # Rank 0 serves the group's store, as after a plain init_process_group.
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        meeting.set("port", str(store.port))
    else:
        store = dist.TCPStore(host, int(meeting.get("port")), wait_for_workers=False)
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if is_gpu else "gloo", store=store, rank=rank, world_size=world_size)
    cases = cases_of(store, rank, world_size)
    measure_tight(cases, 3)  # warm up
    figures = {"tight": measure_tight(cases, batches), "once": measure_once(cases, 2 * batches)}
    if rank == 0:
        result.put(figures)
    dist.barrier()
    dist.destroy_process_group()


def measure(world_size: int, batches: int) -> dict[str, Figures]:
    server = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    result = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run_rank, (world_size, LOOPBACK, server.port, batches, result), nprocs=world_size)
    return result.get()  # type: ignore[no-any-return]  # of the type that was put in


# An MPI job


def measure_mpi(world_size: int, batches: int) -> dict[str, Figures]:
    """Return the figures of the ranks of an MPI job, those of the other barriers included."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.defpath}") or "mpirun"
    launcher = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", str(world_size)]
    rank = [sys.executable, "-m", "tests.benchmarks.bench_exit", "--rank-of-mpi", str(batches)]
    done = subprocess.run([*launcher, *rank], stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]  # of the type that was put in


def run_rank_of_mpi(batches: int) -> None:
    from mpi4py import MPI  # noqa: PLC0415  (the import begins MPI)

    comm = MPI.COMM_WORLD
    server = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    result: SimpleQueue[Any] = SimpleQueue()
    run_rank(comm.rank, comm.size, LOOPBACK, comm.bcast(server and server.port), batches, result)
    if comm.rank == 0:
        print(json.dumps(result.get()), flush=True)
    comm.Barrier()
    del server


# Simulated ranks


def simulate(world_size: int, rounds: int = 20, *, floor: bool = False) -> float:
    """Return microseconds a rank and round, of ranks that are threads of two processes and one TCPStore."""
    server = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    result = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run_simulated, (world_size, server.port, rounds, floor, result), nprocs=2)
    return max(result.get(), result.get())


def run_simulated(  # noqa: PLR0917  (passed on by mp.spawn)
    process: int,
    world_size: int,
    port: int,
    rounds: int,
    floor: bool,  # noqa: FBT001  (passed on by mp.spawn)
    result: SimpleQueue[Any],
) -> None:
    threading.stack_size(256 * 1024)
    store = dist.TCPStore(LOOPBACK, port, wait_for_workers=False)
    ranks = range(process, world_size, 2)
    barrier = threading.Barrier(len(ranks) + 1)

    def run(rank: int) -> None:
        part = Part(store.clone, rank, world_size, lambda: None, deque())  # type: ignore[attr-defined]  # missing in torch's stubs
        client = part.connect()
        replies: SimpleQueue[Any] = SimpleQueue()
        for number in range(rounds + 2):
            if number in (2, rounds + 1):
                barrier.wait()
            if floor:
                if client.add(f"floor/{number}/n", 1) == world_size:
                    client.compare_set(f"floor/{number}/v", "", "ok")
                else:
                    client.get(f"floor/{number}/v")
                continue
            now = time.monotonic()
            record = Record(f"{number} simulated", "exit", arrived=True)
            part.attend(Wait(record, now, now + 600, 60, None, replies), is_looked_after=True, store=client)
            assert replies.get().ok

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.monotonic()
    barrier.wait()
    result.put((time.monotonic() - start) / (rounds - 1) / world_size * 1e6)
    for thread in threads:
        thread.join()


# Ranks that are far apart


def measure_far(delay_ms: float, batches: int) -> dict[str, Figures]:
    """Return the figures of two ranks with a round trip of *delay_ms* milliseconds between them."""
    with two_hosts() as hosts:
        for host in hosts:
            command = ["tc", "qdisc", "add", "dev", "cable", "root", "netem", "delay", f"{delay_ms / 2}ms"]
            subprocess.run([*host.prefix, *command], check=True, timeout=20)
        port = "29517"
        arguments = [sys.executable, "-m", "tests.benchmarks.bench_exit", "--rank-of-two"]
        ranks = [
            subprocess.Popen(
                [*host.prefix, *arguments, str(rank), hosts[0].address, port, str(batches)],
                env=host.env | {"GLOO_SOCKET_IFNAME": "cable"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(hosts)
        ]
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    return json.loads(outputs[0].splitlines()[-1])  # type: ignore[no-any-return]  # of the type that was put in


def run_rank_of_two(rank: int, address: str, port: int, batches: int) -> None:
    server = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False)
    result: SimpleQueue[Any] = SimpleQueue()
    run_rank(rank, 2, address, port, batches, result)
    if rank == 0:
        print(json.dumps(result.get()), flush=True)
    del server


# Results


def rows_of(label: str, figures: dict[str, Figures]) -> list[str]:
    rows = []
    for how, values in figures.items():
        scope = values["scope"]
        cells = " | ".join(f"{name} {value:.0f} ({scope / value:.2f})" for name, value in values.items())
        rows.append(f"{label}, {how}: {cells}")
    return rows


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415  (an extra)

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, how in zip(axes, ("once", "tight"), strict=True):
        sizes = sorted(int(size) for size in results["ranks"])
        for name in results["ranks"][str(sizes[0])][how]:
            axis.plot(sizes, [results["ranks"][str(size)][how][name] for size in sizes], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="ranks", title=how, xticks=sizes, xticklabels=sizes)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run_as_rank(args: argparse.Namespace) -> bool:
    """Be one of the ranks that this program has started itself, if it is; return whether."""
    if args.rank_of_mpi:
        run_rank_of_mpi(args.rank_of_mpi)
    elif args.rank_of_two:
        rank, address, port, batches = args.rank_of_two
        run_rank_of_two(int(rank), address, int(port), int(batches))
    return bool(args.rank_of_mpi or args.rank_of_two)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--simulated", type=int, nargs="*", default=[])
    parser.add_argument("--mpi", type=int, nargs="*", default=[])
    parser.add_argument("--far", type=float, nargs="*", default=[], metavar="MS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rank-of-two", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--rank-of-mpi", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if run_as_rank(args):
        return 0
    results: dict[str, Any] = {"ranks": {}, "simulated": {}, "mpi": {}, "far": {}}
    print("microseconds (scope / this):", flush=True)
    for world_size in args.ranks:
        results["ranks"][str(world_size)] = figures = measure(world_size, args.batches)
        print(*rows_of(f"{world_size} ranks", figures), sep="\n", flush=True)
    for world_size in args.mpi:
        results["mpi"][str(world_size)] = figures = measure_mpi(world_size, args.batches)
        print(*rows_of(f"{world_size} ranks of MPI", figures), sep="\n", flush=True)
    for world_size in args.simulated:
        taken = {"scope": simulate(world_size), "floor": simulate(world_size, floor=True)}
        results["simulated"][str(world_size)] = taken
        text = " | ".join(f"{name} {value:.1f}" for name, value in taken.items())
        print(f"{world_size} simulated ranks, a rank and round: {text}", flush=True)
    for delay in args.far:
        try:
            results["far"][str(delay)] = figures = measure_far(delay, args.batches // 4)
        except (HostsError, subprocess.CalledProcessError) as error:
            print(f"{delay} ms apart: not measured here: {error}", flush=True)
        else:
            print(*rows_of(f"2 ranks {delay} ms apart", figures), sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.plot:
        draw(results, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
