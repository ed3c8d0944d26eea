"""The layer under test: routed experts, split over the ranks, in plain torch."""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .backends import All2AllManager, Handle
from .config import Config
from .data import Problem
from .quantization import SCHEMES, ExpertWeights


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

        logical_to_physical: where EPLB has put each expert; the identity at first.
        physical_to_local: index among this rank's experts, -1 for those of other ranks.
    """

    config: Config
    groups: Groups
    manager: All2AllManager[Any] | None
    handle: Handle | None
    w13: ExpertWeights
    w2: ExpertWeights
    shared_w13: Tensor
    shared_w2: Tensor
    router: Tensor
    transform_in: Tensor
    transform_out: Tensor
    logical_to_physical: Tensor
    physical_to_local: Tensor

    def forward(self, hidden: Tensor, router_logits: Tensor) -> Tensor:
        """Answer this data parallel rank's tokens; all its tensor parallel ranks call it."""
        config, groups = self.config, self.groups
        num_tokens = len(hidden)
        if config.layout.sequence_parallel:
            hidden = hidden.tensor_split(config.layout.tp)[groups.tp_rank]
            router_logits = router_logits.tensor_split(config.layout.tp)[groups.tp_rank]

        if config.gate:
            # In float32: where two experts are close, rounding would choose between them.
            router_logits = functional.linear(hidden.float(), self.router.float())
        weights, experts = self.route(router_logits)
        tokens = functional.linear(hidden, self.transform_in) if config.latent else hidden
        output = self.routed_experts(tokens, weights, experts)
        if config.latent:
            output = functional.linear(output, self.transform_out)
        if config.shared_experts:
            gate, up = functional.linear(hidden, self.shared_w13).chunk(2, dim=1)
            output = output + functional.linear(functional.silu(gate) * up, self.shared_w2)

        if config.layout.sequence_parallel:
            return all_gather_tokens(output, num_tokens, config.layout.tp, groups.tp)
        if config.layout.tp > 1:
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
        return self.logical_to_physical[experts]

    def local_experts(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum the weighted answers of this rank's experts; -1 stands for no expert."""
        local = torch.where(experts >= 0, self.physical_to_local[experts], -1)
        output = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in sorted(set(local[local >= 0].tolist())):
            rows, slots = torch.nonzero(local == expert, as_tuple=True)
            gate, up = self.w13.linear(tokens[rows], expert).chunk(2, dim=1)
            answer = self.w2.linear(functional.silu(gate) * up, expert)
            output.index_add_(0, rows, answer.float() * weights[rows, slots, None])
        return output.to(tokens.dtype)


def build_layer(config: Config, problem: Problem, groups: Groups, manager: All2AllManager[Any] | None) -> MoELayer:
    """
    Cut this rank's share out of the full weights, quantize it, and get buffers.

    Collective:
        With a manager: getting a handle builds buffers on all ranks of the group.
    """
    w13, w2 = split_experts(config, groups, problem.w13, problem.w2)
    shared_w13, shared_w2 = problem.shared_w13, problem.shared_w2
    if not config.layout.expert_parallel:
        shared_w13, shared_w2 = split_intermediate(config, groups, shared_w13, shared_w2)

    quantize = SCHEMES[config.quantization].quantize
    expert_ids = torch.arange(config.num_experts, device=groups.device)
    per_rank = config.num_experts // config.layout.ep
    first = groups.rank * per_rank if config.layout.expert_parallel else 0
    is_local = (expert_ids >= first) & (expert_ids < first + per_rank)
    return MoELayer(
        config,
        groups,
        manager,
        handle=manager
        and manager.get_handle(
            max_tokens=config.m,
            hidden=config.expert_hidden,
            top_k=config.top_k,
            num_experts=config.num_experts,
        ),
        w13=quantize(w13),
        w2=quantize(w2),
        shared_w13=shared_w13,
        shared_w2=shared_w2,
        router=problem.router,
        transform_in=problem.transform_in,
        transform_out=problem.transform_out,
        logical_to_physical=expert_ids,
        physical_to_local=torch.where(is_local, expert_ids - first, -1),
    )


def split_experts(config: Config, groups: Groups, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Take whole experts with expert parallelism, a part of each expert without."""
    if not config.layout.expert_parallel:
        return split_intermediate(config, groups, w13, w2)
    return w13.chunk(config.layout.ep)[groups.rank], w2.chunk(config.layout.ep)[groups.rank]


def split_intermediate(config: Config, groups: Groups, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Cut gate and up halves separately, so that this rank has both for the same channels."""
    tp, rank = config.layout.tp, groups.tp_rank
    gate, up = w13.chunk(2, dim=-2)
    own = [half.chunk(tp, dim=-2)[rank] for half in (gate, up)]
    return torch.cat(own, dim=-2), w2.chunk(tp, dim=-1)[rank].contiguous()


def all_gather_tokens(x: Tensor, num_tokens: int, world_size: int, group: dist.ProcessGroup | None) -> Tensor:
    """Undo `Tensor.tensor_split`; its parts may differ by one token, hence the padding."""
    longest = -(-num_tokens // world_size)
    padded = functional.pad(x, (0, 0, 0, longest - len(x)))
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded, group=group)
    lengths = [len(part) for part in torch.arange(num_tokens).tensor_split(world_size)]
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
