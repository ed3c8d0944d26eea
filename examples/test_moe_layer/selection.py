"""Which configurations to run: all, or few that touch every pair of values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from .config import SHAPES, Config, Layout, all_combinations, why_invalid


LARGEST = SHAPES[-1]


def valid_configs(layouts: Sequence[Layout], backends: Sequence[str]) -> list[Config]:
    candidates = all_combinations(tuple(layouts), tuple(backends))
    return [config for config in candidates if not why_invalid(config)]


def quick_set(configs: Sequence[Config]) -> list[Config]:
    """
    Choose configurations in which every valid pair of values of two axes occurs.

    Layout and backend count as one axis, since together they decide the path of a token.
    The largest shape takes part with the fewest experts only: more make it eight times as
    heavy and take no other path.
    """
    fewest = min((config.num_experts for config in configs), default=0)
    return pairwise(c for c in configs if c.shape != LARGEST or c.num_experts == fewest)


def full_set(configs: Sequence[Config], device_type: str) -> list[Config]:
    """Choose everything; on a CPU only a pairwise sample of the largest shape."""
    if device_type != "cpu":
        return list(configs)
    sample = set(pairwise(c for c in configs if c.shape == LARGEST))
    return [c for c in configs if c.shape != LARGEST or c in sample]


def pairwise(configs: Iterable[Config]) -> list[Config]:
    """
    Choose few of *configs* that together contain every pair of values all of them contain.

    Greedy and deterministic: always the one with most new pairs; of equals the cheapest,
    then the first. Returned in the order given, which is the order that reuses weights.
    """
    configs = list(configs)
    numbers: dict[object, int] = {}  # of each pair, the bit that stands for it
    masks = [sum(1 << numbers.setdefault(pair, len(numbers)) for pair in pairs(config)) for config in configs]
    missing = (1 << len(numbers)) - 1
    chosen = set()
    while missing:
        best = max(
            range(len(configs)),
            key=lambda i: ((masks[i] & missing).bit_count(), -cost(configs[i]), -i),
        )
        chosen.add(best)
        missing &= ~masks[best]
    return [configs[i] for i in sorted(chosen)]


def pairs(config: Config) -> Iterable[object]:
    """List every two axes of *config* with their values."""
    axes = {
        "shape": config.shape,
        "experts": config.num_experts,
        "top_k": config.top_k,
        "quantization": config.quantization,
        "route": (config.layout.name, config.backend),
        **config.switches,
    }
    return combinations(axes.items(), 2)


def cost(config: Config) -> int:
    """Estimate the work of one configuration: weights to draw, quantize and multiply."""
    return config.num_experts * config.n * config.k * config.layout.world_size
