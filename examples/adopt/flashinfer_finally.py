"""
flashinfer's `finally` blocks: a barrier, because a peer may still use the workspace, and then the workspace goes.

Nothing catches a failure, so that it ends the loop on the rank that has failed, and on no other.
"""

import torch
import torch.distributed as dist

from collective_scope import RenewableGroup, Subtests, current_scope
from examples.adopt.common import SIZES, TIMEOUT, check, launch, say


class Workspace:
    """Memory that a peer may use until it has passed the barrier."""

    def __init__(self, size: int) -> None:
        self.value = torch.zeros(size)

    def destroy(self) -> None:
        """Free it, on this rank."""
        del self.value


def before() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    for size in SIZES:
        workspace = Workspace(size)
        try:
            check(size, workspace.value)
            say(f"size-{size} passed")
        finally:
            dist.barrier()
            workspace.destroy()
    dist.destroy_process_group()


def after() -> None:
    with Subtests(RenewableGroup(), verbose=True) as subtests:
        for size in SIZES:
            with subtests.test(f"size-{size}"):
                workspace = Workspace(size)
                current_scope().after_barrier(workspace.destroy)
                check(size, workspace.value)
                say(f"size-{size} passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(before, after)
