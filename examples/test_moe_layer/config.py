"""The matrix: axes, one configuration, its id, why a combination is invalid, tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import attrs
import torch


SHAPES = ((1, 128, 256), (32, 512, 512), (222, 1024, 2048))
"""Tokens a data parallel rank holds, intermediate size, hidden size: (m, n, k)."""

NUM_EXPERTS = (8, 64)
TOP_K = (2, 6)
DTYPES = ("bfloat16",)
QUANTIZATIONS = ("none", "fp8", "fp8_blocked", "modelopt_fp8", "modelopt_fp4")
LARGE_HIDDEN = 2048


@attrs.frozen
class Layout:
    """How the ranks are used: *dp* x *tp* ranks, expert parallel over all of them or not."""

    name: str
    dp: int
    tp: int
    expert_parallel: bool

    @property
    def world_size(self) -> int:
        """Number of ranks in all."""
        return self.dp * self.tp

    @property
    def ep(self) -> int:
        """Number of ranks the experts are divided among."""
        return self.world_size if self.expert_parallel else 1

    @property
    def sequence_parallel(self) -> bool:
        """Tokens, not weights, are split over the *tp* ranks."""
        return self.expert_parallel and self.tp > 1


SINGLE = Layout("single", dp=1, tp=1, expert_parallel=False)
LAYOUTS = {
    layout.name: layout
    for layout in (
        SINGLE,
        Layout("tp2", dp=1, tp=2, expert_parallel=False),
        Layout("tp4", dp=1, tp=4, expert_parallel=False),
        Layout("ep2", dp=2, tp=1, expert_parallel=True),
        Layout("ep4", dp=4, tp=1, expert_parallel=True),
        Layout("sp4", dp=2, tp=2, expert_parallel=True),
    )
}

BACKENDS: dict[str, tuple[str, ...]] = {
    # As in vLLM, whose gather-based backend has no blocked fp8.
    "allgather_reducescatter": ("none", "fp8", "modelopt_fp8", "modelopt_fp4"),
    "all_to_all": QUANTIZATIONS,
    "shared_memory": QUANTIZATIONS,
    "symm_mem": QUANTIZATIONS,
    "deep_ep": ("none", "fp8_blocked", "modelopt_fp8", "modelopt_fp4"),
}
"""Backend -> the quantizations it is tested with."""

NO_BACKEND = "local"
"""Backend of the layout `single`, which sends nothing."""


@attrs.frozen
class Config:
    """One subtest. Field order is the order of the words in its id."""

    m: int
    n: int
    k: int
    num_experts: int
    top_k: int
    dtype: str
    quantization: str
    shared_experts: bool
    gate: bool
    latent: bool  # routed input transform: experts work at k / 2
    eplb: bool
    layout: Layout
    backend: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens, intermediate size, hidden size."""
        return self.m, self.n, self.k

    @property
    def expert_hidden(self) -> int:
        """Hidden size the experts see."""
        return self.k // 2 if self.latent else self.k

    @property
    def torch_dtype(self) -> torch.dtype:
        """What *dtype* names."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def id(self) -> str:
        """Every field in one word; `config_from_id` converts it back."""
        words = [
            f"m{self.m}",
            f"n{self.n}",
            f"k{self.k}",
            f"e{self.num_experts}",
            f"top{self.top_k}",
            self.dtype,
            self.quantization,
            *(word if on else f"no{word}" for word, on in self.switches.items()),
            self.layout.name,
            self.backend,
        ]
        return f"[{'-'.join(words)}]"

    @property
    def switches(self) -> dict[str, bool]:
        """What is on or off, by its word in the id."""
        return {
            "shared": self.shared_experts,
            "gate": self.gate,
            "latent": self.latent,
            "eplb": self.eplb,
        }

    @property
    def tolerance(self) -> float:
        """Absolute and relative tolerance against unquantized weights."""
        large = self.k >= LARGE_HIDDEN
        if self.quantization == "none":
            return 7.6e-2 if large else 3.5e-2
        if "fp8" in self.quantization:
            return 6.5e-2
        gathered = self.backend == "allgather_reducescatter" and self.layout.tp > 1
        return 1e-1 + (self.k * 1e-4 if large else 0.0) + (2e-1 if gathered else 0.0)

    @property
    def row_tolerance(self) -> float:
        """
        Largest error of a token's whole output, relative to its size (2-norm).

        Ours, and the sharper test: where a single number may be off by more than the size
        of the output, an expert computed from the wrong half of a rank's weights passes.
        """
        if self.quantization == "none":
            return 0.02
        return 0.12 if "fp8" in self.quantization else 0.22


def config_from_id(text: str) -> Config:
    """
    Convert an id back to its configuration.

    Raises:
        ValueError: If *text* is not the id of a configuration.
    """
    words = text.strip().removeprefix("[").removesuffix("]").split("-")
    if len(words) != len(attrs.fields(Config)):
        msg = f"{text!r} has {len(words)} words, an id has {len(attrs.fields(Config))}"
        raise ValueError(msg)
    try:
        config = Config(
            m=int(words[0].removeprefix("m")),
            n=int(words[1].removeprefix("n")),
            k=int(words[2].removeprefix("k")),
            num_experts=int(words[3].removeprefix("e")),
            top_k=int(words[4].removeprefix("top")),
            dtype=words[5],
            quantization=words[6],
            shared_experts=words[7] == "shared",
            gate=words[8] == "gate",
            latent=words[9] == "latent",
            eplb=words[10] == "eplb",
            layout=LAYOUTS[words[11]],
            backend=words[12],
        )
    except (KeyError, ValueError) as exc:
        msg = f"{text!r} is not the id of a configuration: {exc}"
        raise ValueError(msg) from exc
    if config.id != f"[{'-'.join(words)}]":  # a misspelt switch would otherwise mean "off"
        msg = f"{text!r} is not the id of a configuration; did you mean {config.id!r}?"
        raise ValueError(msg)
    return config


RULES: tuple[tuple[str, Callable[[Config], bool]], ...] = (
    (
        "no backend is needed without peers, and only then",
        lambda c: (c.layout.world_size == 1) != (c.backend == NO_BACKEND),
    ),
    (
        "the backend is not tested with this quantization",
        lambda c: c.backend != NO_BACKEND and c.quantization not in BACKENDS[c.backend],
    ),
    (
        "only allgather_reducescatter runs without expert parallelism",
        lambda c: c.backend not in (NO_BACKEND, "allgather_reducescatter") and not c.layout.expert_parallel,
    ),
    (
        "a routed input transform needs shared experts, which see the untransformed input",
        lambda c: c.latent and not c.shared_experts,
    ),
    (
        "a routed input transform does not combine with EPLB",
        lambda c: c.latent and c.eplb,
    ),
    (
        "a routed input transform does not combine with a gate inside the layer",
        lambda c: c.latent and c.gate,
    ),
    (
        "deep_ep has no routed input transform",
        lambda c: c.latent and c.backend == "deep_ep",
    ),
    (
        "a routed input transform is tested unquantized only at k >= 2048",
        lambda c: c.latent and c.quantization != "none" and c.k >= LARGE_HIDDEN,
    ),
    (
        "EPLB needs expert parallelism",
        lambda c: c.eplb and not c.layout.expert_parallel,
    ),
    (
        "EPLB is tested with quantization none and fp8 only",
        lambda c: c.eplb and c.quantization not in ("none", "fp8"),
    ),
    (
        "EPLB is tested with allgather_reducescatter only",
        lambda c: c.eplb and c.backend != "allgather_reducescatter",
    ),
    (
        "experts must divide evenly among the ranks",
        lambda c: c.num_experts % c.layout.ep != 0,
    ),
)
"""A reason in words, and when it applies."""


def why_invalid(config: Config) -> list[str]:
    """Return every reason why *config* is not a valid combination; none if it is."""
    return [reason for reason, applies in RULES if applies(config)]


def all_combinations(layouts: tuple[Layout, ...], backends: tuple[str, ...]) -> Iterator[Config]:
    """Yield the whole product, what decides the weights changing slowest (see `data`)."""
    switch = (False, True)
    for shape, experts, latent, top_k, gate, dtype, quantization in product(
        SHAPES, NUM_EXPERTS, switch, TOP_K, switch, DTYPES, QUANTIZATIONS
    ):
        for shared, eplb, layout, backend in product(switch, switch, layouts, (NO_BACKEND, *backends)):
            yield Config(
                *shape,
                num_experts=experts,
                top_k=top_k,
                dtype=dtype,
                quantization=quantization,
                shared_experts=shared,
                gate=gate,
                latent=latent,
                eplb=eplb,
                layout=layout,
                backend=backend,
            )
