"""The layer in every layout; and controls, which show that a broken layer does not pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist

from collective_scope import SubtestResult, Subtests, current_scope
from examples.pool import Pool

from .__main__ import main
from .backends import make_manager, why_unavailable
from .config import (
    BACKENDS,
    PARALLEL_COMBOS,
    QUANT_METHODS,
    MoETestConfig,
    all_combinations,
    generate_valid_test_configs,
    is_valid_config,
    why_invalid,
)
from .data import setup_moe_test_data
from .eplb import rearrange_expert_weights_inplace
from .launch import make_pool, parallel_launch_with_config, use_of_nvshmem
from .layer import make_fused_moe_layer
from .mutations import MUTATIONS
from .quantization import SCHEMES
from .selection import (
    LARGEST,
    default_device_type,
    explain_invalid,
    full_set,
    quick_set,
    select,
    select_ids,
    why_too_large,
)
from .worker import Break, Options, _parallel_worker


LAYOUTS = list(PARALLEL_COMBOS)
PARALLEL = [layout for layout in LAYOUTS if layout != "single"]
CPU_BACKENDS = ("allgather_reducescatter", "all_to_all", "shared_memory")

EPLB_ID = "[32-512-512-8-2-bfloat16-fp8-False-False-False-True-allgather_reducescatter-2-2-1]"
ALL_TO_ALL_ID = "[1-128-256-8-2-bfloat16-None-True-False-False-False-all_to_all-2-2-1]"


@pytest.fixture(scope="session", name="pool")
def _pool() -> Iterator[Pool]:
    """Return the ranks on which all tests run."""
    with make_pool(default_device_type(), {"MOE_TEST": "in the ranks"}) as pool:
        yield pool


def run(pool: Pool, configs: Sequence[MoETestConfig], **options: Any) -> list[SubtestResult]:
    """Run *configs*; return what became of each."""
    report = Subtests()
    parallel_launch_with_config(pool, configs, Options(**options), report)
    return report.results


def test_moe_layer(config: MoETestConfig, pool: Pool) -> None:
    """Split over ranks, the layer answers as the dense reference does."""
    pool.check(config.id(), _parallel_worker, config, Options(), ranks=config.world_size)


def test_moe_layer_no_parallel(config: MoETestConfig, pool: Pool) -> None:
    """On one rank, the layer answers as the dense reference does."""
    pool.check(config.id(), _parallel_worker, config, Options(), ranks=1)


# Controls and failures


def small_configs() -> list[MoETestConfig]:
    """Choose for each route of a token, and for each quantization, one configuration that is quick."""
    configs, _ = select(PARALLEL, BACKENDS, default_device_type())
    chosen: dict[object, MoETestConfig] = {}
    for config in sorted(configs, key=lambda c: (c.shape == LARGEST, c.num_experts)):
        chosen.setdefault((config.layout, config.backend), config)
        chosen.setdefault(config.quantization, config)
    return sorted(set(chosen.values()), key=lambda c: c.world_size)


@pytest.mark.parametrize("control", MUTATIONS)
def test_moe_layer_one_broken_rank_fails_every_configuration(control: str, pool: Pool) -> None:
    """With the numbers of one rank broken, each configuration fails, by its numbers alone."""
    configs = small_configs()
    if not configs:
        pytest.skip("no layout fits on the devices of this machine")

    for result in run(pool, configs, mutation=control):
        assert result.status == "failed", result.id
        assert {outcome.type_name for outcome in result.failures.values()} == {"AssertionError"}, result.id


@pytest.mark.parametrize("when", ["before", "after"])
def test_moe_layer_broken_on_one_rank_fails_that_configuration_alone(when: str, pool: Pool) -> None:
    """One rank fails before its collectives, or after: its configuration fails with that cause, the others pass."""
    configs = [config for config in small_configs() if config.ep_size == 2]
    # Its peers are left alone while they build a buffer, the most that a failure can leave behind.
    index = len(configs) // 2
    broken = Break.from_text(f"{configs[index].id()}:1:{when}")
    starts = pool.starts

    results = run(pool, configs, breaks=(broken,))

    assert [result.status for result in results] == ["failed" if i == index else "passed" for i in range(len(configs))]
    first = min(results[index].failures.values(), key=lambda outcome: outcome.order)
    assert first.message == f"rank 1 fails {when} its collectives, as asked for"
    assert pool.starts == starts


def _rearrange() -> None:
    """Rearrange experts; compare those of this rank with those that should be here now, and its map with its peers'."""
    config = MoETestConfig.from_id(EPLB_ID)
    groups = current_scope().group.groups_of(config)
    data = setup_moe_test_data(config, groups.dp_rank, groups.device)
    manager = make_manager(config.backend or "", groups.ep, groups.device)
    layer = make_fused_moe_layer(config, data, groups, manager)
    per_rank = config.num_experts // config.ep_size

    rearrange_expert_weights_inplace(layer)

    maps: list[Any] = [None] * config.world_size
    dist.all_gather_object(maps, layer.logical_to_physical_map.tolist(), group=groups.ep)
    assert all(each == maps[0] and sorted(each) == list(range(8)) for each in maps)
    tenants = layer.logical_to_physical_map.argsort()[groups.rank * per_rank :][:per_rank]
    assert bool((tenants // per_rank != groups.rank).any()), "no expert has come from a peer"
    for weights, full in ((layer.w1, data.w1), (layer.w2, data.w2)):
        for name, wanted in SCHEMES[config.quantization].quantize(full).tensors.items():
            assert torch.equal(weights.tensors[name].float(), wanted.float()[tenants])


def test_eplb_moves_weights_between_ranks(pool: Pool) -> None:
    """Each rank gets experts of its peer, values and scales, and both have the same map."""
    pool.check("eplb", _rearrange, ranks=2)


def _read_environment(name: str, value: str) -> None:
    assert os.environ[name] == value


def test_env_dict_is_in_the_environment_of_every_rank(pool: Pool) -> None:
    """Variables that the launcher was given reach the ranks."""
    pool.check("environment", _read_environment, "MOE_TEST", "in the ranks")


# Ids


def test_config_id_converts_back() -> None:
    """Every id is unique and stands for its configuration."""
    configs = generate_valid_test_configs(LAYOUTS, BACKENDS)

    assert [MoETestConfig.from_id(config.id()) for config in configs] == configs
    assert len({config.id() for config in configs}) == len(configs)


@pytest.mark.parametrize(
    ("text", "here"),
    [
        pytest.param("[1-128-256-8-2-bfloat16-None-False-False-False-False-None-1-1-1]", "", id="no-parallel"),
        pytest.param(
            "[32-512-512-64-6-bfloat16-fp8-True-True-False-True-allgather_reducescatter-4-2-2]", "", id="all-fields"
        ),
        pytest.param(
            "[222-1024-2048-8-2-bfloat16-fp8_blocked-True-False-False-False-deepep_high_throughput-2-2-1]",
            "deep_ep",
            id="deepep-high-throughput",
        ),
        pytest.param(
            "[222-1024-2048-8-2-bfloat16-None-True-False-False-False-deepep_low_latency-2-2-1]",
            "deep_ep_low_latency",
            id="deepep-low-latency",
        ),
    ],
)
def test_config_id_of_vllm_is_understood(text: str, here: str) -> None:
    """An id as vLLM prints it stands for the same configuration, and is this port's own but for DeepEP's names."""
    config = MoETestConfig.from_id(text)

    assert is_valid_config(config) == (True, None)
    if here:
        assert config.backend == here
    else:
        assert config.id() == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("[]", "has 1 words, an id has 15, or 16 with uneven_tokens", id="empty"),
        pytest.param(
            "[1-128-256-8-2-bfloat16-None-Yes-False-False-False-all_to_all-2-2-1]",
            "'Yes' is no use_shared_experts (bool)",
            id="no-bool",
        ),
        pytest.param(
            "[1-x-256-8-2-bfloat16-None-True-False-False-False-all_to_all-2-2-1]", "'x' is no n (int)", id="no-number"
        ),
        pytest.param(
            "[1-128-256-8-2-float99-None-True-False-False-False-all_to_all-2-2-1]",
            "'float99' is no in_dtype (torch.dtype)",
            id="no-dtype",
        ),
        pytest.param(
            "[1-128-256-8-2-bfloat16-None-True-False-False-False-all_to_all-3-3-1]",
            "the matrix has no such layout",
            id="no-layout",
        ),
        pytest.param(
            "[1-128-256-8-2-bfloat16-None-True-False-False-False-mori_low_latency-2-2-1]",
            "there is no such backend",
            id="no-backend",
        ),
        pytest.param(
            "[1-128-256-8-2-bfloat16-fp8-True-False-True-True-allgather_reducescatter-2-2-1]",
            "a routed input transform does not combine with EPLB",
            id="invalid-combination",
        ),
        pytest.param(
            "[222-1024-2048-8-2-bfloat16-None-True-False-False-False-deepep_low_latency-2-2-1]",
            "deep_ep_low_latency needs ",
            id="not-on-this-machine",
        ),
    ],
)
def test_subtests_id_that_cannot_run_is_skipped_with_a_reason(text: str, reason: str) -> None:
    """An id of nothing that can run here is refused in words, not run as something else."""
    configs, [why] = select_ids([text], "cpu")

    assert configs == []
    assert reason in why


def test_subtests_on_the_command_line_run_what_is_known_and_skip_the_rest(pytestconfig: pytest.Config) -> None:
    """``--subtests`` runs the ids it can, and a report in short form says why it skips the others."""
    tests = [f"{__file__}::{test}" for test in ("test_moe_layer", "test_moe_layer_no_parallel")]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-v", "-rs", "--color=no"]

    done = subprocess.run(  # noqa: S603
        [*command, f"--subtests={EPLB_ID},[nonsense]", *tests],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"test_moe_layer[{EPLB_ID[1:-1]}] PASSED" in done.stdout
    assert "'[nonsense]' has 1 words, an id has 15" in done.stdout
    assert "1 passed, 2 skipped" in done.stdout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("[1-2]:0:before", "has 2 words", id="no-id"),
        pytest.param(f"{EPLB_ID}:0", r"must be \[CONFIG\]:RANK:before or", id="no-time"),
        pytest.param(f"{EPLB_ID}:one:after", r"must be \[CONFIG\]:RANK:before or", id="no-rank"),
        pytest.param(f"{EPLB_ID}:2:after", r"has ranks 0 to 1 \(got 2\)", id="no-such-rank"),
    ],
)
def test_break_that_makes_no_sense_is_refused(text: str, reason: str) -> None:
    """An impossible break is an error that states the rule, before anything is started."""
    with pytest.raises(ValueError, match=reason):
        Break.from_text(text)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        pytest.param(
            [f"--break={EPLB_ID}:1:before"],
            0,
            "as asked for by --break: 1 of 2 failed, and no other",
            id="break",
        ),
        pytest.param(
            ["--control=wrong_weight"], 0, "as asked for by --control: 2 of 2 failed, and no other", id="control"
        ),
        pytest.param([], 0, "2 passed in ", id="nothing-broken"),
        pytest.param(
            [f"--break={ALL_TO_ALL_ID.replace('None', 'fp8')}:1:before"],
            2,
            " is not among the 2 configurations to run",
            id="break-of-what-does-not-run",
        ),
    ],
)
def test_command_line_exits_with_zero_if_only_that_failed_which_was_broken(
    arguments: list[str],
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A failure that was asked for is none of the suite's; its cause is in the report all the same."""
    monkeypatch.setattr(
        sys, "argv", ["test_moe_layer", f"--subtests={EPLB_ID},{ALL_TO_ALL_ID}", "--device=cpu", *arguments]
    )

    assert main() == code

    out, err = capsys.readouterr()
    assert says in (out + err).splitlines()[-1]
    assert ("BrokenOnPurposeError: rank 1 fails before its collectives, as asked for" in out) == (
        "--break: 1 of 2" in out
    )


# The matrix


def test_layout_larger_than_the_machine_is_skipped_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of more ranks than there are GPUs is left out, in words, and its ids are too."""
    gpus = torch.cuda.device_count()
    monkeypatch.setitem(PARALLEL_COMBOS, "too_large", (gpus + 1, 1, True))

    assert why_too_large("too_large", "cuda") == f"too_large needs {gpus + 1} GPUs, here are {gpus}"
    assert why_too_large("too_large", "cpu") is None
    assert select(["too_large"], BACKENDS, "cuda")[0] == []


def test_capability_leaves_out_what_a_device_would_have_to_emulate() -> None:
    """As in vLLM, fp4 needs Blackwell; without a capability nothing is left out, since all can be emulated."""
    config = MoETestConfig(1, 128, 256, 8, 2, torch.bfloat16, "modelopt_fp4", False, False, False)  # noqa: FBT003  (positional)
    fp8 = attrs.evolve(config, quantization="fp8")

    assert is_valid_config(config) == is_valid_config(config, (10, 0)) == (True, None)
    assert is_valid_config(config, (9, 0)) == (False, "modelopt_fp4 needs compute capability 10.0 (got 9.0)")
    assert is_valid_config(fp8, (8, 9)) == (True, None)
    assert is_valid_config(fp8, (8, 6)) == (False, "fp8 needs compute capability 8.9 (got 8.6)")
    configs = generate_valid_test_configs(LAYOUTS, BACKENDS, (9, 0))
    assert {config.quantization for config in configs} == {*QUANT_METHODS} - {"modelopt_fp4"}


def test_uneven_tokens_differ_between_data_parallel_ranks_down_to_none() -> None:
    """The first rank has all tokens of the shape, the others fewer; the quick set has a rank without any."""
    four = MoETestConfig.from_id("[32-512-512-8-2-bfloat16-None-True-False-False-False-all_to_all-4-4-1-True]")
    quick, _ = select(PARALLEL, CPU_BACKENDS, "cpu")
    uneven = [config for config in quick if config.uneven_tokens]

    assert four.num_tokens_across_dp == [32, 24, 16, 8]
    assert attrs.evolve(four, uneven_tokens=False).num_tokens_across_dp == [32] * 4
    assert {(config.layout, config.backend) for config in uneven} == {
        (config.layout, config.backend) for config in quick if config.dp_size > 1
    }
    assert any(0 in config.num_tokens_across_dp for config in uneven)


def test_invalid_combinations_all_have_a_reason_in_words() -> None:
    """Every combination is valid or explained."""
    lines = [line for line in explain_invalid(3) if "combinations)" not in line]
    invalid = [config for config in all_combinations(LAYOUTS, BACKENDS) if why_invalid(config)]

    assert len(lines) == len(invalid)
    assert all(line.startswith("left out: [") and line.partition("]: ")[2] for line in lines)


def test_quick_set_has_every_valid_pair_of_values() -> None:
    """Any two values that occur together in a valid configuration do so in the quick set."""
    configs = generate_valid_test_configs(LAYOUTS, CPU_BACKENDS)

    def value_pairs(selection: Sequence[MoETestConfig]) -> set[object]:
        return {
            pair
            for c in selection
            if c.shape != LARGEST or c.num_experts == configs[0].num_experts
            for pair in combinations(
                (
                    c.shape,
                    c.num_experts,
                    ("top", c.top_k),
                    c.quantization,
                    (c.layout, c.backend),
                    *c.switches.items(),
                ),
                2,
            )
        }

    assert value_pairs(quick_set(configs)) == value_pairs(configs)


def test_full_set_on_gpus_is_everything() -> None:
    """Only a CPU is spared the largest shape."""
    configs = generate_valid_test_configs(PARALLEL, CPU_BACKENDS)

    assert full_set(configs, "cuda") == configs
    assert [c for c in full_set(configs, "cpu") if c.shape != LARGEST] == [c for c in configs if c.shape != LARGEST]


@pytest.mark.parametrize(
    ("scheme", "bits", "largest_error"),
    [
        pytest.param(None, 16.0, 0.0, id="none"),
        pytest.param("fp8", 8.0, 0.03, id="fp8"),
        pytest.param("fp8_blocked", 8.0, 0.03, id="fp8_blocked"),
        pytest.param("modelopt_fp8", 8.0, 0.03, id="modelopt_fp8"),
        pytest.param("modelopt_fp4", 4.5, 0.1, id="modelopt_fp4"),
    ],
)
def test_quantization_is_real_and_close(scheme: str | None, bits: float, largest_error: float) -> None:
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
    assert tuple(SCHEMES) == QUANT_METHODS
    assert len(set(SCHEMES.values())) == len(QUANT_METHODS)


@pytest.mark.parametrize(
    ("begun", "backend", "world_size", "after"),
    [
        ("", "all_to_all", 2, ""),
        ("", "deep_ep", 2, "deep_ep"),
        ("deep_ep", "all_to_all", 2, "deep_ep"),
        ("deep_ep", "symm_mem", 2, "symm_mem on 2 ranks"),
        ("", "symm_mem", 2, "symm_mem on 2 ranks"),
        ("symm_mem on 2 ranks", "deep_ep", 2, "symm_mem on 2 ranks"),
        ("symm_mem on 2 ranks", "symm_mem", 2, "symm_mem on 2 ranks"),
        ("symm_mem on 2 ranks", "symm_mem", 4, "symm_mem on 4 ranks"),
    ],
)
def test_symmetric_memory_takes_new_ranks_where_nvshmem_has_begun_otherwise(
    begun: str, backend: str, world_size: int, after: str
) -> None:
    """New ranks are started where it changes: for another number of ranks, and after DeepEP."""
    config = attrs.evolve(small_configs()[0], backend=backend, dp_size=world_size, tp_size=1)

    assert after == use_of_nvshmem(config, begun)


def test_backend_that_cannot_run_says_why() -> None:
    """A backend that is left out is left out for a reason in words."""
    assert [why_unavailable(name, "cpu") for name in CPU_BACKENDS] == [None] * 3
    assert why_unavailable("symm_mem", "cpu") == "symm_mem needs GPUs"
    assert (why_unavailable("deep_ep_low_latency", "cpu") or "").startswith("deep_ep_low_latency needs ")
