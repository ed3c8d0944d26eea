"""Controls: one rank is broken on purpose, and every configuration must notice."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from .config import MoETestConfig
from .data import MoETestData, setup_moe_test_data
from .layer import MoELayer


def negate_weights(data: MoETestData) -> MoETestData:
    return attrs.evolve(data, w2=-data.w2)


def swap_gate_and_up(data: MoETestData) -> MoETestData:
    gate, up = data.w1.chunk(2, dim=1)
    return attrs.evolve(data, w1=torch.cat([up, gate], dim=1))


def confuse_local_experts(layer: MoELayer) -> None:
    local = layer.expert_map
    count = int(local.max()) + 1
    layer.expert_map = torch.where(local >= 0, (local + 1) % count, -1)


def drop_first_token(layer: MoELayer) -> None:
    route = layer.route

    def route_without_first_token(router_logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = route(router_logits)
        weights[:1] = 0.0
        return weights, experts

    layer.route = route_without_first_token  # type: ignore[method-assign]  # replaced on purpose


@attrs.frozen
class Mutation:
    """A broken part: the weights before they are split, or the layer once it is built."""

    on_data: Callable[[MoETestData], MoETestData] = lambda data: data
    on_layer: Callable[[MoELayer], object] = id
    on_owner_of_token: bool = True

    def victim(self, config: MoETestConfig, device: torch.device) -> int:
        """
        Choose the rank to break: one that matters for the very first token.

        A single token visits few experts. Breaking a rank that holds none of them would
        break nothing.
        """
        if not self.on_owner_of_token:
            return 0
        if config.ep_size == 1:
            return config.world_size - 1
        data = setup_moe_test_data(config, 0, device)
        logits = data.router_logits
        if config.use_gate:
            logits = data.hidden_states.float() @ data.gate.float().T
        return int(logits[0].argmax()) // (config.num_experts // config.ep_size)


MUTATIONS = {
    "wrong_weight": Mutation(on_data=negate_weights),
    "swapped_gate_up": Mutation(on_data=swap_gate_and_up),
    "wrong_expert_map": Mutation(on_layer=confuse_local_experts),
    "dropped_token": Mutation(on_layer=drop_first_token, on_owner_of_token=False),
}
