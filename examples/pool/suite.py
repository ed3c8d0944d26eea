"""
A suite to copy: subtests that all ranks run together, of which some go wrong.

    python -m examples.pool.suite        # exits with 1: three of six fail
    pytest examples/pool                 # each subtest is one pytest item
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import torch
import torch.distributed as dist

from collective_scope import Subtests

from .pool import Pool


WORLD_SIZE = 2


def sum_of_ranks() -> None:
    """Add up over all ranks."""
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value)
    assert value.item() == sum(range(dist.get_world_size()))


def fails_before_its_collectives() -> None:
    """Raise on one rank, while its peers wait for it in a collective."""
    if dist.get_rank() == 1:
        msg = "shapes differ"
        raise ValueError(msg)
    sum_of_ranks()


def loses_a_rank() -> None:
    """Lose a rank, as a segmentation fault or the kernel's memory killer does."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sum_of_ranks()


def holds_the_interpreter() -> None:
    """Get stuck on one rank in native code, as in a kernel that spins: nothing but `kill_after` ends that."""
    if dist.get_rank() == 1:
        ctypes.PyDLL(None).sleep(600)
    sum_of_ranks()


HEALTHY = {f"sum-{number}": sum_of_ranks for number in range(3)}

SUBTESTS = {
    "sum-0": sum_of_ranks,
    "fails": fails_before_its_collectives,
    "sum-1": sum_of_ranks,
    "is-lost": loses_a_rank,
    "is-stuck": holds_the_interpreter,
    "sum-2": sum_of_ranks,
}


def main() -> int:
    """Run all subtests; print one report."""
    try:
        with Subtests() as report, Pool(WORLD_SIZE, kill_after=3.0, verbose=True) as pool:
            for name, fn in SUBTESTS.items():
                pool.run(name, fn, report=report)
    except ExceptionGroup:
        return 1  # the report says it all
    return 0


if __name__ == "__main__":
    sys.exit(main())
