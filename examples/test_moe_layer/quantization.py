"""
Expert weights in every quantization: how they are stored, and how they multiply.

The weights are really quantized. Products run on fp8 matrix units where the device has
them (per-tensor scales), and on exactly dequantized values everywhere else.
"""

from __future__ import annotations

from typing import Self

import attrs
import torch
from torch import Tensor
from torch.nn import functional


E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
BLOCK = 128
NVFP4_GROUP = 16
NVFP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of two bits of exponent and one of mantissa (e2m1); a sign comes on top."""

TINY = 1e-12
"""Stands in for a scale of zero."""


@attrs.define(eq=False)
class QuantizedWeights:
    """
    The weights of some experts, unquantized; the other classes refine it.

    Attributes:
        values: the factors, experts stacked, (experts, out, in).
    """

    values: Tensor

    @classmethod
    def quantize(cls, weights: Tensor) -> Self:
        """Quantize experts one by one, (experts, out, in)."""
        parts = [cls.quantize_expert(weight) for weight in weights]
        return cls(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))

    @classmethod
    def quantize_expert(cls, weight: Tensor) -> tuple[Tensor, ...]:
        """Quantize one expert, (out, in), to one tensor per attribute."""
        return (weight,)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that belongs to an expert, by name; the first dimension is the expert."""
        return {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """Multiply tokens (tokens, in) with the weights of one local expert."""
        return functional.linear(x, self.values[expert])


@attrs.define(eq=False)
class Fp8(QuantizedWeights):
    """One scale per expert; tokens are scaled by their largest value."""

    scale: Tensor

    @classmethod
    def quantize_expert(cls, weight: Tensor) -> tuple[Tensor, ...]:
        """Divide by one scale, round."""
        scale = weight.abs().max().float() / E4M3_MAX
        return to_e4m3(weight.float() / scale), scale

    def token_scale(self, x: Tensor) -> Tensor:
        """Return what the tokens are divided by."""
        return x.abs().max().float().clamp(min=TINY) / E4M3_MAX

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """Multiply e4m3 with e4m3, then apply both scales."""
        token_scale, scale = self.token_scale(x), self.scale[expert]
        tokens, values = to_e4m3(x.float() / token_scale), self.values[expert]
        if has_fp8_units(x.device):
            # A scale in memory of its own: cuBLAS wants it at a multiple of 16 bytes, and says
            # CUBLAS_STATUS_NOT_SUPPORTED to a view into the scales of all experts, unless the
            # expert's number is a multiple of 4. Rows need no padding, nor do weights.
            return torch._scaled_mm(  # noqa: SLF001 -- torch has no public name for it yet
                tokens, values.T, scale_a=token_scale, scale_b=scale.clone(), out_dtype=x.dtype
            )
        # Every e4m3 number is a bfloat16 number: the same product, but on other units.
        product = functional.linear(tokens.to(x.dtype), values.to(x.dtype))
        return (product.float() * (token_scale * scale)).to(x.dtype)


@attrs.define(eq=False)
class ModelOptFp8(Fp8):
    """As `Fp8`, but the scale of the tokens is part of the checkpoint. Here it is 1."""

    def token_scale(self, x: Tensor) -> Tensor:
        """Return what the checkpoint says."""
        return torch.ones((), device=x.device)


@attrs.define(eq=False)
class Fp8Blocked(QuantizedWeights):
    """One scale per 128 x 128 weights, and one per 128 values of each token."""

    scale: Tensor

    @classmethod
    def quantize_expert(cls, weight: Tensor) -> tuple[Tensor, ...]:
        """Divide block by block, round."""
        blocks = weight.float().view(len(weight) // BLOCK, BLOCK, -1, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / E4M3_MAX
        return to_e4m3(blocks / scale[:, None, :, None]).view(weight.shape), scale

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """Round the tokens to e4m3 as well, and multiply what all that stands for."""
        values = self.values[expert].float()
        blocks = values.view(len(values) // BLOCK, BLOCK, -1, BLOCK)
        weight = (blocks * self.scale[expert][:, None, :, None]).view_as(values)

        groups = x.float().view(len(x), x.shape[1] // BLOCK, BLOCK)
        token_scale = groups.abs().amax(dim=2, keepdim=True).clamp(min=TINY) / E4M3_MAX
        tokens = (to_e4m3(groups / token_scale).float() * token_scale).flatten(1)
        return functional.linear(tokens.to(x.dtype), weight.to(x.dtype))


@attrs.define(eq=False)
class NvFp4(QuantizedWeights):
    """
    Two e2m1 numbers a byte, an e4m3 scale per 16 of them, a float32 scale per expert.

    Tokens stay as they are: few devices multiply fp4, and the weights are the larger part.
    """

    scale: Tensor
    global_scale: Tensor

    @classmethod
    def quantize_expert(cls, weight: Tensor) -> tuple[Tensor, ...]:
        """Choose the scales, round to codes, pack two of them a byte."""
        groups = weight.float().view(len(weight), -1, NVFP4_GROUP)
        largest = groups.abs().amax(dim=2)
        # So that the largest group scale is the largest e4m3 number.
        global_scale = largest.max() / (NVFP4_LEVELS[-1] * E4M3_MAX)
        scale = to_e4m3(largest / NVFP4_LEVELS[-1] / global_scale)
        unit = (scale.float() * global_scale).clamp(min=TINY)
        codes = to_e2m1(groups / unit[:, :, None]).flatten(1)
        return codes[:, ::2] | codes[:, 1::2] << 4, scale, global_scale

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """Look up what the codes stand for, and multiply."""
        levels = torch.tensor(NVFP4_LEVELS, device=x.device)
        levels = torch.cat([levels, -levels])
        # Byte by byte: what a byte's low half says, then its high half.
        pairs = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)
        values = functional.embedding(self.values[expert].int(), pairs).flatten(1)
        unit = self.scale[expert].float() * self.global_scale[expert]
        weight = values.view(len(values), -1, NVFP4_GROUP) * unit[:, :, None]
        return functional.linear(x, weight.flatten(1).to(x.dtype))


def to_e4m3(x: Tensor) -> Tensor:
    """Round to e4m3; what is out of range becomes the largest number, not NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest level; the code is its index, plus 8 if negative."""
    size = x.abs().clamp(max=NVFP4_LEVELS[-1])
    # Levels are 1/2 apart up to 2 (codes 0 to 4), 1 apart up to 4 (4 to 6), then 2 apart.
    code = torch.where(size < 4.0, size.round() + 2.0, (size / 2.0).round() + 4.0)
    code = torch.where(size < 2.0, (size * 2.0).round(), code)
    return code.to(torch.uint8) + 8 * (x < 0).to(torch.uint8)


def has_fp8_units(device: torch.device) -> bool:
    """Ada and Hopper were the first."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


SCHEMES: dict[str | None, type[QuantizedWeights]] = {
    None: QuantizedWeights,
    "fp8": Fp8,
    "fp8_blocked": Fp8Blocked,
    "modelopt_fp8": ModelOptFp8,
    "modelopt_fp4": NvFp4,
}
