"""
A Lightning Fabric script: `launch` makes the process group, and `barrier` follows each check.

Without lightning_fabric, a class with the part of `Fabric` that this script uses.
"""

import os

import torch.distributed as dist

from collective_scope import RenewableGroup, Subtests
from examples.adopt.common import SIZES, TIMEOUT, WORLD_SIZE, check, launch, say


try:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy
except ImportError:

    class DDPStrategy:
        """How the ranks work together."""

        def __init__(self, *, timeout: object = None) -> None:
            self.timeout = timeout

    class Fabric:
        """The ranks."""

        def __init__(self, *, accelerator: str, devices: int, strategy: DDPStrategy) -> None:
            assert accelerator == "cpu"
            assert devices == int(os.environ["WORLD_SIZE"])
            self.strategy = strategy

        def launch(self) -> None:
            """Make the group, unless there is one."""
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=self.strategy.timeout)

        def barrier(self) -> None:
            """Meet the others."""
            dist.barrier()


def before() -> None:
    fabric = Fabric(accelerator="cpu", devices=WORLD_SIZE, strategy=DDPStrategy(timeout=TIMEOUT))
    fabric.launch()
    for size in SIZES:
        check(size)
        say(f"size-{size} passed")
        fabric.barrier()
    dist.destroy_process_group()


def after() -> None:
    fabric = Fabric(accelerator="cpu", devices=WORLD_SIZE, strategy=DDPStrategy(timeout=TIMEOUT))
    with Subtests(RenewableGroup(), verbose=True) as subtests:
        for size in SIZES:
            with subtests.test(f"size-{size}"):
                fabric.launch()  # uses the group that is there
                check(size)
                say(f"size-{size} passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(before, after)
