"""The loop every rank runs: configuration after configuration, each of them one scope."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist

from collective_scope import collective_scope, current_scope

from .backends import All2AllManager, make_manager
from .config import Config, Layout, config_from_id
from .data import make_problem
from .eplb import rearrange_experts
from .launch import GROUP_TIMEOUT_S
from .layer import Groups, build_layer
from .mutations import MUTATIONS, Mutation
from .reference import assert_matches, dense_output


@attrs.frozen
class Options:
    """
    What a run does beside its configurations; travels to every rank.

    Attributes:
        mutation: name of the control that breaks one rank in every configuration.
        fail_id: id of a configuration in which rank *fail_rank* fails on purpose.
        fail_early: fail before its first collective, so that peers wait for it, not after the last.
        group_timeout: seconds after which a collective whose peer is elsewhere gives up.
    """

    device_type: str = "cpu"
    verbosity: int = 0
    mutation: str | None = None
    fail_id: str | None = None
    fail_rank: int = 0
    fail_early: bool = False
    group_timeout: float = GROUP_TIMEOUT_S


@attrs.frozen
class Result:
    """One configuration on one rank; *error* is the exception's type name, or empty."""

    id: str
    error: str
    message: str
    traceback: str
    seconds: float


def run_configs(rank: int, layout: Layout, ids: Sequence[str], options: Options) -> list[dict[str, Any]]:
    """
    Run every configuration, whatever happens in those before it.

    Collective:
        All ranks run the same configurations in the same order.
    """
    groups = make_groups(rank, layout, options.device_type, options.group_timeout)
    managers: dict[str, All2AllManager[Any]] = {}
    results = []
    for number, id_ in enumerate(ids, start=1):
        config = config_from_id(id_)
        started = time.monotonic()
        error: Exception | None = None
        try:
            with collective_scope(
                name=config.id,
                timeout=2 * options.group_timeout,
                # Longer than peers may be stuck in a collective this rank has left.
                failure_timeout=1.5 * options.group_timeout,
            ) as scope:
                manager = None
                if groups.ep is not None:
                    manager = managers.get(config.backend) or make_manager(config.backend, groups.ep, groups.device)
                    managers[config.backend] = manager
                    scope.collective_cleanup(manager.destroy, fingerprint=manager.fingerprint)
                    scope.after_barrier(manager.forget)
                run_one_config(config, groups, manager, options)
        except Exception as exc:  # noqa: BLE001 -- recorded; the next configuration runs
            error = exc
        if error is not None and groups.device.type == "cpu":
            # All ranks come here: a scope raises on every one of them or on none. One may have
            # left its peers in a collective, and where that timed out, gloo has hung up.
            managers.clear()
            groups = renew_groups(groups, layout, options.group_timeout)
        result = make_result(config, error, time.monotonic() - started)
        results.append(result)
        if rank == 0:
            show_progress(result, number, len(ids), options.verbosity)
    return [attrs.asdict(result) for result in results]


def run_one_config(config: Config, groups: Groups, manager: All2AllManager[Any] | None, options: Options) -> None:
    """
    Build the layer, run it, compare it with the dense reference.

    Every comparison comes after the last collective: a rank whose numbers are wrong then
    fails alone, without leaving a peer waiting for it.
    """
    fail_on_purpose(config, groups, options, early=True)
    problem = make_problem(config, groups.dp_rank, groups.device)
    mutation = mutation_here(config, groups, options)
    layer = build_layer(config, mutation.on_problem(problem), groups, manager)
    # Until all ranks are through, whatever keeps or drops this frame: see `All2AllManager`.
    current_scope().hold(layer)
    mutation.on_layer(layer)

    output = layer.forward(problem.hidden, problem.router_logits)
    rearranged = output
    if config.eplb:
        rearrange_experts(layer)
        rearranged = layer.forward(problem.hidden, problem.router_logits)

    assert_matches(output, dense_output(config, groups.dp_rank, groups.device), config)
    assert_matches(rearranged, output, config)
    fail_on_purpose(config, groups, options, early=False)


def fail_on_purpose(config: Config, groups: Groups, options: Options, *, early: bool) -> None:
    """Raise if *options* say so for this configuration and rank, at this point."""
    if (config.id, groups.rank, early) == (options.fail_id, options.fail_rank, options.fail_early):
        msg = f"rank {groups.rank} fails on purpose"
        raise AssertionError(msg)


def make_groups(rank: int, layout: Layout, device_type: str, timeout_s: float = GROUP_TIMEOUT_S) -> Groups:
    """Make the process groups of *layout*. A collective."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    dp_rank, tp_rank = divmod(rank, layout.tp)
    # A new group does not inherit the timeout of the default group.
    timeout = timedelta(seconds=timeout_s)
    tp = None
    if layout.tp > 1:
        tp, _ = dist.new_subgroups(layout.tp, timeout=timeout)  # type: ignore[no-untyped-call]
    ep = dist.new_group(timeout=timeout) if layout.expert_parallel else None
    return Groups(rank, dp_rank, tp_rank, tp, ep, device)


def renew_groups(groups: Groups, layout: Layout, timeout_s: float) -> Groups:
    """Destroy the process groups and make them anew. A collective."""
    for group in (groups.tp, groups.ep):
        if group is not None:
            dist.destroy_process_group(group)
    return make_groups(groups.rank, layout, groups.device.type, timeout_s)


def mutation_here(config: Config, groups: Groups, options: Options) -> Mutation:
    """Return what is to be broken on this rank; usually nothing."""
    if options.mutation is not None:
        mutation = MUTATIONS[options.mutation]
        if mutation.victim(config, groups.device) == groups.rank:
            return mutation
    return Mutation()


def make_result(config: Config, error: Exception | None, seconds: float) -> Result:
    if error is None:
        return Result(config.id, "", "", "", seconds)
    text = "".join(traceback.format_exception(error))
    return Result(config.id, type(error).__name__, str(error), text, seconds)


def show_progress(result: Result, number: int, total: int, verbosity: int) -> None:
    """One character or one line a configuration. Rank 0 speaks; all fail together."""
    if verbosity == 0:
        end = f" {number}/{total}\n" if number % 60 == 0 or number == total else ""
        print("F" if result.error else ".", end=end, flush=True)
        return
    outcome = f"FAILED ({result.error})" if result.error else "PASSED"
    print(f"{number}/{total} {result.id} {outcome} {result.seconds:.2f} s", flush=True)
    if result.error and verbosity > 1:
        print(result.traceback, flush=True)
