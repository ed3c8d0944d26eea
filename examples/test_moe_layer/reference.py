"""
The truth: the whole layer on one rank, in float64, with full, unquantized weights.

Deliberately written another way than `layer`: no token is gathered or moved, every expert
sees every token and is weighted with zero where it was not chosen.
"""

from __future__ import annotations

from functools import lru_cache

import attrs
import torch
from torch import Tensor

from .config import MoETestConfig
from .data import output_scale, setup_moe_test_data


def baseline_output(config: MoETestConfig, dp_rank: int, device: torch.device) -> Tensor:
    """Compute what the layer must answer to the tokens of *dp_rank*, (tokens, k)."""
    # Quantizations differ in the scale of the down projections only, and everything after
    # those is linear: the costly part is computed once for all of them.
    unit = attrs.evolve(
        config,
        quantization=None,
        use_shared_experts=True,
        enable_eplb=False,
        backend=None,
        ep_size=1,
        tp_size=1,
    )
    routed, shared = unit_outputs(unit, dp_rank, device)
    return output_scale(config) * (routed + shared if config.use_shared_experts else routed)


def assert_matches(output: Tensor, expected: Tensor, config: MoETestConfig) -> None:
    """Compare number by number with vLLM's tolerances, and token by token with ours."""
    expected = expected.double()
    torch.testing.assert_close(output.double(), expected, atol=config.tolerance, rtol=config.tolerance)
    if len(expected) == 0:
        return
    error = (output.double() - expected).norm(dim=1) / expected.norm(dim=1)
    if (worst := error.max().item()) > config.row_tolerance:
        msg = f"token {int(error.argmax())} is off by {worst:.3f} of its size, allowed: {config.row_tolerance}"
        raise AssertionError(msg)


@lru_cache(maxsize=16)
def unit_outputs(config: MoETestConfig, dp_rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute what the routed and what the shared experts answer at scale 1."""
    data = setup_moe_test_data(config, dp_rank, device)
    hidden = data.hidden_states.double()

    logits = data.router_logits.double()
    if config.use_gate:
        logits = hidden @ data.gate.double().T
    probability = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
    threshold = probability.sort(dim=1, descending=True).values[:, config.top_k - 1 :][:, :1]
    weight = torch.where(probability >= threshold, probability, 0.0)

    tokens = hidden @ data.routed_input_transform.double().T if config.use_routed_input_transform else hidden
    routed = torch.zeros_like(tokens)
    for expert in range(config.num_experts):
        answer = gated_mlp(tokens, data.w1[expert].double(), data.w2[expert].double())
        routed += weight[:, expert, None] * answer
    if config.use_routed_input_transform:
        routed = routed @ data.routed_output_transform.double().T

    shared = gated_mlp(hidden, data.shared_w1.double(), data.shared_w2.double())
    return routed, shared


def gated_mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Compute down(silu(gate(x)) * up(x)), with the sigmoid written out."""
    gate_weight, up_weight = w1.chunk(2)
    gate = x @ gate_weight.T
    return (gate / (1.0 + torch.exp(-gate)) * (x @ up_weight.T)) @ w2.T
