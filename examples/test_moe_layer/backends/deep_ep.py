"""
`deep_ep`: DeepEP's high throughput kernels between the GPUs of one host.

Written against the public interface of `deep_ep.Buffer`; only imported where installed.
"""

from __future__ import annotations

from typing import Any

import deep_ep  # type: ignore[import-not-found, unused-ignore]  # optional
import torch
from torch import Tensor

from .base import All2AllManager, Dispatched


NVLINK_BYTES = 512 * 2**20
"""Enough for the largest shape, and one size for all: fewer buffers to build."""


class DeepEPHandle:
    """
    A `deep_ep.Buffer` that is destroyed by hand.

    With ``explicitly_destroy=False`` its destructor would be the collective.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, num_experts: int) -> None:
        self.buffer = deep_ep.Buffer(group, NVLINK_BYTES, 0, explicitly_destroy=True)
        self.num_experts = num_experts

    def destroy(self) -> None:
        """Wait for all ranks, then unmap. A collective; a second call fails."""
        self.buffer.destroy()


class DeepEPManager(All2AllManager[DeepEPHandle]):
    """Tokens go to each rank once; the answers of a token's ranks are added on the way back."""

    def build(self, *, max_tokens: int, hidden: int, top_k: int, num_experts: int) -> DeepEPHandle:
        """Build the buffer. A collective."""
        del max_tokens, hidden, top_k
        return DeepEPHandle(self.group, num_experts)

    def dispatch(self, handle: DeepEPHandle, tokens: Tensor, weights: Tensor, experts: Tensor) -> Dispatched:
        """Ask DeepEP for the layout, then send."""
        per_rank, _, per_expert, is_token_in_rank, _ = handle.buffer.get_dispatch_layout(experts, handle.num_experts)
        received, local, received_weights, _, route, _ = handle.buffer.dispatch(
            tokens,
            topk_idx=experts,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
        )
        # DeepEP numbers a rank's experts from 0; the layer counts them over all ranks.
        first = self.rank * (handle.num_experts // self.world_size)
        physical = torch.where(local >= 0, local + first, -1)
        return Dispatched(received, received_weights, physical, route)

    def combine(self, handle: DeepEPHandle, answers: Tensor, sent: Dispatched) -> Tensor:
        """Send the answers back; the device adds them up."""
        route: Any = sent.route
        output: Tensor = handle.buffer.combine(answers, route)[0]
        return output
