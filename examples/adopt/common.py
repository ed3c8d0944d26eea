"""
Common parts of the suites: the tests that they run, the failure that is injected, the start of two ranks.

    python -m examples.adopt.vllm_parallel_worker after --fails early
    torchrun --nproc-per-node 2 -m examples.adopt.vllm_parallel_worker after --fails early

A suite has two versions, `before` and `after`, of which each rank runs one. In the second of its
three subtests, rank 1 raises before the collective ("early") or after it ("late").
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


WORLD_SIZE = 2
SIZES = (10, 20, 30)
BAD_SIZE = 20

TIMEOUT = timedelta(seconds=float(os.environ.get("ADOPT_TIMEOUT_S", "1800")))
"""Time limit of a collective; torch's default for gloo."""


def check(size: int, value: torch.Tensor | None = None, fails: str = "") -> None:
    """Test something on all ranks; on rank 1, fail where that is asked for."""
    rank = dist.get_rank()
    fails = fails or (os.environ.get("ADOPT_FAILS", "") if size == BAD_SIZE else "")
    if rank == 1 and fails == "early":
        msg = f"no room for {size}"
        raise ValueError(msg)
    value = torch.zeros(size) if value is None else value
    value += rank
    dist.all_reduce(value)
    assert value.eq(1).all()
    if rank == 1 and fails == "late":
        msg = f"wrong result for {size}"
        raise ValueError(msg)


def say(text: str) -> None:
    """Print a line with the rank."""
    print(f"[rank {os.environ['RANK']}] {text}\n", end="", flush=True)  # one call, so that lines of ranks do not mix


def launch(*versions: Callable[[], None]) -> None:
    """Run one of *versions* on two ranks, as the command line says; end what is left after some time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("version", choices=[version.__name__ for version in versions])
    parser.add_argument("--fails", choices=["early", "late"])
    parser.add_argument("--limit", type=float, default=120.0, help="seconds until all is ended")
    args = parser.parse_args()
    os.environ["ADOPT_FAILS"] = args.fails or ""
    if "RANK" in os.environ:  # a rank of torchrun's
        getattr(importlib.import_module(_module()), args.version)()
        return
    # The store is served by the parent, which outlives all ranks.
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    began = time.monotonic()
    ranks = mp.spawn(_main, (_module(), args.version, server.port, args.limit), nprocs=WORLD_SIZE, join=False)
    # Before: torch's default, by which the first rank that fails ends the other. After: it may still say what it saw.
    grace = 20.0 if args.version == "after" else None
    try:
        while not ranks.join(timeout=1.0, grace_period=grace):
            if time.monotonic() - began > args.limit + 10:  # pytest may have cancelled what the rank has set
                for process in ranks.processes:
                    process.kill()
    finally:
        print(f"ended after {time.monotonic() - began:.1f} s", flush=True)


def _module() -> str:
    """Return the name of the module that was started with ``python -m``."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None
    return spec.name


def _main(rank: int, module: str, version: str, port: int, limit: float) -> None:
    """Run one rank, with what torchrun would put into its environment."""
    faulthandler.dump_traceback_later(limit, exit=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    getattr(importlib.import_module(module), version)()
