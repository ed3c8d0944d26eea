"""
PyTorch's own test classes, each with three lines that put every test into a scope.

    python -m unittest -v examples.adopt.pytorch_classes        # needs expecttest, as PyTorch's classes do

Tests of `InScope` fail early and late on purpose. Those of `InScopeOnRanksThatStay` do too, and
cost nothing but themselves; without the scope, the first of them has all that follow skipped.
"""

# ruff: noqa: D101, D102  (the docstring of the file says what they do, as for functions elsewhere)

import multiprocessing
import sys
from typing import Any, ClassVar

import torch.distributed as dist
from torch.testing._internal.common_distributed import TEST_SKIPS, MultiProcContinuousTest, MultiProcessTestCase

from collective_scope import RenewableGroup, collective_scope
from examples.adopt.common import WORLD_SIZE, check


# Ranks are forks of a process that has imported torch.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["torch.testing._internal.common_distributed"])


class InScope(MultiProcessTestCase):
    def join_or_run(self, fn: Any) -> Any:
        # Each test makes the default group itself: it is looked up at the exit.
        return super().join_or_run(collective_scope(failure_timeout=2)(fn))

    # PyTorch's tests have this anyway.

    world_size = WORLD_SIZE

    def setUp(self) -> None:
        super().setUp()
        self._start_processes(RANKS.Process)  # PyTorch's tests have self._spawn_processes() here

    def init(self) -> None:
        store = dist.FileStore(self.file_name, WORLD_SIZE)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=WORLD_SIZE)


class TestNewRanks(InScope):
    def test_passes(self) -> None:
        self.init()
        check(10)

    def test_fails_early(self) -> None:
        self.init()
        check(20, fails="early")

    def test_fails_late(self) -> None:
        self.init()
        check(20, fails="late")

    def test_is_skipped(self) -> None:
        self.init()
        sys.exit(TEST_SKIPS["generic"].exit_code)


class InScopeOnRanksThatStay(MultiProcContinuousTest):
    world: ClassVar[RenewableGroup]

    @classmethod
    def _init_pg(cls, rank: int, world_size: int, rdvz_file: str) -> None:
        store = dist.FileStore(rdvz_file, world_size)
        cls.world = RenewableGroup(store=store, rank=rank, world_size=world_size)

    @classmethod
    def _run_test_given_id(cls, test_id: str, **kwargs: Any) -> None:
        with collective_scope(cls.world, name=test_id):
            super()._run_test_given_id(test_id, **kwargs)

    def setUp(self) -> None:
        type(self).poison_pill = False  # a test that has failed costs no other
        super().setUp()


class TestRanksThatStay(InScopeOnRanksThatStay):
    world_size = WORLD_SIZE

    def test_1_fails_early(self) -> None:
        check(20, fails="early")

    def test_2_passes(self) -> None:
        check(10)

    def test_3_fails_late(self) -> None:
        check(20, fails="late")

    def test_4_passes(self) -> None:
        check(30)

    def test_5_is_skipped(self) -> None:
        sys.exit(TEST_SKIPS["generic"].exit_code)
