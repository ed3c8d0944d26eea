"""The ranks that a launcher has started, as torchrun's environment variables describe them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist


VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A launcher sets these for every rank."""


Seconds = float | timedelta


def seconds_of(name: str, value: object, *, may_be_zero: bool = False) -> float:
    """
    Return a time in seconds, which was given as *name*.

    Raises:
        TypeError: If it is neither a number nor a timedelta.
        ValueError: If it is not positive, or not finite; 0 is accepted if *may_be_zero*.
    """
    given = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(given, Real) or isinstance(given, bool):
        msg = f"{name} must be seconds as a number, or a timedelta (got {value!r})"
        raise TypeError(msg)
    number: Any = given
    if not 0 <= number <= sys.float_info.max or (number == 0 and not may_be_zero):  # an integer may be greater
        msg = f"{name} must be {'at least 0' if may_be_zero else 'positive'} and finite (got {value!r})"
        raise ValueError(msg)
    return float(given)


def check_arguments(*, make: object, store: object, rank: object, world_size: object, destroy: object) -> None:
    """
    Check what a `RenewableGroup` was given, before anything is made of it.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If one is neither given nor in the environment.
    """
    given = zip(VARIABLES, (rank, world_size, store, store), strict=True)
    absent = [name for name, value in given if value is None and name not in os.environ]
    if absent:
        lacking = ", ".join(absent)
        msg = f"store, rank and world_size must be given, or be in the environment (which lacks {lacking})"
        raise ValueError(msg)
    rules: tuple[tuple[str, object, Any, str], ...] = (
        ("make", make, Callable, "callable"),
        ("store", store, dist.Store, "a torch.distributed.Store"),
        ("rank", rank, Integral, "an integer"),
        ("world_size", world_size, Integral, "an integer"),
        ("destroy", destroy, Callable, "callable"),
    )
    for name, value, kind, what in rules:
        if value is not None and not isinstance(value, kind):
            msg = f"{name} must be {what} (got {value!r})"
            raise TypeError(msg)


def store_of_launcher(rank: int, name: str = "") -> dist.Store:
    """
    Return the part *name* of the store that torchrun serves, or rank 0 without it; another one after each restart.

    Raises:
        KeyError: If ``MASTER_ADDR`` or ``MASTER_PORT`` is not set.
        ValueError: If ``MASTER_PORT`` is no number.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Groups that are made over env:// may want to serve the same address.
    serves = rank == 0 and not launcher_serves_store()
    store = dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, multi_tenant=True)
    return dist.PrefixStore(f"collective_scope/{name}{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def launcher_serves_store() -> bool:
    """Whether torchrun's agent serves the ranks' store, and no rank does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def make_default_group(store: dist.Store, rank: int, world_size: int) -> None:
    """Make the default group: with NCCL where there is a GPU for each local rank, and gloo."""
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(
        os.environ.get("LOCAL_WORLD_SIZE", world_size)
    )
    if has_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
