"""
SGLang's test of its custom all-reduce: shared buffers, each made and freed by all ranks together.

The `finally` names what may not exist yet, if a rank fails early enough.
"""

import torch
import torch.distributed as dist

from collective_scope import RenewableGroup, Subtests, current_scope
from examples.adopt.common import SIZES, TIMEOUT, check, launch, say


def create_shared_buffer(size: int) -> torch.Tensor:
    dist.barrier()  # stands for the exchange of handles
    return torch.zeros(size)


def free_shared_buffer(buffer: torch.Tensor) -> None:  # noqa: ARG001  (it would be freed)
    dist.barrier()


def before() -> None:
    def correctness(size: int) -> None:
        try:
            meta = create_shared_buffer(4)
            buffer = create_shared_buffer(size)
            check(size, buffer)
            say(f"size-{size} passed")
        finally:
            dist.barrier()
            free_shared_buffer(buffer)
            free_shared_buffer(meta)

    dist.init_process_group("gloo", timeout=TIMEOUT)
    for size in SIZES:
        correctness(size)
    dist.destroy_process_group()


def after() -> None:
    def correctness(size: int) -> None:
        meta = create_shared_buffer(4)
        current_scope().collective_cleanup(free_shared_buffer, meta)
        buffer = create_shared_buffer(size)
        current_scope().collective_cleanup(free_shared_buffer, buffer)
        check(size, buffer)
        say(f"size-{size} passed")

    with Subtests(RenewableGroup(), verbose=True) as subtests:
        for size in SIZES:
            subtests.run(f"size-{size}", correctness, size)
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(before, after)
