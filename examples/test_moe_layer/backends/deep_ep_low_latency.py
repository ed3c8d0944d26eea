"""
`deep_ep_low_latency`: DeepEP's low latency kernels.

Written against the public interface of `deep_ep.Buffer`; only imported where installed. Tokens
arrive sorted by expert, in as many rows as could arrive at most, and are weighted on the way back.
"""

from __future__ import annotations

from typing import Any

import deep_ep  # type: ignore[import-not-found, unused-ignore]  # optional
import torch
from torch import Tensor

from .base import All2AllManager, Dispatched


class LowLatencyHandle:
    """A `deep_ep.Buffer` in low latency mode, for one size, that is destroyed by hand."""

    def __init__(self, group: torch.distributed.ProcessGroup, max_tokens: int, hidden: int, num_experts: int) -> None:
        ranks = group.size()
        num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, ranks, num_experts)
        self.buffer = deep_ep.Buffer(
            group,
            0,
            num_bytes,
            low_latency_mode=True,
            num_qps_per_rank=num_experts // ranks,
            explicitly_destroy=True,
        )
        self.max_tokens, self.num_experts = max_tokens, num_experts

    def destroy(self) -> None:
        """Wait for all ranks, then unmap. A collective; a second call fails."""
        self.buffer.destroy()


class DeepEPLowLatencyManager(All2AllManager[LowLatencyHandle]):
    """Each token goes to each of its experts; the device weights and adds the answers."""

    def build(self, *, max_tokens: int, hidden: int, top_k: int, num_experts: int) -> LowLatencyHandle:
        """Build the buffer. A collective."""
        del top_k
        return LowLatencyHandle(self.group, max_tokens, hidden, num_experts)

    def dispatch(self, handle: LowLatencyHandle, tokens: Tensor, weights: Tensor, experts: Tensor) -> Dispatched:
        """Send each token to its experts; *experts* of the answer is -1 in rows to which nothing came."""
        received, counts, route, *_ = handle.buffer.low_latency_dispatch(
            tokens, experts, handle.max_tokens, handle.num_experts, use_fp8=False
        )
        num_local, rows, hidden = received.shape
        physical = torch.arange(num_local, device=experts.device) + self.rank * num_local
        is_used = torch.arange(rows, device=experts.device) < counts[:, None]
        owner = torch.where(is_used, physical[:, None], -1).view(-1, 1)
        # The weights of the tokens stay here: they come in when the answers are combined.
        return Dispatched(
            received.view(-1, hidden), torch.ones_like(owner, dtype=torch.float32), owner, (route, experts, weights)
        )

    def combine(self, handle: LowLatencyHandle, answers: Tensor, sent: Dispatched) -> Tensor:
        """Send the answers back; the device weights them and adds them up."""
        route: Any = sent.route
        answers = answers.view(handle.num_experts // self.world_size, -1, answers.shape[1])
        output: Tensor = handle.buffer.low_latency_combine(answers, route[1], route[2], route[0])[0]
        return output
