"""
DeepEP's own test: one buffer, some settings in a loop, and at the end destroy, barrier, destroy; none of it in a `finally`.

The destroy is a collective, and a second one of the same buffer fails.
"""

import torch
import torch.distributed as dist

from collective_scope import RenewableGroup, Subtests, current_scope
from examples.adopt.common import SIZES, TIMEOUT, check, launch, say


class Buffer:
    """Memory that all ranks map into each other."""

    def __init__(self, size: int) -> None:
        dist.barrier()  # stands for the exchange of handles
        self.runtime: torch.Tensor | None = torch.zeros(size)

    def destroy(self) -> None:
        """Free it, on all ranks."""
        assert self.runtime is not None, "destroyed before"
        dist.barrier()
        self.runtime = None


def before() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    buffer = Buffer(max(SIZES))
    for size in SIZES:
        check(size, buffer.runtime[:size].zero_())
        say(f"size-{size} passed")
    buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()


def after() -> None:
    with Subtests(RenewableGroup(), verbose=True) as subtests:
        for size in SIZES:
            with subtests.test(f"size-{size}"):
                buffer = Buffer(max(SIZES))
                current_scope().collective_cleanup(buffer.destroy)
                check(size, buffer.runtime[:size].zero_())
                say(f"size-{size} passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(before, after)
