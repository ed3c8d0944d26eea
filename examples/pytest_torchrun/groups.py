"""The groups of this folder's tests: made at first, and again after a test that has cost them."""

from __future__ import annotations

import os

import attrs
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@attrs.frozen
class Groups:
    """The default group's mesh, one dimension for each kind of parallelism."""

    mesh: DeviceMesh


def make(store: dist.Store) -> Groups:
    """Make all groups that more than one test uses. pytest.ini names this function."""
    # Without torchrun, there is one rank.
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    return Groups(init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp")))
