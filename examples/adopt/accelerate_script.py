"""
A test script for `accelerate launch`: checks one after another, and after each `wait_for_everyone`, which is a barrier.

Without accelerate, a class with the part of `PartialState` that this script uses.
"""

import torch.distributed as dist

from collective_scope import RenewableGroup, Subtests
from examples.adopt.common import SIZES, TIMEOUT, check, launch, say


try:
    from accelerate import PartialState
except ImportError:

    class PartialState:
        """The state of this process."""

        def __init__(self, *, cpu: bool, timeout: object = None) -> None:
            assert cpu
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timeout)

        def wait_for_everyone(self) -> None:
            """Meet the others."""
            dist.barrier()

        def destroy_process_group(self) -> None:
            """Take down the group."""
            dist.destroy_process_group()


def before() -> None:
    state = PartialState(cpu=True, timeout=TIMEOUT)
    for size in SIZES:
        check(size)
        say(f"size-{size} passed")
        state.wait_for_everyone()
    state.destroy_process_group()


def after() -> None:
    with Subtests(RenewableGroup(), verbose=True) as subtests:
        for size in SIZES:
            with subtests.test(f"size-{size}"):
                state = PartialState(cpu=True)
                check(size)
                say(f"size-{size} passed")
    state.destroy_process_group()


if __name__ == "__main__":
    launch(before, after)
