"""The matrix: axes, one configuration, its id, why a combination is invalid, tolerances. Names and ids are vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Self

import attrs
import torch


SHAPE_COMBOS = ((1, 128, 256), (32, 512, 512), (222, 1024, 2048))
"""Tokens of a data parallel rank, intermediate size, hidden size: (m, n, k)."""

NUM_EXPERTS = (8, 64)
TOP_KS = (2, 6)
QUANT_METHODS = (None, "fp8", "fp8_blocked", "modelopt_fp8", "modelopt_fp4")
LARGE_HIDDEN = 2048

PARALLEL_COMBOS = {
    "single": (1, 1, False),
    "tp2": (1, 2, False),
    "tp4": (1, 4, False),
    "ep2": (2, 1, True),
    "ep4": (4, 1, True),
    "sp4": (2, 2, True),
}
"""Layouts: data parallel size, tensor parallel size, whether experts are divided among all ranks."""

BACKEND_SUPPORTED_QUANTS: dict[str, tuple[str | None, ...]] = {
    "allgather_reducescatter": (None, "fp8", "modelopt_fp8", "modelopt_fp4"),
    "all_to_all": QUANT_METHODS,
    "shared_memory": QUANT_METHODS,
    "symm_mem": QUANT_METHODS,
    "deep_ep": (None, "fp8_blocked", "modelopt_fp8", "modelopt_fp4"),
    "deep_ep_low_latency": (None, "fp8_blocked", "modelopt_fp4"),
}
BACKENDS = tuple(BACKEND_SUPPORTED_QUANTS)

VLLM_BACKENDS = {"deepep_high_throughput": "deep_ep", "deepep_low_latency": "deep_ep_low_latency"}
"""Names in vLLM of backends with another name here."""

DEEPEP_LOW_LATENCY_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
"""Hidden sizes that its kernels are compiled for."""

EPLB_SUPPORTED_QUANTS = (None, "fp8")
EPLB_SUPPORTED_BACKENDS = ("allgather_reducescatter",)

NATIVE_CAPABILITY = {"fp8": (8, 9), "fp8_blocked": (8, 9), "modelopt_fp8": (8, 9), "modelopt_fp4": (10, 0)}
"""Compute capability from which on a device multiplies such numbers itself; before it, this port emulates."""


@attrs.frozen
class MoETestConfig:
    """One subtest. The order of the fields is the order of the words in its id."""

    m: int
    n: int
    k: int
    num_experts: int
    top_k: int
    in_dtype: torch.dtype
    quantization: str | None
    use_shared_experts: bool
    use_gate: bool
    use_routed_input_transform: bool  # experts work at k / 2
    enable_eplb: bool = False
    backend: str | None = None
    ep_size: int = 1
    dp_size: int = 1
    tp_size: int = 1
    uneven_tokens: bool = False  # not in vLLM, and in the id only if True

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp_size * self.tp_size

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether tokens, not weights, are split over the tensor parallel ranks."""
        return self.ep_size > 1 and self.tp_size > 1

    @property
    def layout(self) -> str:
        """Name of its parallel combination; empty if the matrix has none such."""
        combo = (self.dp_size, self.tp_size, self.ep_size > 1)
        known = next((name for name, each in PARALLEL_COMBOS.items() if each == combo), "")
        return known if self.ep_size in (1, self.world_size) else ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens, intermediate size, hidden size."""
        return self.m, self.n, self.k

    @property
    def routed_expert_hidden_size(self) -> int:
        """Hidden size that the experts see."""
        return self.k // 2 if self.use_routed_input_transform else self.k

    @property
    def num_tokens_across_dp(self) -> list[int]:
        """How many tokens each data parallel rank has; *m* the first one, and fewer, down to none, the others if uneven."""
        return [self.m * (self.dp_size - rank * self.uneven_tokens) // self.dp_size for rank in range(self.dp_size)]

    @property
    def switches(self) -> dict[str, bool]:
        """The on-off fields."""
        return {field.name: getattr(self, field.name) for field in attrs.fields(type(self)) if field.type == "bool"}

    def id(self) -> str:
        """Return every field in one word; `from_id` converts it back."""
        values = attrs.astuple(self)
        words = [str(value).removeprefix("torch.") for value in values[: None if self.uneven_tokens else -1]]
        return f"[{'-'.join(words)}]"

    @classmethod
    def from_id(cls, text: str) -> Self:
        """
        Convert an id, this port's or vLLM's, to its configuration.

        Raises:
            ValueError: If *text* is not the id of a configuration.
        """
        words = text.strip().removeprefix("[").removesuffix("]").split("-")
        fields = attrs.fields(cls)
        if len(words) not in (len(fields) - 1, len(fields)):
            msg = f"{text!r} has {len(words)} words, an id has {len(fields) - 1}, or {len(fields)} with uneven_tokens"
            raise ValueError(msg)
        values = []
        for field, word in zip(fields, words, strict=False):
            try:
                values.append(CONVERTERS[field.type](word))
            except (KeyError, ValueError):
                msg = f"{text!r} is not the id of a configuration: {word!r} is no {field.name} ({field.type})"
                raise ValueError(msg) from None
        return cls(*values)

    @property
    def tolerance(self) -> float:
        """Absolute and relative tolerance against unquantized weights; vLLM's."""
        large = self.k >= LARGE_HIDDEN
        if self.quantization is None:
            return 7.6e-2 if large else 3.5e-2
        if "fp8" in self.quantization:
            return 6.5e-2
        is_gathered = self.backend == "allgather_reducescatter" and self.tp_size > 1
        return 1e-1 + (self.k * 1e-4 if large else 0.0) + (2e-1 if is_gathered else 0.0)

    @property
    def row_tolerance(self) -> float:
        """
        Largest error of a token's whole output, relative to its size (2-norm).

        Not vLLM's, and the sharper test: where a single number may be off by more than the size
        of the output, an expert computed from the wrong half of a rank's weights passes.
        """
        if self.quantization is None:
            return 0.02
        return 0.12 if "fp8" in self.quantization else 0.22


CONVERTERS: dict[object, Callable[[str], object]] = {
    "int": int,
    "bool": {"True": True, "False": False}.__getitem__,
    "torch.dtype": {"bfloat16": torch.bfloat16}.__getitem__,
    "str | None": lambda word: None if word == "None" else VLLM_BACKENDS.get(word, word),
}
"""From a word of an id to the value of a field of that type."""

RULES: tuple[tuple[str, Callable[[MoETestConfig], bool]], ...] = (
    ("the matrix has no such layout", lambda c: not c.layout),
    ("there is no such quantization", lambda c: c.quantization not in QUANT_METHODS),
    ("there is no such backend", lambda c: c.backend is not None and c.backend not in BACKENDS),
    ("a backend is needed with peers, and only then", lambda c: (c.world_size == 1) != (c.backend is None)),
    (
        "the backend is not tested with this quantization",
        lambda c: c.backend in BACKENDS and c.quantization not in BACKEND_SUPPORTED_QUANTS[c.backend],
    ),
    (
        "only allgather_reducescatter runs without expert parallelism",
        lambda c: c.backend not in (None, "allgather_reducescatter") and c.ep_size == 1,
    ),
    (
        "deep_ep_low_latency has kernels for some hidden sizes only",
        lambda c: c.backend == "deep_ep_low_latency" and c.k not in DEEPEP_LOW_LATENCY_HIDDEN,
    ),
    (
        "DeepEP is not given a rank without tokens",
        lambda c: c.backend in VLLM_BACKENDS.values() and 0 in c.num_tokens_across_dp,
    ),
    (
        "a routed input transform needs shared experts, which see the untransformed input",
        lambda c: c.use_routed_input_transform and not c.use_shared_experts,
    ),
    (
        "a routed input transform does not combine with EPLB",
        lambda c: c.use_routed_input_transform and c.enable_eplb,
    ),
    (
        "a routed input transform does not combine with a gate inside the layer",
        lambda c: c.use_routed_input_transform and c.use_gate,
    ),
    (
        "DeepEP has no routed input transform",
        lambda c: c.use_routed_input_transform and c.backend in VLLM_BACKENDS.values(),
    ),
    (
        "a routed input transform is tested unquantized only at k >= 2048",
        lambda c: c.use_routed_input_transform and c.quantization is not None and c.k >= LARGE_HIDDEN,
    ),
    ("EPLB needs expert parallelism", lambda c: c.enable_eplb and c.ep_size == 1),
    (
        "EPLB is tested with quantization None and fp8 only",
        lambda c: c.enable_eplb and c.quantization not in EPLB_SUPPORTED_QUANTS,
    ),
    (
        "EPLB is tested with allgather_reducescatter only",
        lambda c: c.enable_eplb and c.backend not in EPLB_SUPPORTED_BACKENDS,
    ),
    ("experts must divide evenly among the ranks", lambda c: c.num_experts % c.ep_size != 0),
    ("uneven tokens need data parallelism", lambda c: c.uneven_tokens and c.dp_size == 1),
    (
        "uneven tokens are tested with quantization None and fp8 only",
        lambda c: c.uneven_tokens and c.quantization not in (None, "fp8"),
    ),
)
"""A reason in words, and when it applies."""


def why_invalid(config: MoETestConfig, capability: tuple[int, int] | None = None) -> list[str]:
    """
    Return every reason why *config* is not a valid combination; none if it is.

    Args:
        config: One to judge.
        capability: A device's compute capability, if what this device has to emulate is invalid; None: all is emulated.
    """
    reasons = [reason for reason, applies in RULES if applies(config)]
    needed = NATIVE_CAPABILITY.get(config.quantization or "", (0, 0))
    if capability is not None and capability < needed:
        here = ".".join(map(str, capability))
        reasons.append(f"{config.quantization} needs compute capability {'.'.join(map(str, needed))} (got {here})")
    return reasons


def is_valid_config(config: MoETestConfig, capability: tuple[int, int] | None = None) -> tuple[bool, str | None]:
    """Return whether *config* is a valid combination, and if not, why not; see `why_invalid`."""
    reasons = why_invalid(config, capability)
    return not reasons, "; ".join(reasons) or None


def all_combinations(layouts: Sequence[str], backends: Sequence[str]) -> Iterator[MoETestConfig]:
    """Yield the whole product, what decides the weights changing slowest (see `data`)."""
    switch = (False, True)
    parallel = [
        (backend if dp * tp > 1 else None, dp * tp if use_ep else 1, dp, tp)
        for dp, tp, use_ep in (PARALLEL_COMBOS[name] for name in layouts)
        for backend in (backends if dp * tp > 1 else ("",))
    ]
    for shape, experts, transform, top_k, gate, quantization in product(
        SHAPE_COMBOS, NUM_EXPERTS, switch, TOP_KS, switch, QUANT_METHODS
    ):
        for shared, eplb, (backend, ep, dp, tp), uneven in product(switch, switch, parallel, switch):
            weights = (*shape, experts, top_k, torch.bfloat16, quantization)
            yield MoETestConfig(*weights, shared, gate, transform, eplb, backend, ep, dp, tp, uneven)


def generate_valid_test_configs(
    layouts: Sequence[str], backends: Sequence[str], capability: tuple[int, int] | None = None
) -> list[MoETestConfig]:
    """Return the valid ones of all combinations."""
    return [config for config in all_combinations(layouts, backends) if is_valid_config(config, capability)[0]]
