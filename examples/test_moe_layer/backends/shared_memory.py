"""
`shared_memory`: ranks of one host write into each other's memory.

DeepEP's intranode buffers of GPUs, on a CPU: every rank offers a piece of memory,
all map all of them, and neither building nor destroying works without the peers.
"""

from __future__ import annotations

from multiprocessing.shared_memory import SharedMemory

import torch
import torch.distributed as dist
from torch import Tensor

from .base import RowFormat
from .exchange import ExchangeHandle, ExchangeManager


COUNT_BYTES = 8


class SharedMemoryBuffer(ExchangeHandle):
    """
    An inbox per rank and parity: for each sender a count, then room for *max_rows* rows.

    Two parities, used in turn, make one barrier an exchange enough: who writes for the
    exchange after next has passed the barrier of the next, so everybody has read this one.
    """

    def __init__(self, group: dist.ProcessGroup, max_rows: int, row: RowFormat, experts_per_rank: int) -> None:
        super().__init__(max_rows, row, experts_per_rank)
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.parity = 0
        self.slot_bytes = COUNT_BYTES + max_rows * row.num_bytes
        self.own = SharedMemory(create=True, size=2 * self.world_size * self.slot_bytes)
        names: list[str] = [""] * self.world_size
        try:
            dist.all_gather_object(names, self.own.name, group=group)
            self.segments = [self.own if rank == self.rank else SharedMemory(name) for rank, name in enumerate(names)]
            dist.barrier(group=group)
        finally:
            # Mapped everywhere, or given up: the name can go, and a killed rank leaves nothing behind.
            self.own.unlink()

    def exchange(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Write into the inboxes of the peers, wait for theirs to be written, read."""
        for peer, part in enumerate(torch.split(rows, counts.tolist())):
            count, inbox = self.slot(at=peer, sender=self.rank)
            count.fill_(len(part))
            inbox[: len(part)] = part
        dist.barrier(group=self.group)
        slots = [self.slot(at=self.rank, sender=peer) for peer in range(self.world_size)]
        received = torch.cat([count for count, _ in slots])
        arrived = torch.cat([inbox[: int(count)] for count, inbox in slots])
        self.parity = 1 - self.parity
        return arrived, received

    def slot(self, *, at: int, sender: int) -> tuple[Tensor, Tensor]:
        """Return count and rows that *sender* has in the inbox of rank *at*, as views."""
        start = (self.parity * self.world_size + sender) * self.slot_bytes
        memory = torch.frombuffer(self.segments[at].buf, dtype=torch.uint8, count=self.slot_bytes, offset=start)
        return memory[:COUNT_BYTES].view(torch.int64), memory[COUNT_BYTES:].view(self.max_rows, self.row.num_bytes)

    def destroy(self) -> None:
        """
        Wait until no peer writes any more, then unmap.

        Collective:
            All ranks of the group destroy the same buffer; one that never does makes the
            others wait for it.
        """
        if not self.segments:
            msg = "this buffer is destroyed already"
            raise RuntimeError(msg)
        dist.barrier(group=self.group)
        for segment in self.segments:
            segment.close()
        self.segments = []


class SharedMemoryManager(ExchangeManager[SharedMemoryBuffer]):
    """Caches buffers by size, as long as some layer holds them."""

    def build(self, *, max_tokens: int, hidden: int, top_k: int, num_experts: int) -> SharedMemoryBuffer:
        """Build a handle for the tokens of all ranks. A collective."""
        return SharedMemoryBuffer(self.group, max_tokens, RowFormat(hidden, top_k), num_experts // self.world_size)
