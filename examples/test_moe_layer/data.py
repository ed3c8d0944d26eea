"""
Inputs and full weights of a configuration, the same on every rank.

Every tensor has its own seed, so that configurations which differ in a switch only share
all other tensors, and so that the few most recent ones can be kept.
"""

from __future__ import annotations

from functools import lru_cache

import attrs
import torch
from torch import Tensor

from .config import MoETestConfig


SEED = 7
TOKEN_SCALE = 0.1
LOGIT_SCALE = 3.0
"""Spread of the router logits: the chosen experts shall carry most of the weight."""

GATE_UP, DOWN, GATE, TRANSFORM_IN, TRANSFORM_OUT, SHARED_GATE_UP, SHARED_DOWN = range(7)
TOKENS, LOGITS = 100, 200


def normal(stream: int, *size: int, std: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw a tensor from the random stream that belongs to it alone."""
    generator = torch.Generator(device).manual_seed(SEED * 1000 + stream)
    return torch.empty(*size, dtype=dtype, device=device).normal_(std=std, generator=generator)


@attrs.frozen(eq=False)
class MoETestData:
    """
    One rank's tokens, and the full weights. Weights are (out, in), experts are stacked.

    Attributes:
        w1: gate and up projection of every expert, (experts, 2 n, k').
        w2: down projection of every expert, (experts, k', n).
        hidden_states: tokens of this data parallel rank, (tokens, k).
        router_logits: given to the layer unless it has a gate, (tokens, experts).
        gate: the gate's weight, (experts, k).
        routed_input_transform: (k', k).
        routed_output_transform: (k, k').
        shared_w1: gate and up projection of the shared experts, (2 n, k).
        shared_w2: their down projection, (k, n).
    """

    w1: Tensor
    w2: Tensor
    hidden_states: Tensor
    router_logits: Tensor
    gate: Tensor
    routed_input_transform: Tensor
    routed_output_transform: Tensor
    shared_w1: Tensor
    shared_w2: Tensor


def output_scale(config: MoETestConfig) -> float:
    """
    Size of the output: what the down projections are multiplied with.

    The error of a quantization is relative, its tolerance half absolute, so an output of
    size 1 would be rejected for honest rounding. A power of two changes no rounding.
    """
    return 1.0 if config.quantization is None else 0.125


def setup_moe_test_data(config: MoETestConfig, dp_rank: int, device: torch.device) -> MoETestData:
    """
    Draw the data of *config*.

    Each data parallel rank has tokens of its own: with equal tokens everywhere, one that
    is returned to the wrong rank would go unnoticed.
    """
    n, k, dtype = config.n, config.k, config.in_dtype
    tokens = config.num_tokens_across_dp[dp_rank]
    inner, scale = config.routed_expert_hidden_size, output_scale(config)
    w1, w2 = make_test_weights(config.num_experts, n, inner, dtype, device)

    def draw(stream: int, *size: int, std: float, dtype: torch.dtype = dtype) -> Tensor:
        return normal(stream, *size, std=std, dtype=dtype, device=device)

    return MoETestData(
        w1=w1,
        w2=w2 * scale,
        hidden_states=draw(TOKENS + dp_rank, tokens, k, std=TOKEN_SCALE),
        # Logits in float32: in bfloat16, equal logits would make the choice arbitrary.
        router_logits=draw(LOGITS + dp_rank, tokens, config.num_experts, std=LOGIT_SCALE, dtype=torch.float32),
        gate=draw(GATE, config.num_experts, k, std=LOGIT_SCALE / TOKEN_SCALE * k**-0.5),
        routed_input_transform=draw(TRANSFORM_IN, k // 2, k, std=k**-0.5),
        routed_output_transform=draw(TRANSFORM_OUT, k, k // 2, std=(k // 2) ** -0.5),
        shared_w1=draw(SHARED_GATE_UP, 2 * n, k, std=k**-0.5 / TOKEN_SCALE),
        # Half as large as the routed output, which must not hide behind it.
        shared_w2=draw(SHARED_DOWN, k, n, std=0.8 * n**-0.5) * scale,
    )


@lru_cache(maxsize=1)
def make_test_weights(
    num_experts: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draw the experts, scaled by fan-in so that each answers with a spread of about 1."""
    w1 = normal(GATE_UP, num_experts, 2 * n, k, std=k**-0.5 / TOKEN_SCALE, dtype=dtype, device=device)
    w2 = normal(DOWN, num_experts, k, n, std=1.6 * n**-0.5, dtype=dtype, device=device)
    return w1, w2
