"""
`symm_mem`: torch's symmetric memory over NVSHMEM, and its own all-to-all on the device.

Freeing memory that takes part in a rendezvous is a collective, also when it is the garbage
collector that frees it.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symm_mem

from .base import RowFormat
from .exchange import ExchangeHandle, ExchangeManager


class SymmMemBuffer(ExchangeHandle):
    """Symmetric send and receive memory, large enough for all peers' rows at once."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        max_rows: int,
        row: RowFormat,
        experts_per_rank: int,
    ) -> None:
        super().__init__(max_rows, row, experts_per_rank)
        self.group, self.device = group, device
        ranks = dist.get_world_size(group)
        self.memory = [
            symm_mem.empty(ranks * max_rows, row.num_bytes, dtype=torch.uint8, device=device),
            symm_mem.empty(ranks * max_rows, row.num_bytes, dtype=torch.uint8, device=device),
            symm_mem.empty(ranks, dtype=torch.int64, device=device),
            symm_mem.empty(2, ranks, dtype=torch.int64, device=device),
        ]
        self.rendezvous = [symm_mem.rendezvous(tensor, group) for tensor in self.memory]

    def exchange(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Let the devices fetch from each other what the splits say."""
        outgoing, incoming, splits, arrived = self.memory
        outgoing[: len(rows)] = rows
        splits.copy_(counts)
        # Peers read this rank's memory. They must not start early, and nobody may write
        # again before all have read.
        self.wait_for_peers()
        torch.ops.symm_mem.all_to_all_vdev(outgoing, incoming, splits, arrived, self.group.group_name)
        self.wait_for_peers()
        received = arrived[0].clone()
        return incoming[: int(received.sum())].clone(), received

    def wait_for_peers(self) -> None:
        """Finish the device's work, then meet."""
        torch.cuda.synchronize(self.device)
        dist.barrier(group=self.group)

    def destroy(self) -> None:
        """Free the memory. A collective: every rank waits for all others in here."""
        if not self.memory:
            msg = "this buffer is destroyed already"
            raise RuntimeError(msg)
        torch.cuda.synchronize(self.device)
        self.rendezvous.clear()
        self.memory.clear()


class SymmMemManager(ExchangeManager[SymmMemBuffer]):
    """Caches buffers by size, as long as some layer holds them."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group, device)
        # Where torch pools symmetric memory by default, `destroy` would free nothing.
        os.environ.setdefault("TORCH_SYMMMEM_IMPLICIT_POOL", "0")
        # As few thread blocks as can be. Left alone, torch takes one for every 64 KiB of the
        # send buffer and asserts, on the device, that those of a peer divide what it sends
        # evenly: 15 of them on the largest shape, where a row has 4352 bytes.
        os.environ["TORCH_SYMMMEM_NBLOCKS"] = "1"
        symm_mem.set_backend("NVSHMEM")

    def build(self, *, max_tokens: int, hidden: int, top_k: int, num_experts: int) -> SymmMemBuffer:
        """Build a handle for the tokens of all ranks. A collective."""
        return SymmMemBuffer(
            self.group,
            self.device,
            max_tokens,
            RowFormat(hidden, top_k),
            num_experts // self.world_size,
        )
