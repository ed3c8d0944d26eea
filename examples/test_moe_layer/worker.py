"""Code of every rank: its groups, and one configuration, which is the body of a subtest."""

from __future__ import annotations

import os
from typing import Any, Literal, Self

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from collective_scope import current_scope

from .backends import All2AllManager, make_manager
from .config import MoETestConfig
from .data import setup_moe_test_data
from .eplb import rearrange_expert_weights_inplace
from .layer import Groups, MoELayer, make_fused_moe_layer
from .mutations import MUTATIONS, Mutation
from .reference import assert_matches, baseline_output


class BrokenOnPurposeError(Exception):
    """Raised where ``--break`` says so."""


@attrs.frozen
class Break:
    """
    A failure that is asked for.

    Attributes:
        id: of the configuration.
        rank: where it is raised.
        when: before the first collective, so that peers wait in theirs, or after the last.
    """

    id: str
    rank: int
    when: Literal["before", "after"]

    @classmethod
    def from_text(cls, text: str) -> Self:
        """
        Read ``CONFIG:RANK:before|after``.

        Raises:
            ValueError: If *text* is anything else, or the configuration has no such rank.
        """
        id_, _, rest = text.rpartition("]:")
        rank, _, when = rest.partition(":")
        if not id_ or not rank.isdecimal() or when not in ("before", "after"):
            msg = f"--break must be [CONFIG]:RANK:before or [CONFIG]:RANK:after (got {text!r})"
            raise ValueError(msg)
        config = MoETestConfig.from_id(f"{id_}]")
        if int(rank) >= config.world_size:
            msg = f"--break: {config.id()} has ranks 0 to {config.world_size - 1} (got {rank})"
            raise ValueError(msg)
        return cls(config.id(), int(rank), "before" if when == "before" else "after")


@attrs.frozen
class Options:
    """
    Extras of a run beside its configurations; sent to every rank.

    Attributes:
        breaks: failures that are asked for.
        mutation: name of the control that breaks one rank's numbers in every configuration.
    """

    breaks: tuple[Break, ...] = ()
    mutation: str | None = None


@attrs.frozen(eq=False)
class ProcessGroupInfo:
    """
    The groups of this rank, in whatever layout of this many ranks.

    Attributes:
        pair: this rank and its neighbour, for tensor parallelism of two among four.
        managers: all-to-all managers by backend; they go with the groups.
    """

    rank: int
    world_size: int
    device: torch.device
    pair: dist.ProcessGroup | None
    managers: dict[str, All2AllManager[Any]] = attrs.field(factory=dict)

    def groups_of(self, config: MoETestConfig) -> Groups:
        """Return this rank's place in the layout of *config*."""
        dp_rank, tp_rank = divmod(self.rank, config.tp_size)
        world = dist.group.WORLD
        tp = {1: None, self.world_size: world}.get(config.tp_size, self.pair)
        return Groups(self.rank, dp_rank, tp_rank, tp, world if config.ep_size > 1 else None, self.device)

    def all2all_manager(self, backend: str, group: dist.ProcessGroup) -> All2AllManager[Any]:
        """Return the manager of *backend*; there is one, whatever the layer."""
        if backend not in self.managers:
            self.managers[backend] = make_manager(backend, group, self.device)
        return self.managers[backend]


def make_groups(store: dist.Store, device_type: str = "cpu") -> ProcessGroupInfo:
    """Make all groups: what `RenewableGroup` calls at first, and after a failure. A collective."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    pair = dist.new_subgroups(2)[0] if world_size > 2 else None  # type: ignore[no-untyped-call]  # torch has no types there
    return ProcessGroupInfo(rank, world_size, device, pair)


def _parallel_worker(config: MoETestConfig, options: Options) -> None:
    """
    Run one configuration on this rank, in the scope of its subtest.

    Collective:
        All ranks of the layout run the same configurations in the same order.
    """
    scope = current_scope()
    groups = scope.group.groups_of(config)
    manager = None
    if groups.ep is not None and config.backend is not None:
        manager = scope.group.all2all_manager(config.backend, groups.ep)
        scope.collective_cleanup(manager.destroy, fingerprint=manager.fingerprint)
        scope.after_barrier(manager.forget)
    break_here(config, groups.rank, options, "before")
    _run_one_config(config, groups, manager, options)
    break_here(config, groups.rank, options, "after")


def break_here(config: MoETestConfig, rank: int, options: Options, when: Literal["before", "after"]) -> None:
    """Raise if *options* say so for this configuration and rank, at this point."""
    if Break(config.id(), rank, when) in options.breaks:
        msg = f"rank {rank} fails {when} its collectives, as asked for"
        raise BrokenOnPurposeError(msg)


def _run_one_config(
    config: MoETestConfig, groups: Groups, manager: All2AllManager[Any] | None, options: Options
) -> None:
    """
    Build the layer, run it, compare it with the dense reference.

    Every comparison comes after the last collective: a rank whose numbers are wrong then
    fails alone, without leaving a peer waiting for it.
    """
    data = setup_moe_test_data(config, groups.dp_rank, groups.device)
    mutation = mutation_here(config, groups, options)
    layer = make_fused_moe_layer(config, mutation.on_data(data), groups, manager)
    # Until all ranks are through, whatever keeps or drops this frame: see `All2AllManager`.
    current_scope().hold(layer)
    mutation.on_layer(layer)
    test_body = _test_body_eplb if config.enable_eplb else _test_body_regular

    output, rearranged = test_body(layer, data.hidden_states, data.router_logits)

    assert_matches(output, baseline_output(config, groups.dp_rank, groups.device), config)
    assert_matches(rearranged, output, config)


def _test_body_regular(layer: MoELayer, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the answer of the layer."""
    output = layer.forward(hidden_states, router_logits)
    return output, output


def _test_body_eplb(layer: MoELayer, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the answers before and after the experts have moved."""
    output = layer.forward(hidden_states, router_logits)
    rearrange_expert_weights_inplace(layer)
    return output, layer.forward(hidden_states, router_logits)


def mutation_here(config: MoETestConfig, groups: Groups, options: Options) -> Mutation:
    """Return what is to be broken on this rank; usually nothing."""
    if options.mutation is not None:
        mutation = MUTATIONS[options.mutation]
        if mutation.victim(config, groups.device) == groups.rank:
            return mutation
    return Mutation()
