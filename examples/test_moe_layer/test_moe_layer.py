"""The layer in every layout; and controls, which show that a broken layer does not pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch

from .backends import why_unavailable
from .config import (
    BACKENDS,
    LAYOUTS,
    QUANTIZATIONS,
    SINGLE,
    Config,
    Layout,
    all_combinations,
    config_from_id,
    why_invalid,
)
from .mutations import MUTATIONS
from .quantization import SCHEMES
from .selection import LARGEST, full_set, quick_set, valid_configs
from .suite import (
    LayoutReport,
    default_device_type,
    raise_if_failed,
    run_suite,
    select,
    select_ids,
    summary,
)
from .worker import Options


PARALLEL = [layout for layout in LAYOUTS.values() if layout != SINGLE]
CPU_BACKENDS = ("allgather_reducescatter", "all_to_all", "shared_memory")
Run = Callable[..., list[LayoutReport]]


@pytest.fixture(name="device_type")
def _device_type() -> str:
    return default_device_type()


@pytest.fixture(name="run")
def _run(pytestconfig: pytest.Config, device_type: str) -> Run:
    def run(configs: Sequence[Config], **options: Any) -> list[LayoutReport]:
        verbosity = max(0, pytestconfig.get_verbosity())
        reports = run_suite(configs, Options(device_type=device_type, verbosity=verbosity, **options))
        print(summary(reports))
        return reports

    return run


def chosen(pytestconfig: pytest.Config, layout: Layout, device_type: str) -> list[Config]:
    """Apply ``--subtests`` and ``--full``; skip if nothing is left of *layout*."""
    if ids := pytestconfig.getoption("subtests"):
        configs, skipped = select_ids(ids.split(","), device_type)
        configs = [config for config in configs if config.layout == layout]
        why = "; ".join(skipped) or f"no id given is of layout {layout.name}"
    else:
        full = pytestconfig.getoption("full")
        configs = select([layout], list(BACKENDS), device_type, full=full)
        why = f"{layout.name} needs more devices than this machine has"
    if not configs:
        pytest.skip(why)
    return configs


@pytest.mark.parametrize("layout", PARALLEL, ids=lambda layout: layout.name)
def test_moe_layer(layout: Layout, run: Run, pytestconfig: pytest.Config, device_type: str) -> None:
    """Split over ranks, the layer answers as the dense reference does."""
    raise_if_failed(run(chosen(pytestconfig, layout, device_type)))


def test_moe_layer_no_parallel(run: Run, pytestconfig: pytest.Config, device_type: str) -> None:
    """On one rank, the layer answers as the dense reference does."""
    raise_if_failed(run(chosen(pytestconfig, SINGLE, device_type)))


@pytest.mark.parametrize("control", MUTATIONS)
def test_moe_layer_one_broken_rank_fails_every_configuration(control: str, run: Run, device_type: str) -> None:
    """With one rank broken, every configuration fails, on every rank, by its numbers."""
    configs = select(PARALLEL, list(BACKENDS), device_type, full=False)
    if control != "wrong_weight":  # one of them on everything, the others on what is quick
        configs = [c for c in configs if c.shape != LARGEST and c.layout.name not in ("ep4", "tp4")]
    if not configs:
        pytest.skip("no layout fits on the devices of this machine")

    reports = run(configs, mutation=control)

    for results in (results for report in reports for results in report.outcomes):
        errors = {result.error for result in results}
        assert "AssertionError" in errors, results[0].id
        assert errors <= {"AssertionError", "PeerFailedError"}, results[0].id


def test_worker_one_rank_fails_in_the_middle_only_that_configuration_fails(run: Run, device_type: str) -> None:
    """One rank's failure is its own error there, PeerFailedError elsewhere, and soon over."""
    configs = select([LAYOUTS["ep2"]], list(BACKENDS), device_type, full=False)
    configs = [c for c in configs if c.shape != LARGEST]
    middle = len(configs) // 2

    [report] = run(configs, fail_id=configs[middle].id, fail_rank=1)

    peer, failing = report.outcomes.pop(middle)
    assert failing.error == "AssertionError"
    assert failing.message == "rank 1 fails on purpose"
    assert peer.error == "PeerFailedError"
    assert "rank 1 fails on purpose" in peer.message
    assert [results[0].id for results in report.failed] == [configs[middle].id]


def test_config_id_converts_back() -> None:
    """Every id is unique and stands for its configuration."""
    configs = valid_configs(list(LAYOUTS.values()), list(BACKENDS))

    assert [config_from_id(config.id) for config in configs] == configs
    assert len({config.id for config in configs}) == len(configs)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[]", id="empty"),
        pytest.param(
            "[m1-n128-k256-e8-top2-bfloat16-none-share-nogate-nolatent-noeplb-ep2-all_to_all]",
            id="misspelt-switch",
        ),
        pytest.param(
            "[m1-n128-k256-e8-top2-bfloat16-none-shared-nogate-nolatent-noeplb-ep3-all_to_all]",
            id="no-such-layout",
        ),
        pytest.param(
            "[mx-n128-k256-e8-top2-bfloat16-none-shared-nogate-nolatent-noeplb-ep2-all_to_all]",
            id="not-a-number",
        ),
    ],
)
def test_subtests_unknown_id_is_skipped_with_a_reason(text: str) -> None:
    """What is not an id is refused in words, not run as something else."""
    configs, [reason] = select_ids([text], "cpu")

    assert configs == []
    assert text in reason


def test_subtests_invalid_combination_is_skipped_with_its_reason() -> None:
    """An id may be well formed and still stand for nothing that can run."""
    config = next(c for c in all_combinations(tuple(PARALLEL), ("all_to_all",)) if c.eplb)

    configs, [skipped] = select_ids([config.id], "cpu")

    assert configs == []
    assert all(reason in skipped for reason in why_invalid(config))


def test_quick_set_has_every_valid_pair_of_values() -> None:
    """Any two values that occur together in a valid configuration do so in the quick set."""
    configs = valid_configs(list(LAYOUTS.values()), CPU_BACKENDS)

    def value_pairs(selection: Sequence[Config]) -> set[object]:
        return {
            pair
            for c in selection
            if c.shape != LARGEST or c.num_experts == min(x.num_experts for x in configs[:1])
            for pair in combinations(
                (
                    c.shape,
                    c.num_experts,
                    ("top", c.top_k),
                    c.quantization,
                    c.layout,
                    c.backend,
                    *tuple(c.switches.items()),
                ),
                2,
            )
        }

    assert value_pairs(quick_set(configs)) == value_pairs(configs)


def test_full_set_on_gpus_is_everything() -> None:
    """Only a CPU is spared the largest shape."""
    configs = valid_configs(PARALLEL, CPU_BACKENDS)

    assert full_set(configs, "cuda") == configs
    assert [c for c in full_set(configs, "cpu") if c.shape != LARGEST] == [c for c in configs if c.shape != LARGEST]


@pytest.mark.parametrize(
    ("scheme", "bits", "largest_error"),
    [
        pytest.param("none", 16.0, 0.0, id="none"),
        pytest.param("fp8", 8.0, 0.03, id="fp8"),
        pytest.param("fp8_blocked", 8.0, 0.03, id="fp8_blocked"),
        pytest.param("modelopt_fp8", 8.0, 0.03, id="modelopt_fp8"),
        pytest.param("modelopt_fp4", 4.5, 0.1, id="modelopt_fp4"),
    ],
)
def test_quantization_is_real_and_close(scheme: str, bits: float, largest_error: float) -> None:
    """Weights take the bits they should, and lose no more than those bits allow."""
    weights = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(7)).bfloat16()

    quantized = SCHEMES[scheme].quantize(weights)

    stored = sum(8 * t.numel() * t.element_size() for t in quantized.tensors.values())
    assert stored / weights.numel() == pytest.approx(bits, rel=0.01)
    for expert in range(2):
        restored = quantized.linear(torch.eye(256, dtype=torch.bfloat16), expert).T.float()
        exact = weights[expert].float()
        assert (restored - exact).norm() / exact.norm() <= largest_error


def test_quantization_schemes_are_those_of_the_matrix() -> None:
    """No quantization is tested under another one's name."""
    assert tuple(SCHEMES) == QUANTIZATIONS
    assert len(set(SCHEMES.values())) == len(QUANTIZATIONS)


def test_backend_that_cannot_run_says_why() -> None:
    """A backend that is left out is left out for a reason in words."""
    assert [why_unavailable(name, "cpu") for name in CPU_BACKENDS] == [None] * 3
    assert why_unavailable("symm_mem", "cpu") == "symm_mem needs GPUs"
