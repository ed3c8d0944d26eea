"""Controls: one rank is broken on purpose, and every configuration must notice."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from .config import Config
from .data import Problem, make_problem
from .layer import MoELayer


def negate_weights(problem: Problem) -> Problem:
    return attrs.evolve(problem, w2=-problem.w2)


def swap_gate_and_up(problem: Problem) -> Problem:
    gate, up = problem.w13.chunk(2, dim=1)
    return attrs.evolve(problem, w13=torch.cat([up, gate], dim=1))


def confuse_local_experts(layer: MoELayer) -> None:
    local = layer.physical_to_local
    count = int(local.max()) + 1
    layer.physical_to_local = torch.where(local >= 0, (local + 1) % count, -1)


def drop_first_token(layer: MoELayer) -> None:
    route = layer.route

    def route_without_first_token(router_logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = route(router_logits)
        weights[:1] = 0.0
        return weights, experts

    layer.route = route_without_first_token  # type: ignore[method-assign]


@attrs.frozen
class Mutation:
    """What is broken: the weights before they are split, or the layer once it is built."""

    on_problem: Callable[[Problem], Problem] = lambda problem: problem
    on_layer: Callable[[MoELayer], object] = id
    on_owner_of_token: bool = True

    def victim(self, config: Config, device: torch.device) -> int:
        """
        Choose the rank to break: one that matters for the very first token.

        A single token visits few experts. Breaking a rank that holds none of them would
        break nothing.
        """
        if not self.on_owner_of_token:
            return 0
        if not config.layout.expert_parallel:
            return config.layout.world_size - 1
        problem = make_problem(config, 0, device)
        logits = problem.router_logits
        if config.gate:
            logits = problem.hidden.float() @ problem.router.float().T
        return int(logits[0].argmax()) // (config.num_experts // config.layout.ep)


MUTATIONS = {
    "wrong_weight": Mutation(on_problem=negate_weights),
    "swapped_gate_up": Mutation(on_problem=swap_gate_and_up),
    "wrong_expert_map": Mutation(on_layer=confuse_local_experts),
    "dropped_token": Mutation(on_layer=drop_first_token, on_owner_of_token=False),
}
