"""`allgather_reducescatter`: every rank gets every token, and answers are summed over ranks."""

from __future__ import annotations

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from .base import All2AllManager, Dispatched, RowFormat


@attrs.define(eq=False)
class GatherHandle:
    """
    Receive buffer for the tokens of all ranks, each padded to *max_tokens*.

    Attributes:
        rows: (ranks, tokens, bytes); reused by every dispatch.
    """

    row: RowFormat
    rows: Tensor

    def destroy(self) -> None:
        """Nothing that peers could notice."""


class AllGatherManager(All2AllManager[GatherHandle]):
    """The backend that always works: no routing, no buffers between ranks."""

    def build(self, *, max_tokens: int, hidden: int, top_k: int, num_experts: int) -> GatherHandle:
        """Allocate the receive buffer. Local."""
        del num_experts
        row = RowFormat(hidden, top_k)
        size = (self.world_size, max_tokens, row.num_bytes)
        return GatherHandle(row, torch.empty(size, dtype=torch.uint8, device=self.device))

    def dispatch(self, handle: GatherHandle, tokens: Tensor, weights: Tensor, experts: Tensor) -> Dispatched:
        """Gather everything everywhere."""
        own = torch.empty_like(handle.rows[0])
        own[: len(tokens)] = handle.row.pack(tokens, weights, experts)
        # Padding has no expert. Its other bytes are never looked at.
        own[len(tokens) :] = handle.row.pack(
            tokens.new_zeros(1, handle.row.hidden),
            weights.new_zeros(1, handle.row.top_k),
            experts.new_full((1, handle.row.top_k), -1),
        )
        dist.all_gather(list(handle.rows.unbind()), own, group=self.group)
        return Dispatched(*handle.row.unpack(handle.rows.flatten(0, 1)), len(tokens))

    def combine(self, handle: GatherHandle, answers: Tensor, sent: Dispatched) -> Tensor:
        """Add up what the ranks have answered, keep this rank's tokens."""
        num_tokens = sent.route
        assert isinstance(num_tokens, int)
        parts = list(answers.float().view(self.world_size, -1, handle.row.hidden).unbind())
        output = torch.empty_like(parts[0])
        dist.reduce_scatter(output, parts, group=self.group)
        return output[:num_tokens].to(answers.dtype)
