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
    size, has_used_deep_ep = 0, False
    for config in configs:
        if config.backend == "symm_mem":
            # NVSHMEM begins once in a process, with as many ranks as the group has then; not where DeepEP came first.
            if size not in (0, config.world_size) or (size == 0 and has_used_deep_ep):
                pool.restart()
            size, has_used_deep_ep = config.world_size, False
        has_used_deep_ep |= (config.backend or "").startswith("deep_ep")
        pool.run(config.id(), _parallel_worker, config, options, ranks=config.world_size, report=report)
