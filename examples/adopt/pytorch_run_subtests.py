"""
PyTorch's `run_subtests`: one process group for all combinations of arguments, a barrier after each that passed.

The test method runs outside of `TestCase.run`, so that `subTest` ends nothing: the first failure ends the method.
"""

import itertools
import unittest

import torch.distributed as dist

from collective_scope import RenewableGroup, Subtests
from examples.adopt.common import SIZES, TIMEOUT, check, launch, say


CONFIG = {"size": SIZES}


def before() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    case = unittest.TestCase()
    for values in itertools.product(*CONFIG.values()):
        kwargs = dict(zip(CONFIG, values, strict=True))
        with case.subTest(**kwargs):
            check(**kwargs)
            say(f"{kwargs} passed")
        dist.barrier()
    dist.destroy_process_group()


def after() -> None:
    case = unittest.TestCase()
    with Subtests(RenewableGroup(), verbose=True) as subtests:
        for values in itertools.product(*CONFIG.values()):
            kwargs = dict(zip(CONFIG, values, strict=True))
            with case.subTest(**kwargs), subtests.test(str(kwargs)):
                check(**kwargs)
                say(f"{kwargs} passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(before, after)
