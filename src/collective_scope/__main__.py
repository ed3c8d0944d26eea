"""
``python -m collective_scope check``: see on one screen whether scopes work here, and what stands in their way.

Run it as the suite is run: alone, or under torchrun. The exit code is 0 if all is well, on every rank.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from . import CollectiveScopeError, __version__, _groups, collective_scope
from .agreement.store_thread import base_of


USAGE = "usage: [torchrun --nproc-per-node N -m | python -m] collective_scope check"

REPEATS = 100

TIMEOUT_S = 30.0

NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("3", "else NCCL's watchdog ends the process at the group's own timeout"),
    "TORCH_NCCL_BLOCKING_WAIT": ("0", "else a rank's thread stays in a wait that is not interrupted"),
}
"""For each variable of which 0 suits a group that is revoked: its default, and why."""


def main(arguments: list[str]) -> int:
    """Run the command; return the exit code."""
    if arguments != ["check"]:
        print(USAGE, file=sys.stderr)
        return 2
    print_once(f"collective_scope {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        micro = median(lambda: leave("alone")) * 1e6
        print(f"alone        one process, no peers; a scope takes {micro:.0f} µs here")
        print("next         torchrun --nproc-per-node 2 -m collective_scope check")
        return 0
    dist.init_process_group("gloo")
    try:
        with collective_scope(name="check", timeout=TIMEOUT_S, warn_after=3):
            is_well = check()
    except CollectiveScopeError as error:
        print(f"FAILED       rank {dist.get_rank()}: {error}", flush=True)
        return 1
    dist.destroy_process_group()
    return 0 if is_well else 1


def check() -> bool:
    """Print what is found, on rank 0; return whether all is well, on every rank."""
    found = _groups.find(None)
    assert found is not None  # noqa: S101  (for the type checker)
    assert found[0].barrier is not None  # noqa: S101  (for the type checker)
    assert found[0].store is not None  # noqa: S101  (for the type checker)
    control, store = found[0].barrier.control, found[0].store
    barrier, scope = median(dist.barrier), median(lambda: leave("check"))
    trip = median(lambda: store.add("collective_scope check", 0))
    base: Any = base_of(store)
    facts = (socket.gethostname(), trip, barrier, scope, control.serves, control.broken and repr(control.broken))
    everyone = exchange(store, facts)
    hosts = sorted({each[0] for each in everyone})
    print_once(f"ranks        {len(everyone)} on {len(hosts)} host{'s' * (len(hosts) > 1)}: {', '.join(hosts)}")
    serving = next((f"rank {rank}" for rank, each in enumerate(everyone) if each[4]), "none of the ranks: the launcher")
    where = f" at {base.host}, port {base.port}, served by {serving}" if isinstance(base, dist.TCPStore) else ""
    print_once(f"store        {type(base).__name__}{where}")
    trips, barriers, scopes = (max(each[place] for each in everyone) for place in (1, 2, 3))
    print_once(f"round trip   {trips * 1e3:.2f} ms to the store and back, on the slowest rank")
    print_once(f"a scope      {scopes * 1e3:.2f} ms; gloo's dist.barrier {barriers * 1e3:.2f} ms")
    broken = {rank: each[5] for rank, each in enumerate(everyone) if each[5] is not None}
    print_once(f"control      {f'ends early: {broken}' if broken else 'its thread is alive on every rank'}")
    if torch.cuda.is_available() and dist.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]  # torch has no types there
        print_once(f"GPUs         {torch.cuda.device_count()}, NCCL {version}")
        for advice in nccl_advice(os.environ):
            print_once(f"NCCL         {advice}")
    print_once("not well" if broken else "all well")
    return not broken


def nccl_advice(variables: Mapping[str, str]) -> list[str]:
    """Return the settings of NCCL that a group which is revoked should have, and has not, by the environment's variables."""
    return [
        f"{name}=0 for a RenewableGroup ({why})"
        for name, (default, why) in NCCL_SETTINGS.items()
        if variables.get(name, default) != "0"
    ]


def exchange(store: dist.Store, facts: tuple[Any, ...]) -> list[Any]:
    """Return the facts of every rank, on every rank. Not with torch's object collectives: those need numpy."""
    keys = [f"collective_scope check/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], json.dumps(facts))
    leave("facts")
    return [json.loads(store.get(key)) for key in keys]


def leave(name: str) -> None:
    """Enter a scope and leave it."""
    with collective_scope(name=name, timeout=TIMEOUT_S):
        pass


def median(call: Callable[[], object]) -> float:
    """Return how long *call* takes, in seconds."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def print_once(text: str) -> None:
    """Print on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
