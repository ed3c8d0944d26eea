"""
Tell, for each way to be stuck in NCCL, what becomes of the ranks when one of them fails. By hand.

Run: ``python -m tests.gpu.carry_on_cases [--hows before loop ...] [--repeat 3]``, on a machine with two GPUs or more.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from tests.carry_on import HOWS, Event, Failure, defects, figures, run, world_of
from tests.ranks import RankPool, RanksError, here, values


def play(rank: int, world_size: int, how: str, number: int) -> list[Event]:
    """Go through five subtests, two of which fail."""
    torch.cuda.set_device(rank)
    world = world_of(dist.PrefixStore(f"{how}-{number}", here().new_store()), rank, world_size)
    events = run(world, [Failure(), Failure(how, 1), Failure(), Failure(how, 0), Failure()])  # type: ignore[arg-type]  # a str that is one of them
    world.destroy()
    return events


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hows", nargs="+", default=HOWS)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    from tests.gpu.carry_on_cases import play  # noqa: PLC0415  (ranks cannot import __main__)

    world_size = torch.cuda.device_count()
    for how in args.hows:
        for number in range(args.repeat):
            failures = [Failure(), Failure(how, 1), Failure(), Failure(how, 0), Failure()]
            try:
                with RankPool(world_size, init=False, host="parent") as pool:
                    events = values(pool.run(play, how, number, timeout=60.0))
            except RanksError as error:
                lines = [line for line in str(error).splitlines() if "Error" in line or "failed in" in line]
                print(f"{how}: {lines[:8]}", flush=True)
                continue
            found = defects(failures, events)
            measured = figures(failures, events, grace=0.5) if how != "after" else ""
            print(f"{how}: {found or 'right'}; {measured}", flush=True)


if __name__ == "__main__":
    main()
