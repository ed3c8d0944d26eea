"""The layer under test: routed experts, split over the ranks, in plain torch."""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .backends import All2AllManager, Handle
from .config import MoETestConfig
from .data import MoETestData
from .quantization import SCHEMES, QuantizedWeights


@attrs.frozen
class Groups:
    """
    The place of this rank in a layout, and the process groups that go with it.

    Attributes:
        rank: rank in the whole layout; expert parallel ranks are numbered like this.
        tp: the ranks that share this rank's tokens. ``None`` without peers.
        ep: the ranks the experts are divided among. ``None`` without peers.
    """

    rank: int
    dp_rank: int
    tp_rank: int
    tp: dist.ProcessGroup | None
    ep: dist.ProcessGroup | None
    device: torch.device


@attrs.define(eq=False, slots=False)  # controls replace a method of it
class MoELayer:
    """
    Gate, routed experts, shared experts; built from full weights, keeps its share.

    Attributes:
        handle:
            The buffers of the all-to-all backend. The manager caches them weakly: while
            this layer lives they live, and nothing else keeps them.

        logical_to_physical_map: where EPLB has put each expert; the identity at first.
        expert_map: index among this rank's experts, -1 for those of other ranks.
    """

    config: MoETestConfig
    groups: Groups
    manager: All2AllManager[Any] | None
    handle: Handle | None
    w1: QuantizedWeights
    w2: QuantizedWeights
    shared_w1: Tensor
    shared_w2: Tensor
    gate: Tensor
    routed_input_transform: Tensor
    routed_output_transform: Tensor
    logical_to_physical_map: Tensor
    expert_map: Tensor

    def forward(self, hidden: Tensor, router_logits: Tensor) -> Tensor:
        """Answer this data parallel rank's tokens; all its tensor parallel ranks call it."""
        config, groups = self.config, self.groups
        num_tokens = len(hidden)
        if config.is_sequence_parallel:
            hidden = hidden.tensor_split(config.tp_size)[groups.tp_rank]
            router_logits = router_logits.tensor_split(config.tp_size)[groups.tp_rank]

        if config.use_gate:
            # In float32: where two experts are close, rounding would choose between them.
            router_logits = functional.linear(hidden.float(), self.gate.float())
        weights, experts = self.route(router_logits)
        tokens = functional.linear(hidden, self.routed_input_transform) if config.use_routed_input_transform else hidden
        output = self.routed_experts(tokens, weights, experts)
        if config.use_routed_input_transform:
            output = functional.linear(output, self.routed_output_transform)
        if config.use_shared_experts:
            gate, up = functional.linear(hidden, self.shared_w1).chunk(2, dim=1)
            output = output + functional.linear(functional.silu(gate) * up, self.shared_w2)

        if config.is_sequence_parallel:
            return all_gather_tokens(output, num_tokens, config.tp_size, groups.tp)
        if config.tp_size > 1:
            # Each rank holds a part of the intermediate size, hence of every sum.
            dist.all_reduce(output, group=groups.tp)
        return output

    def route(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose each token's experts: softmax over all, the top few, not renormalised."""
        probability = router_logits.float().softmax(dim=1)
        weights, experts = probability.topk(self.config.top_k, dim=1)
        return weights, experts

    def routed_experts(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Send tokens to their experts' ranks, let the experts answer, bring answers back."""
        experts = self.to_physical(experts)
        if self.manager is None:
            return self.local_experts(tokens, weights, experts)
        sent = self.manager.dispatch(self.handle, tokens, weights, experts)
        answers = self.local_experts(sent.tokens, sent.weights, sent.experts)
        return self.manager.combine(self.handle, answers, sent)

    def to_physical(self, experts: Tensor) -> Tensor:
        """Look up where EPLB has put *experts*."""
        return self.logical_to_physical_map[experts]

    def local_experts(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum the weighted answers of this rank's experts; -1 stands for no expert."""
        local = torch.where(experts >= 0, self.expert_map[experts], -1)
        output = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in sorted(set(local[local >= 0].tolist())):
            rows, slots = torch.nonzero(local == expert, as_tuple=True)
            gate, up = self.w1.linear(tokens[rows], expert).chunk(2, dim=1)
            answer = self.w2.linear(functional.silu(gate) * up, expert)
            output.index_add_(0, rows, answer.float() * weights[rows, slots, None])
        return output.to(tokens.dtype)


def make_fused_moe_layer(
    config: MoETestConfig, data: MoETestData, groups: Groups, manager: All2AllManager[Any] | None
) -> MoELayer:
    """
    Cut this rank's share out of the full weights, quantize it, and get buffers.

    Collective:
        With a manager: getting a handle builds buffers on all ranks of the group.
    """
    w1, w2, shared_w1, shared_w2 = data.w1, data.w2, data.shared_w1, data.shared_w2
    if config.ep_size > 1:
        w1, w2 = chunk_by_rank(w1, groups.rank, config.ep_size), chunk_by_rank(w2, groups.rank, config.ep_size)
    else:
        tp = groups.tp_rank, config.tp_size
        w1, w2 = tp_chunk_gate_up(w1, *tp, dim=1), chunk_by_rank(w2, *tp, dim=2)
        shared_w1, shared_w2 = tp_chunk_gate_up(shared_w1, *tp, dim=0), chunk_by_rank(shared_w2, *tp, dim=1)

    quantize = SCHEMES[config.quantization].quantize
    expert_ids = torch.arange(config.num_experts, device=groups.device)
    first = groups.rank * len(w1) if config.ep_size > 1 else 0
    is_local = (expert_ids >= first) & (expert_ids < first + len(w1))
    return MoELayer(
        config,
        groups,
        manager,
        handle=manager
        and manager.get_handle(
            max_tokens=config.m,
            hidden=config.routed_expert_hidden_size,
            top_k=config.top_k,
            num_experts=config.num_experts,
        ),
        w1=quantize(w1),
        w2=quantize(w2),
        shared_w1=shared_w1,
        shared_w2=shared_w2,
        gate=data.gate,
        routed_input_transform=data.routed_input_transform,
        routed_output_transform=data.routed_output_transform,
        logical_to_physical_map=expert_ids,
        expert_map=torch.where(is_local, expert_ids - first, -1),
    )


def chunk_by_rank(t: Tensor, rank: int, world_size: int, dim: int = 0) -> Tensor:
    """Cut out a rank's share."""
    return t.chunk(world_size, dim=dim)[rank].contiguous()


def tp_chunk_gate_up(w: Tensor, tp_rank: int, tp_size: int, dim: int) -> Tensor:
    """Cut gate and up halves separately, so that this rank has both for the same channels."""
    return torch.cat([chunk_by_rank(half, tp_rank, tp_size, dim) for half in w.chunk(2, dim=dim)], dim=dim)


def all_gather_tokens(x: Tensor, num_tokens: int, world_size: int, group: dist.ProcessGroup | None) -> Tensor:
    """Undo `Tensor.tensor_split`; its parts may differ by one token, hence the padding."""
    longest = -(-num_tokens // world_size)
    padded = functional.pad(x, (0, 0, 0, longest - len(x)))
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded, group=group)
    lengths = [len(part) for part in torch.arange(num_tokens).tensor_split(world_size)]
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
