"""From a selection to a report: layout after layout, each on processes of its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

import attrs
import torch

from .backends import why_unavailable
from .config import BACKENDS, LAYOUTS, Config, Layout, all_combinations, config_from_id, why_invalid
from .launch import launch
from .selection import LARGEST, full_set, quick_set, valid_configs
from .worker import Options, Result, run_configs


START_S = 120.0
"""Time for processes to start, on a busy machine."""

CONFIG_S = 10.0
LARGE_CONFIG_S = 120.0


@attrs.frozen
class LayoutReport:
    """What became of one layout's configurations: ``results[rank][index]``."""

    layout: Layout
    results: list[list[Result]]
    seconds: float

    @property
    def outcomes(self) -> list[tuple[Result, ...]]:
        """Each configuration's results, by rank."""
        return list(zip(*self.results, strict=True))

    @property
    def failed(self) -> list[tuple[Result, ...]]:
        """Those in which at least one rank raised."""
        return [results for results in self.outcomes if any(r.error for r in results)]


def select(layouts: Sequence[Layout], backends: Sequence[str], device_type: str, *, full: bool) -> list[Config]:
    """Choose from what runs here: the quick set, or everything."""
    available = [b for b in backends if why_unavailable(b, device_type) is None]
    possible = [layout for layout in layouts if why_too_large(layout, device_type) is None]
    configs = valid_configs(possible, available)
    return full_set(configs, device_type) if full else quick_set(configs)


def select_ids(ids: Sequence[str], device_type: str) -> tuple[list[Config], list[str]]:
    """Convert *ids* to configurations, and say why not for those that cannot run."""
    configs, skipped = [], []
    for id_ in ids:
        try:
            config = config_from_id(id_)
        except ValueError as error:
            skipped.append(str(error))
            continue
        reasons = why_invalid(config) or [
            reason
            for reason in (
                config.backend in BACKENDS and why_unavailable(config.backend, device_type),
                why_too_large(config.layout, device_type),
            )
            if reason
        ]
        if reasons:
            skipped.append(f"{config.id}: {'; '.join(reasons)}")
        else:
            configs.append(config)
    return configs, skipped


def explain_invalid(verbosity: int) -> Iterator[str]:
    """Say how many combinations are left out for what reason; from verbosity 3 on, which ones."""
    reasons: Counter[str] = Counter()
    for config in all_combinations(tuple(LAYOUTS.values()), tuple(BACKENDS)):
        why = why_invalid(config)
        reasons.update(why)
        if why and verbosity > 2:
            yield f"left out: {config.id}: {'; '.join(why)}"
    for reason, count in reasons.most_common():
        yield f"left out: {reason} ({count} combinations)"


def why_too_large(layout: Layout, device_type: str) -> str | None:
    """Return why there are too few devices for *layout*; a CPU is shared."""
    if device_type == "cpu" or layout.world_size <= torch.cuda.device_count():
        return None
    return f"{layout.name} needs {layout.world_size} GPUs, here are {torch.cuda.device_count()}"


def default_device_type() -> str:
    """Choose GPUs where there are enough for two ranks."""
    return "cuda" if torch.cuda.device_count() > 1 else "cpu"


def run_suite(configs: Sequence[Config], options: Options) -> list[LayoutReport]:
    """Run *configs*, and print what happens while it happens."""
    reports = []
    for layout, group in groupby(
        sorted(configs, key=lambda c: (c.layout.world_size, c.layout.name)),
        key=lambda c: c.layout,
    ):
        chosen = list(group)
        print(
            f"{layout.name}: {len(chosen)} configurations, "
            f"dp={layout.dp} tp={layout.tp} ep={layout.ep}, {options.device_type}",
            flush=True,
        )
        reports.append(run_layout(layout, chosen, options))
    return reports


def run_layout(layout: Layout, configs: Sequence[Config], options: Options) -> LayoutReport:
    """Run *configs*, all of *layout*, one after another in the same processes."""
    started = time.monotonic()
    allowed = sum(LARGE_CONFIG_S if c.shape == LARGEST else CONFIG_S for c in configs)
    ids = [config.id for config in configs]
    raw = launch(run_configs, layout.world_size, (layout, ids, options), deadline_s=START_S + allowed)
    results = [[Result(**result) for result in rank] for rank in raw]
    return LayoutReport(layout, results, time.monotonic() - started)


def summary(reports: Sequence[LayoutReport]) -> str:
    """One line a layout, and a total."""
    rows = [(r.layout.name, len(r.outcomes), len(r.failed), r.seconds) for r in reports]
    rows.append(("total", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    return "\n".join(
        f"{name:>8}: {count - failed:4} passed, {failed:4} failed in {seconds:6.1f} s"
        for name, count, failed, seconds in rows
    )


def raise_if_failed(reports: Sequence[LayoutReport]) -> None:
    """
    Raise one error for everything that failed.

    Raises:
        RuntimeError: With every failed id and what its ranks raised.
    """
    failed = [results for report in reports for results in report.failed]
    if not failed:
        return
    lines = [f"{len(failed)} configurations failed"]
    for results in failed:
        lines.append(results[0].id)
        for rank, result in enumerate(results):
            first_line = result.message.partition("\n")[0]
            lines.append(f"  rank {rank}: {result.error or 'passed'} {first_line}".rstrip())
    raise RuntimeError("\n".join(lines))
