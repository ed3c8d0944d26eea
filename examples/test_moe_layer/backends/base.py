"""Base of all managers: a weak cache of handles, and tokens as rows of bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

import attrs
import torch
import torch.distributed as dist
from torch import Tensor


ROW_ALIGNMENT = 16
"""Bytes: the longest words that a device copies."""


class Handle(Protocol):
    """Communication buffers. Building them and `destroy` are collectives."""

    def destroy(self) -> None:
        """Free them on all ranks. Usually right only once."""


HandleT = TypeVar("HandleT", bound=Handle)


@attrs.frozen(eq=False)
class Dispatched:
    """
    Tokens that have arrived at the rank of their experts.

    Attributes:
        experts: physical experts; those of other ranks may be among them, or -1.
        route: how the answers find their way back; the manager's own business.
    """

    tokens: Tensor
    weights: Tensor
    experts: Tensor
    route: object


class All2AllManager(ABC, Generic[HandleT]):
    """
    Brings tokens to the ranks that hold their experts, and the answers back.

    One manager serves all layers of a process. It keeps handles by their size, weakly: the
    layers own them. That is what makes `destroy` dangerous. It is a collective over those
    handles that happen to be alive, and when a layer dies depends on each rank's garbage
    collector. Hence the fingerprint.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.cache: WeakValueDictionary[tuple[tuple[str, int], ...], HandleT] = WeakValueDictionary()

    def get_handle(self, **size: int) -> HandleT:
        """
        Return the handle of this size, from the cache or newly built.

        Collective:
            All ranks must ask for the same sizes in the same order.
        """
        key = tuple(sorted(size.items()))
        handle = self.cache.get(key)
        if handle is None:
            handle = self.cache[key] = self.build(**size)
        return handle

    def fingerprint(self) -> str:
        """Describe what `destroy` would destroy; ranks compare this before they call it."""
        return "; ".join(", ".join(f"{name}={value}" for name, value in key) for key in sorted(self.cache))

    def destroy(self) -> None:
        """
        Destroy every handle that is alive, and forget it.

        Collective:
            All ranks must have the same handles.
        """
        for _, handle in sorted(self.cache.items()):
            handle.destroy()
        self.cache.clear()

    def forget(self) -> None:
        """Drop what `destroy` did not get to, locally: the next configuration builds anew."""
        self.cache.clear()

    @abstractmethod
    def build(self, *, max_tokens: int, hidden: int, top_k: int, num_experts: int) -> HandleT:
        """Build a handle. A collective."""

    @abstractmethod
    def dispatch(self, handle: HandleT, tokens: Tensor, weights: Tensor, experts: Tensor) -> Dispatched:
        """Send each token to every rank that holds one of its *experts* (physical)."""

    @abstractmethod
    def combine(self, handle: HandleT, answers: Tensor, sent: Dispatched) -> Tensor:
        """Bring the answers back and add up those that belong to the same token."""


@attrs.frozen
class RowFormat:
    """A token with its routing as one row of bytes: tokens, expert ids, weights, padding."""

    hidden: int
    top_k: int

    @property
    def num_bytes(self) -> int:
        """Length of a row."""
        used = 2 * self.hidden + (8 + 4) * self.top_k
        return -(-used // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def pack(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Make one row of each token."""
        parts = [part.contiguous().view(torch.uint8) for part in (tokens, experts, weights)]
        rows = torch.zeros(len(tokens), self.num_bytes, dtype=torch.uint8, device=tokens.device)
        rows[:, : sum(part.shape[1] for part in parts)] = torch.cat(parts, dim=1)
        return rows

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, weights and experts of *rows*."""
        ends = 2 * self.hidden, 2 * self.hidden + 8 * self.top_k
        tokens = rows[:, : ends[0]].contiguous().view(torch.bfloat16)
        experts = rows[:, ends[0] : ends[1]].contiguous().view(torch.int64)
        weights = rows[:, ends[1] : ends[1] + 4 * self.top_k].contiguous().view(torch.float32)
        return tokens, weights, experts

    def pack_answers(self, answers: Tensor) -> Tensor:
        """Make one row of each answer; the routing it came with is not sent back."""
        rows = torch.zeros(len(answers), self.num_bytes, dtype=torch.uint8, device=answers.device)
        rows[:, : 2 * self.hidden] = answers.contiguous().view(torch.uint8)
        return rows

    def unpack_answers(self, rows: Tensor) -> Tensor:
        """Return the answers in *rows*."""
        return rows[:, : 2 * self.hidden].contiguous().view(torch.bfloat16)
