"""Start one process a rank, wait until a deadline, bring back what each rank has to say."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


HOST = "127.0.0.1"
GROUP_TIMEOUT_S = 60.0
"""After this a collective whose peer failed gives up. Generous: ranks may share one core."""

STACK_DUMP_S = 2.0


class DeadlineError(TimeoutError):
    """The ranks were still running at the deadline. Their stacks are on stderr."""


def launch(target: Callable[..., Any], world_size: int, args: tuple[Any, ...], *, deadline_s: float) -> list[Any]:
    """
    Run ``target(rank, *args)`` on *world_size* ranks with `torch.distributed` initialised.

    Returns:
        What each rank returned, by rank. It travels as JSON.

    Raises:
        DeadlineError: If ranks are left after *deadline_s* seconds; they are killed.
        torch.multiprocessing.ProcessException: If a rank raised or died; so are its peers.
    """
    # The store lives here, so that no rank's end takes it away from the others, and the
    # system chooses the port, so that it is free.
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    context = mp.spawn(  # type: ignore[no-untyped-call]
        _run_rank, (target, world_size, store.port, args), nprocs=world_size, join=False
    )
    deadline = time.monotonic() + deadline_s
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                running = [r for r, p in enumerate(context.processes) if p.is_alive()]
                _dump_stacks(context.processes)
                msg = f"ranks {running} of {world_size} still run after {deadline_s:.0f} s"
                raise DeadlineError(msg)
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [json.loads(store.get(_report_key(rank))) for rank in range(world_size)]


def _run_rank(rank: int, target: Callable[..., Any], world_size: int, port: int, args: tuple[Any, ...]) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)  # one core a rank at best; more threads only get in the way
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    # Ranks are on one host; asking the resolver for its name may take seconds.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore(HOST, port, is_master=False)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )
    report = target(rank, *args)
    store.set(_report_key(rank), json.dumps(report))
    dist.destroy_process_group()


def _report_key(rank: int) -> str:
    return f"report/{rank}"


def _dump_stacks(processes: list[Any]) -> None:
    """Let every rank write its stacks to stderr, then give it a moment to do so."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    limit = time.monotonic() + STACK_DUMP_S
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
