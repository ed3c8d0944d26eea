"""
Megatron's `destroy_model_parallel`: pytest on each rank, groups made in `setup_method`, a barrier in the teardown.

The barrier was put there so that no rank destroys its groups while a peer uses them. Its errors are swallowed.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch.distributed as dist

from collective_scope import RenewableGroup, collective_scope
from examples.adopt.common import SIZES, TIMEOUT, check, launch, say


class Utils:
    """The groups of all tests, as a class of global state."""

    model_parallel: ClassVar[dist.ProcessGroup | None] = None
    initialize: ClassVar[Callable[[], None]]


class TestSizes:
    """A test on a group of its own and on the default one."""

    def setup_method(self) -> None:
        """Make the groups."""
        Utils.initialize()

    @pytest.mark.parametrize("size", SIZES)
    def test_size(self, size: int) -> None:
        """Add up over the ranks."""
        dist.barrier(Utils.model_parallel)
        check(size)
        say(f"size-{size} passed")


def before() -> None:
    class Conftest:
        @pytest.fixture(autouse=True)
        def cleanup(self) -> Iterator[None]:
            yield
            destroy_model_parallel()

    def initialize() -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=TIMEOUT)
        Utils.model_parallel = dist.new_group([0, 1])

    def destroy_model_parallel() -> None:
        try:
            dist.barrier()
        except Exception:  # noqa: BLE001  (as it is there)
            return
        dist.destroy_process_group(Utils.model_parallel)

    Utils.initialize = staticmethod(initialize)
    raise SystemExit(pytest.main(["-q", "-o", "addopts=", "-p", "no:cacheprovider", __file__], [Conftest()]))


def after() -> None:
    class Conftest:
        @pytest.fixture(autouse=True)
        def cleanup(self, request: pytest.FixtureRequest) -> Iterator[None]:
            request.node.obj = collective_scope(world, name=request.node.name)(request.node.obj)
            yield
            destroy_model_parallel()

    world = RenewableGroup()

    @collective_scope(world, name="initialize")
    def initialize() -> None:
        Utils.model_parallel = dist.new_group([0, 1])

    def destroy_model_parallel() -> None:
        dist.destroy_process_group(Utils.model_parallel)

    Utils.initialize = staticmethod(initialize)
    raise SystemExit(pytest.main(["-q", "-o", "addopts=", "-p", "no:cacheprovider", __file__], [Conftest()]))


if __name__ == "__main__":
    launch(before, after)
