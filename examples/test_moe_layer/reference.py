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

from .config import NO_BACKEND, SINGLE, Config
from .data import make_problem, output_scale


def dense_output(config: Config, dp_rank: int, device: torch.device) -> Tensor:
    """Compute what the layer must answer to the tokens of *dp_rank*, (m, k)."""
    # Quantizations differ in the scale of the down projections only, and everything after
    # those is linear: the costly part is computed once for all of them.
    unit = attrs.evolve(
        config,
        quantization="none",
        shared_experts=True,
        eplb=False,
        layout=SINGLE,
        backend=NO_BACKEND,
    )
    routed, shared = unit_outputs(unit, dp_rank, device)
    return output_scale(config) * (routed + shared if config.shared_experts else routed)


def assert_matches(output: Tensor, expected: Tensor, config: Config) -> None:
    """Compare number by number with vLLM's tolerances, and token by token with ours."""
    expected = expected.double()
    torch.testing.assert_close(output.double(), expected, atol=config.tolerance, rtol=config.tolerance)
    error = (output.double() - expected).norm(dim=1) / expected.norm(dim=1)
    if (worst := error.max().item()) > config.row_tolerance:
        msg = f"token {int(error.argmax())} is off by {worst:.3f} of its size, allowed: {config.row_tolerance}"
        raise AssertionError(msg)


@lru_cache(maxsize=16)
def unit_outputs(config: Config, dp_rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute what the routed and what the shared experts answer at scale 1."""
    problem = make_problem(config, dp_rank, device)
    hidden = problem.hidden.double()

    logits = problem.router_logits.double()
    if config.gate:
        logits = hidden @ problem.router.double().T
    probability = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
    threshold = probability.sort(dim=1, descending=True).values[:, config.top_k - 1 :][:, :1]
    weight = torch.where(probability >= threshold, probability, 0.0)

    tokens = hidden @ problem.transform_in.double().T if config.latent else hidden
    routed = torch.zeros_like(tokens)
    for expert in range(config.num_experts):
        answer = gated_mlp(tokens, problem.w13[expert].double(), problem.w2[expert].double())
        routed += weight[:, expert, None] * answer
    if config.latent:
        routed = routed @ problem.transform_out.double().T

    shared = gated_mlp(hidden, problem.shared_w13.double(), problem.shared_w2.double())
    return routed, shared


def gated_mlp(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Compute down(silu(gate(x)) * up(x)), with the sigmoid written out."""
    gate_weight, up_weight = w13.chunk(2)
    gate = x @ gate_weight.T
    return (gate / (1.0 + torch.exp(-gate)) * (x @ up_weight.T)) @ w2.T
