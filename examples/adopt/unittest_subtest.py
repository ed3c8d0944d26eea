"""
Plain unittest on each rank, with `subTest`: the scope goes inside.

`subTest` takes what its body raises and goes on. In the other order, the scope would see a body
that ended well, on the rank that has failed.
"""

import sys
import unittest

import torch.distributed as dist

from collective_scope import RenewableGroup, collective_scope
from examples.adopt.common import SIZES, TIMEOUT, check, launch, say


def before() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)

    class TestSizes(unittest.TestCase):
        def test_sizes(self) -> None:
            for size in SIZES:
                with self.subTest(size=size):
                    check(size)
                    say(f"size-{size} passed")
                dist.barrier()

    run(TestSizes)


def after() -> None:
    world = RenewableGroup()

    class TestSizes(unittest.TestCase):
        def test_sizes(self) -> None:
            for size in SIZES:
                with self.subTest(size=size), collective_scope(world, name=f"size-{size}"):
                    check(size)
                    say(f"size-{size} passed")

    run(TestSizes)


def run(case: type[unittest.TestCase]) -> None:
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    result = unittest.TextTestRunner(sys.stdout).run(suite)
    sys.exit(0 if result.wasSuccessful() else 1)


if __name__ == "__main__":
    launch(before, after)
