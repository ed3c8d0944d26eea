"""Configurations on a pool of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from collective_scope import Subtests
from examples.pool import Pool

from .config import PARALLEL_COMBOS, MoETestConfig
from .selection import why_too_large
from .worker import Options, _parallel_worker, make_groups


def make_pool(device_type: str, env_dict: Mapping[str, str] | None = None, *, verbose: bool = False) -> Pool:
    """Return as many ranks as the largest layout needs that fits on this machine."""
    sizes = [dp * tp for name, (dp, tp, _) in PARALLEL_COMBOS.items() if why_too_large(name, device_type) is None]
    return Pool(max(sizes), partial(make_groups, device_type=device_type), env=env_dict, verbose=verbose)


def parallel_launch_with_config(
    pool: Pool, configs: Iterable[MoETestConfig], options: Options, report: Subtests
) -> None:
    """Run *configs*, each on as many ranks as it needs."""
    begun = ""
    for config in configs:
        needed = use_of_nvshmem(config, begun)
        if begun and needed != begun:
            pool.restart()
        begun = needed
        pool.run(config.id(), _parallel_worker, config, options, ranks=config.world_size, report=report)


def use_of_nvshmem(config: MoETestConfig, begun: str) -> str:
    """
    Return how NVSHMEM has begun in the ranks after *config*, which needs new ranks if it has *begun* in another way.

    For symmetric memory it begins once in a process, with as many ranks as the group has then, and not where DeepEP has
    been used before. DeepEP takes it as it is.
    """
    if config.backend == "symm_mem":
        return f"symm_mem on {config.world_size} ranks"
    return begun or (config.backend if config.backend is not None and config.backend.startswith("deep_ep") else "")
