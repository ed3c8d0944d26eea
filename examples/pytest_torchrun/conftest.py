"""Fixtures of function scope: after a failure, the groups of the test before may be gone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist

from collective_scope import CollectiveScope, current_scope


@pytest.fixture(name="tp")
def _tp() -> dist.ProcessGroup:
    """Return the tensor-parallel group of the moment."""
    groups = current_scope().group
    return groups.mesh["tp"].get_group()


@pytest.fixture(name="shared")
def _shared(collective_scope: CollectiveScope) -> Path:
    """Return a folder of all ranks, which is removed when all have left the test."""
    folder = [tempfile.TemporaryDirectory()] if dist.get_rank() == 0 else []
    names = [folder[0].name if folder else ""]
    dist.broadcast_object_list(names)
    for each in folder:
        collective_scope.after_barrier(each.cleanup)
    return Path(names[0])
