"""
A suite under torchrun, with the plugin.

From the root of the repository:

    torchrun --nproc-per-node 2 -m pytest examples/pytest_torchrun
    BREAK_RANK=1 torchrun --nproc-per-node 2 -m pytest examples/pytest_torchrun

Expected: 3 passed; then 2 passed and 1 failed, in which rank 1 raises before its all-reduce and rank 0 waits in it. In
one process, `python -m pytest examples/pytest_torchrun`, the same tests pass with a group of one.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist


def test_column_parallel_layer_is_right(tp: dist.ProcessGroup) -> None:
    """The sum over ranks of partial products is the product."""
    if os.environ.get("BREAK_RANK") == str(dist.get_rank()):
        msg = "shapes differ"
        raise ValueError(msg)
    size = dist.get_world_size(tp)
    inputs, weight = torch.ones(4, 2 * size), torch.arange(6.0 * size).reshape(2 * size, 3)
    mine = slice(2 * dist.get_rank(tp), 2 * dist.get_rank(tp) + 2)

    partial = inputs[:, mine] @ weight[mine]
    dist.all_reduce(partial, group=tp)

    torch.testing.assert_close(partial, inputs @ weight)


def test_group_after_a_failure_works(tp: dist.ProcessGroup) -> None:
    """A test has a group, also if the one before has failed."""
    ranks = torch.tensor(dist.get_rank(tp))

    dist.all_reduce(ranks, group=tp)

    assert int(ranks) == sum(range(dist.get_world_size(tp)))


def test_files_of_all_ranks_are_seen_by_all(shared: Path) -> None:
    """The folder is there until all ranks have left."""
    (shared / str(dist.get_rank())).touch()

    dist.barrier()

    assert len(list(shared.iterdir())) == dist.get_world_size()
