"""The configurations to run: all, or few that touch every pair of values, or those with given ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import torch

from .backends import why_unavailable
from .config import (
    BACKENDS,
    PARALLEL_COMBOS,
    SHAPE_COMBOS,
    MoETestConfig,
    all_combinations,
    generate_valid_test_configs,
    why_invalid,
)


LARGEST = SHAPE_COMBOS[-1]

Capability = tuple[int, int] | None


def default_device_type() -> str:
    """Choose GPUs where there are enough for two ranks."""
    return "cuda" if torch.cuda.device_count() > 1 else "cpu"


def why_too_large(layout: str, device_type: str) -> str | None:
    """Return why there are too few devices for *layout*; a CPU is shared."""
    dp, tp, _ = PARALLEL_COMBOS[layout]
    if device_type == "cpu" or dp * tp <= torch.cuda.device_count():
        return None
    return f"{layout} needs {dp * tp} GPUs, here are {torch.cuda.device_count()}"


def select(
    layouts: Sequence[str],
    backends: Sequence[str],
    device_type: str,
    *,
    full: bool = False,
    capability: Capability = None,
) -> tuple[list[MoETestConfig], list[str]]:
    """Choose from what runs here: the quick set, or everything. Return that, and what is left out and why."""
    lacks = [why_unavailable(name, device_type) for name in backends]
    lacks += [why_too_large(layout, device_type) for layout in layouts]
    configs = generate_valid_test_configs(
        [layout for layout in layouts if why_too_large(layout, device_type) is None],
        [name for name in backends if why_unavailable(name, device_type) is None],
        capability,
    )
    chosen = full_set(configs, device_type) if full else quick_set(configs)
    return in_order(chosen), [reason for reason in lacks if reason]


def select_ids(
    ids: Iterable[str], device_type: str, capability: Capability = None
) -> tuple[list[MoETestConfig], list[str]]:
    """Convert *ids* to configurations; return those, and why not for those that cannot run."""
    configs, skipped = [], []
    for text in ids:
        try:
            config = MoETestConfig.from_id(text)
        except ValueError as error:
            skipped.append(str(error))
            continue
        reasons: list[str | None] = [*why_invalid(config, capability)]
        if not reasons:
            reasons.append(config.backend and why_unavailable(config.backend, device_type))
            reasons.append(why_too_large(config.layout, device_type))
        if why := "; ".join(filter(None, reasons)):
            skipped.append(f"{config.id()}: {why}")
        else:
            configs.append(config)
    return in_order(configs), skipped


def in_order(configs: Iterable[MoETestConfig]) -> list[MoETestConfig]:
    """Sort by the number of ranks: with each change, all groups are made anew."""
    return sorted(configs, key=lambda config: config.world_size)


def explain_invalid(verbosity: int, capability: Capability = None) -> Iterator[str]:
    """Say how many combinations are left out for what reason; from verbosity 3 on, which ones."""
    reasons: Counter[str] = Counter()
    for config in all_combinations(list(PARALLEL_COMBOS), BACKENDS):
        why = why_invalid(config, capability)
        reasons.update(why)
        if why and verbosity > 2:
            yield f"left out: {config.id()}: {'; '.join(why)}"
    for reason, count in reasons.most_common():
        yield f"left out: {reason} ({count} combinations)"


def quick_set(configs: Sequence[MoETestConfig]) -> list[MoETestConfig]:
    """
    Choose configurations in which every valid pair of values of two axes occurs.

    Layout and backend count as one axis, since together they decide the path of a token.
    The largest shape takes part with the fewest experts only: more make it eight times as
    heavy and take no other path.
    """
    fewest = min((config.num_experts for config in configs), default=0)
    return pairwise(c for c in configs if c.shape != LARGEST or c.num_experts == fewest)


def full_set(configs: Sequence[MoETestConfig], device_type: str) -> list[MoETestConfig]:
    """Choose everything; on a CPU only a pairwise sample of the largest shape."""
    if device_type != "cpu":
        return list(configs)
    sample = set(pairwise(c for c in configs if c.shape == LARGEST))
    return [c for c in configs if c.shape != LARGEST or c in sample]


def pairwise(configs: Iterable[MoETestConfig]) -> list[MoETestConfig]:
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


def pairs(config: MoETestConfig) -> Iterable[object]:
    """List every two axes of *config* with their values."""
    axes = {
        "shape": config.shape,
        "experts": config.num_experts,
        "top_k": config.top_k,
        "quantization": config.quantization,
        "route": (config.layout, config.backend),
        **config.switches,
    }
    return combinations(axes.items(), 2)


def cost(config: MoETestConfig) -> int:
    """Estimate the work of one configuration: weights to draw, quantize and multiply."""
    return config.num_experts * config.n * config.k * config.world_size
