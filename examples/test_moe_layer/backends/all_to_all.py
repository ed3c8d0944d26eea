"""`all_to_all`: uneven `dist.all_to_all_single`, no buffers to speak of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .base import RowFormat
from .exchange import ExchangeHandle, ExchangeManager


if TYPE_CHECKING:
    from torch import Tensor


class AllToAllHandle(ExchangeHandle):
    """Remembers the group; torch allocates what it needs."""

    def __init__(self, group: dist.ProcessGroup, max_rows: int, row: RowFormat, experts_per_rank: int) -> None:
        super().__init__(max_rows, row, experts_per_rank)
        self.group = group

    def exchange(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange the counts, then the rows."""
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        arrived = rows.new_empty(int(received.sum()), rows.shape[1])
        dist.all_to_all_single(arrived, rows, received.tolist(), counts.tolist(), group=self.group)
        return arrived, received

    def destroy(self) -> None:
        """Nothing to free."""


class AllToAllManager(ExchangeManager[AllToAllHandle]):
    """Hands out handles that hold no memory."""

    def build(self, *, max_tokens: int, hidden: int, top_k: int, num_experts: int) -> AllToAllHandle:
        """Build a handle: nothing to allocate, nobody to ask."""
        return AllToAllHandle(self.group, max_tokens, RowFormat(hidden, top_k), num_experts // self.world_size)
