"""
Real DeepEP, and one rank that fails before its dispatch: what the other sees, and what the pool makes of it. By hand.

Needs two GPUs and the package ``deep_ep``. Run: ``python -m tests.gpu.deep_ep_failure [--kill-after 8]``
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from examples.pool import Pool

from collective_scope import Subtests, current_scope


TOKENS, HIDDEN, EXPERTS = 64, 1024, 8


def make(store: dist.Store) -> Any:
    """Make the default group and a buffer of 256 MiB."""
    import deep_ep  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415  (optional)

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=world_size)
    return deep_ep.Buffer(dist.group.WORLD, 256 * 2**20, 0)


def dispatch(*, fails: bool) -> None:
    """Send tokens to the ranks of their experts; rank 1 may fail before."""
    buffer = current_scope().group
    if fails and dist.get_rank() == 1:
        msg = "before its dispatch"
        raise ValueError(msg)
    tokens = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    experts = torch.arange(2 * TOKENS, device="cuda").view(TOKENS, 2) % EXPERTS
    per_rank, _, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(experts, EXPERTS)
    received, *_ = buffer.dispatch(
        tokens,
        topk_idx=experts,
        topk_weights=torch.ones(TOKENS, 2, device="cuda"),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=is_in_rank,
        num_tokens_per_expert=per_expert,
    )
    torch.cuda.synchronize()
    assert received.shape[0] > 0


def main() -> None:
    """Print what became of each subtest, and when."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kill-after", type=float, default=8.0)
    args = parser.parse_args()
    from tests.gpu import deep_ep_failure  # noqa: PLC0415, PLW0406  (ranks cannot import __main__)

    start = time.monotonic()
    try:
        with Subtests() as report, Pool(2, deep_ep_failure.make, kill_after=args.kill_after, verbose=True) as pool:
            for name, fails in (("good", False), ("fails", True), ("good again", False)):
                fn = deep_ep_failure.failing if fails else deep_ep_failure.healthy
                result = pool.run(name, fn, report=report)
                print(f"{time.monotonic() - start:.1f} s: {name}: {result.status}", flush=True)
            print(f"ranks were started {pool.starts} times")
    except ExceptionGroup:
        pass  # the report says it all


def healthy() -> None:
    """Dispatch on all ranks."""
    dispatch(fails=False)


def failing() -> None:
    """Dispatch on rank 0 only."""
    dispatch(fails=True)


if __name__ == "__main__":
    main()
