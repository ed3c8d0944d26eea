"""
The deadlock that started it, and every way to end a subtest, by name.

A manager caches communication buffers weakly. Building and destroying one are collectives;
the layer that owns it sits in a reference cycle. The garbage collector then decides, on
each rank for itself, when a buffer is gone, and `manager.destroy()` is a collective over
whatever is left. Here the collector runs on rank 1 only.

    python examples/weak_cache_deadlock.py
    python examples/weak_cache_deadlock.py --variant pull_request --repeat 10
    python examples/weak_cache_deadlock.py --backend symm_mem    # two GPUs or more
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import attrs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import CleanupMismatchError, PeerFailedError, collective_scope
from test_moe_layer.backends import All2AllManager, make_manager, why_unavailable


SUBTESTS = 3
TOKENS, HIDDEN = 16, 2048
START_S = 120.0
"""Longest start-up. A variant's own time counts from when all ranks are ready."""

STACK_S = 5.0
LANDMARKS = ("collect_garbage", "destroy", "get_handle", "dispatch", "combine", "barrier")
"""Where a hanging rank is: the outermost of these on its stack."""


Manager = All2AllManager[Any]


class Layer:
    """Owns a buffer, as vLLM's layers do, and sits in a reference cycle, as they do."""

    def __init__(self, manager: Manager, *, in_cycle: bool) -> None:
        self.manager = manager
        self.handle = manager.get_handle(max_tokens=TOKENS, hidden=HIDDEN, top_k=1, num_experts=dist.get_world_size())
        self.cycle = self if in_cycle else None

    def check(self) -> None:
        """Send every token to the next rank, have it doubled there, compare."""
        device, rank = self.manager.device, self.manager.rank
        tokens = torch.full((TOKENS, HIDDEN), 1.0 + rank, dtype=torch.bfloat16, device=device)
        weights = torch.ones(TOKENS, 1, device=device)
        experts = torch.full((TOKENS, 1), (rank + 1) % dist.get_world_size(), device=device)
        sent = self.manager.dispatch(self.handle, tokens, weights, experts)
        doubled = self.manager.combine(self.handle, 2 * sent.tokens, sent)
        torch.testing.assert_close(doubled, 2 * tokens)


class SelfDestroyingLayer(Layer):
    """Leaves the collective to its destructor."""

    def __del__(self) -> None:
        self.handle.destroy()


class PlannedError(Exception):
    """Raised on rank 0 alone, after the last collective of a subtest."""


def collect_garbage(rank: int) -> None:
    """
    Stand in for the automatic collector, which comes when it likes: here on rank 1, now.

    Where it is switched off it does not come.
    """
    if rank == 1 and gc.isenabled():
        gc.collect()


def run_layer(
    manager: Manager,
    *,
    layer_type: type[Layer] = Layer,
    in_cycle: bool = True,
    fails: bool = False,
    hold: Callable[[Layer], object] = id,
) -> None:
    """Be the body of a subtest. On return the layer is out of use, but not yet gone."""
    layer = layer_type(manager, in_cycle=in_cycle)
    hold(layer)
    layer.check()
    if fails and manager.rank == 0:
        msg = "rank 0 fails on purpose"
        raise PlannedError(msg)


def end_as_pull_request(manager: Manager) -> None:
    """Do what vLLM PR #40767 does in ``finally``."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    manager.destroy()
    dist.barrier()


def no_teardown(manager: Manager, _number: int) -> None:
    """Do nothing: the next subtest asks the cache again."""
    run_layer(manager)
    collect_garbage(manager.rank)


def destructor(manager: Manager, _number: int) -> None:
    """Leave it to the buffer's destructor, which is a collective; then a barrier."""
    run_layer(manager, layer_type=SelfDestroyingLayer)
    collect_garbage(manager.rank)
    dist.barrier()


def pull_request(manager: Manager, _number: int) -> None:
    """Synchronize, destroy, barrier in ``finally``."""
    try:
        run_layer(manager)
        collect_garbage(manager.rank)
    finally:
        end_as_pull_request(manager)


@contextlib.contextmanager
def naive_scope(manager: Manager) -> Iterator[None]:
    """Put the pull request into a context manager, as one would."""
    try:
        yield
    finally:
        end_as_pull_request(manager)


def naive_with(manager: Manager, _number: int) -> None:
    """Do the same in a context manager; no cycle, but rank 0 fails: its traceback holds on."""
    with contextlib.suppress(PlannedError), naive_scope(manager):
        run_layer(manager, in_cycle=False, fails=True)


def scope_agreement(manager: Manager, _number: int) -> None:
    """Let collective_scope compare what is left before anybody destroys it."""
    with collective_scope(timeout=5) as scope:
        scope.collective_cleanup(manager.destroy, fingerprint=manager.fingerprint)
        run_layer(manager)
        collect_garbage(manager.rank)


def scope_lockstep_gc(manager: Manager, number: int) -> None:
    """Let collective_scope collect garbage on all ranks at the same point: lockstep_gc=True."""
    with expected_failure(), collective_scope(timeout=60, lockstep_gc=True) as scope:
        scope.collective_cleanup(manager.destroy, fingerprint=manager.fingerprint)
        run_layer(manager)
        collect_garbage(manager.rank)
        run_layer(manager, fails=number == 1)


def scope_hold(manager: Manager, number: int) -> None:
    """Let collective_scope keep the layer until after the barrier: scope.hold(layer)."""
    with expected_failure(), collective_scope(timeout=60) as scope:
        scope.collective_cleanup(manager.destroy, fingerprint=manager.fingerprint)
        run_layer(manager, hold=scope.hold)
        collect_garbage(manager.rank)
        run_layer(manager, hold=scope.hold, fails=number == 1)


@contextlib.contextmanager
def expected_failure() -> Iterator[None]:
    """Let the planned error pass, as rank 0 and as its peers see it, and nothing else."""
    with contextlib.suppress(PlannedError):
        try:
            yield
        except PeerFailedError as error:
            if "PlannedError" not in str(error):
                raise


VARIANTS: dict[str, tuple[Callable[[Manager, int], None], str]] = {
    variant.__name__: (variant, outcome)
    for variant, outcome in (
        (no_teardown, "any"),
        (destructor, "any"),
        (pull_request, "hung"),
        (naive_with, "hung"),
        (scope_agreement, CleanupMismatchError.__name__),
        (scope_lockstep_gc, "passed"),
        (scope_hold, "passed"),
    )
}
"""Each with what must come out. "any" is up to how the backend happens to break."""

DEVICE_OUTCOMES = {
    # Freeing symmetric memory is a collective itself: rank 1's collector waits in it until
    # rank 0 frees its own in destroy(), and the two pair by luck. With an agreement first,
    # rank 0 does not free alone: rank 1 stays in its collector, and rank 0 raises a
    # BarrierTimeoutError that says so.
    "pull_request": "any",
    "naive_with": "any",
    "scope_agreement": "hung",
}
"""Where symmetric memory differs from buffers whose destruction is an explicit call."""


def run_rank(  # noqa: PLR0917 -- a process gets its arguments by position
    rank: int, world_size: int, port: int, variant: str, backend: str, stack_file: str
) -> None:
    """Run the subtests of one variant, tell the parent, and wait for the end it brings."""
    stacks = Path(stack_file).open("w", encoding="utf-8")  # noqa: SIM115 -- for faulthandler
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    logging.getLogger("collective_scope").setLevel(logging.CRITICAL)  # failures are planned
    device = torch.device("cpu")
    if backend != "shared_memory":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
    )
    manager = make_manager(backend, dist.new_group(), device)
    # Both groups exist, and all ranks' connections in them, before anything can go wrong.
    dist.barrier()
    dist.barrier(group=manager.group)
    if rank != 1:
        gc.disable()
    store.set(f"ready/{rank}", "")
    try:
        for number in range(SUBTESTS):
            VARIANTS[variant][0](manager, number)
    except Exception as error:  # noqa: BLE001 -- any exception is the outcome
        kind = "wrong result" if isinstance(error, AssertionError) else type(error).__name__
        store.set(f"outcome/{rank}", f"{kind}: {shorten(str(error), 70)}")
    else:
        store.set(f"outcome/{rank}", "passed")
    # Leaving now would close connections, and a peer that hangs would fail instead.
    signal.pause()


@attrs.frozen
class Outcome:
    """How one run ended: in one word, and rank by rank."""

    word: str
    detail: str
    seconds: float


def run_variant(variant: str, backend: str, world_size: int, deadline_s: float) -> Outcome:
    """Run one variant on fresh ranks; whatever they do, end after *deadline_s*."""
    context = mp.get_context("forkserver")  # imports torch once, not once a rank
    context.set_forkserver_preload([__name__])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"stack-{rank}") for rank in range(world_size)]
        ranks = [
            context.Process(target=run_rank, args=(rank, world_size, store.port, variant, backend, str(file)))
            for rank, file in enumerate(files)
        ]
        for process in ranks:
            process.start()
        try:
            wait_for(store, ranks, "ready", START_S)
            started = time.monotonic()
            wait_for(store, ranks, "outcome", deadline_s)
            seconds = time.monotonic() - started
            ends = [where(store, *each) for each in zip(range(world_size), ranks, files, strict=True)]
            return judge(ends, seconds)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def wait_for(store: dist.Store, ranks: Sequence[Any], key: str, timeout: float) -> None:
    """Wait until every rank has set its *key* or has died, at most *timeout* seconds."""
    deadline = time.monotonic() + timeout
    for rank, process in enumerate(ranks):
        while not store.check([f"{key}/{rank}"]) and time.monotonic() < deadline:
            process.join(0.05)
            if not process.is_alive():
                break


def where(store: dist.Store, rank: int, process: Any, stack_file: Path) -> str:
    """Say how *rank* ended, or in which call it hangs."""
    if store.check([f"outcome/{rank}"]):
        return store.get(f"outcome/{rank}").decode()
    if not process.is_alive():
        return f"died, exit code {process.exitcode}"
    deadline = time.monotonic() + STACK_S
    while run_rank.__name__ not in (text := stack_file.read_text(encoding="utf-8")):
        os.kill(process.pid, signal.SIGUSR1)  # again: another of its threads may have had the first
        process.join(0.2)
        if time.monotonic() > deadline:
            return "hung, and does not say where"
    outermost_first = reversed(re.findall(r" in (\S+)$", text, re.MULTILINE))
    place = next((call for call in outermost_first if call in LANDMARKS), "its body")
    return f"hung in {place}"


def judge(ranks: Sequence[str], seconds: float) -> Outcome:
    """Put what the ranks say into one word: the worst of it, or the one they agree on."""
    words = [re.split(":|,| in ", text)[0] for text in ranks]
    worst = next((word for word in ("hung", "died", "wrong result") if word in words), "failed")
    word = words[0] if len(set(words)) == 1 else worst
    detail = ", ".join(f"rank {rank} {text.removeprefix('hung ')}" for rank, text in enumerate(ranks))
    return Outcome(word, "" if word == ranks[0] else detail, seconds)


def main() -> int:
    args = parse_args()
    device_type = "cpu" if args.backend == "shared_memory" else "cuda"
    if reason := why_unavailable(args.backend, device_type):
        print(f"skipped: {reason}")
        return 0
    unexpected = 0
    print(f"{args.ranks} ranks, {args.backend}, hung means: for {args.deadline:.0f} s")
    for variant in args.variant or VARIANTS:
        function, expected = VARIANTS[variant]
        if args.backend == "symm_mem":
            expected = DEVICE_OUTCOMES.get(variant, expected)
        print(f"\n{variant}: {(function.__doc__ or '').strip()}", flush=True)
        outcomes = [run_variant(variant, args.backend, args.ranks, args.deadline) for _ in range(args.repeat)]
        counts = Counter((outcome.word, outcome.detail) for outcome in outcomes)
        for (word, detail), count in counts.most_common():
            print(f"  {count:4} x {word:22}{detail}", flush=True)
        if expected != "any" and {outcome.word for outcome in outcomes} != {expected}:
            print(f"  expected: {expected}")
            unexpected += 1
    return 1 if unexpected else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The deadlock, and what cures it.")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="repeatable")
    parser.add_argument("--repeat", type=int, default=1, metavar="N")
    parser.add_argument("--backend", choices=("shared_memory", "symm_mem", "deep_ep"), default="shared_memory")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="two or more")
    parser.add_argument("--deadline", type=float, default=10.0, metavar="S", help="longer than this is a hang")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
