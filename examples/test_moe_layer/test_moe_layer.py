"""The layer in every layout; and controls, which show that a broken layer does not pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import attrs
import pytest
import torch

from .backends import make_manager, why_unavailable
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
from .data import make_problem
from .eplb import rearrange_experts
from .launch import launch
from .layer import build_layer
from .mutations import MUTATIONS
from .quantization import SCHEMES
from .selection import LARGEST, full_set, quick_set, valid_configs
from .suite import (
    LayoutReport,
    default_device_type,
    explain_invalid,
    raise_if_failed,
    run_suite,
    select,
    select_ids,
    summary,
    why_too_large,
)
from .worker import Options, make_groups


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
        why = "; ".join([f"no id given is of layout {layout.name}", *skipped])
    else:
        full = pytestconfig.getoption("full")
        configs = select([layout], list(BACKENDS), device_type, full=full)
        why = why_too_large(layout, device_type) or f"no backend of {layout.name} runs here"
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


def test_subtests_each_given_id_runs_or_is_skipped_with_a_reason(pytestconfig: pytest.Config, device_type: str) -> None:
    """Of the ids given to ``--subtests``, none is left out in silence."""
    ids = pytestconfig.getoption("subtests")
    _, skipped = select_ids(ids.split(",") if ids else [], device_type)
    if skipped:
        pytest.skip("; ".join(skipped))


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


def test_worker_one_rank_fails_before_its_collectives_later_configurations_run() -> None:
    """Peers that wait for it in a collective give up in time, and the next configuration has sound groups."""
    configs = [c for c in select([LAYOUTS["ep2"]], CPU_BACKENDS, "cpu", full=True) if c.shape != LARGEST][:8]
    # Its peers are left alone while they build a buffer, the most that a failure can leave behind.
    failing_id = next(config.id for config in configs if config.backend == "shared_memory")
    options = Options(fail_id=failing_id, fail_rank=1, fail_early=True, group_timeout=10.0)

    [report] = run_suite(configs, options)

    [(peer, failing)] = report.failed
    assert peer.id == failing.id == failing_id != configs[-1].id
    assert (failing.error, failing.message) == ("AssertionError", "rank 1 fails on purpose")
    assert peer.error in ("RuntimeError", "DistBackendError")


EPLB_ID = "[m32-n512-k512-e8-top2-bfloat16-fp8-noshared-nogate-nolatent-eplb-ep2-allgather_reducescatter]"


def _rearrange(rank: int, device_type: str) -> dict[str, Any]:
    """Rearrange experts; compare this rank's with those that should be here now."""
    config = config_from_id(EPLB_ID)
    groups = make_groups(rank, config.layout, device_type)
    assert groups.ep is not None
    problem = make_problem(config, groups.dp_rank, groups.device)
    layer = build_layer(config, problem, groups, make_manager(config.backend, groups.ep, groups.device))
    per_rank = config.num_experts // config.layout.ep

    rearrange_experts(layer)

    tenants = layer.logical_to_physical.argsort()[rank * per_rank :][:per_rank]
    pairs = []
    for weights, full in ((layer.w13, problem.w13), (layer.w2, problem.w2)):
        wanted = SCHEMES[config.quantization].quantize(full).tensors
        pairs += [(weights.tensors[name].float(), wanted[name].float()[tenants]) for name in wanted]
    return {
        "map": layer.logical_to_physical.tolist(),
        "right": [torch.equal(*pair) for pair in pairs],
        "from_peers": int((tenants // per_rank != rank).sum()),
    }


def test_eplb_moves_weights_between_ranks(device_type: str) -> None:
    """Each rank gets experts of its peer, values and scales, and both have the same map."""
    first, second = launch(_rearrange, 2, (device_type,), deadline_s=120)

    assert first["map"] == second["map"]
    assert sorted(first["map"]) == list(range(8))
    assert first["from_peers"] == second["from_peers"] > 0
    assert first["right"] == second["right"] == [True] * 4


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


def test_subtests_on_the_command_line_run_what_is_known_and_skip_the_rest(pytestconfig: pytest.Config) -> None:
    """``--subtests`` runs the ids it can, and a report in short form says why it skips the others."""
    tests = "test_moe_layer[ep2]", "test_moe_layer[tp2]", "test_subtests_each_given_id_runs_or_is_skipped_with_a_reason"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-s", "-rs", "--color=no"]

    done = subprocess.run(  # noqa: S603
        [*command, f"--subtests={EPLB_ID},[nonsense]", *(f"{__file__}::{test}" for test in tests)],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"1/1 {EPLB_ID} PASSED" in done.stdout
    assert "no id given is of layout tp2" in done.stdout
    assert "'[nonsense]' has 1 words, an id has 13" in done.stdout
    assert "1 passed, 2 skipped" in done.stdout


def test_layout_larger_than_the_machine_is_skipped_with_a_message() -> None:
    """A world of more ranks than there are GPUs is left out, in words, and its ids are too."""
    gpus = torch.cuda.device_count()
    world = attrs.evolve(LAYOUTS["ep2"], name="too_large", dp=gpus + 1)

    assert why_too_large(world, "cuda") == f"too_large needs {gpus + 1} GPUs, here are {gpus}"
    assert why_too_large(world, "cpu") is None
    assert select([world], list(BACKENDS), "cuda", full=True) == []


def test_invalid_combinations_all_have_a_reason_in_words() -> None:
    """What is neither valid nor explained does not exist."""
    layouts = list(LAYOUTS.values())
    everything = set(all_combinations(tuple(layouts), tuple(BACKENDS)))
    lines = [line for line in explain_invalid(3) if "combinations)" not in line]

    assert len(lines) == len(everything - set(valid_configs(layouts, list(BACKENDS))))
    assert all(line.startswith("left out: [") and line.partition("]: ")[2] for line in lines)


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
