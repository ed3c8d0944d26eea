"""Dispatch and combine for handles that can exchange rows of bytes with every peer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import attrs
import torch
from torch import Tensor

from .base import All2AllManager, Dispatched, RowFormat


class ExchangeHandle(ABC):
    """
    Buffers through which every rank sends every peer some rows.

    Attributes:
        experts_per_rank: expert e lives on rank e // experts_per_rank.
        max_rows: most rows this rank sends to one peer: its tokens, each sent once.
    """

    def __init__(self, max_rows: int, row: RowFormat, experts_per_rank: int) -> None:
        self.max_rows = max_rows
        self.row = row
        self.experts_per_rank = experts_per_rank

    @abstractmethod
    def exchange(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """
        Send *counts[p]* rows to each peer p, in order; return what came, and the counts.

        Collective:
            All ranks of the group call it, also those with nothing to send.
        """

    @abstractmethod
    def destroy(self) -> None:
        """Free the buffers on all ranks. A collective."""


HandleT = TypeVar("HandleT", bound=ExchangeHandle)


@attrs.frozen(eq=False)
class Route:
    """The tokens that this rank sent, peer by peer, and how many rows came."""

    token_of_row: Tensor
    received: Tensor
    num_tokens: int


class ExchangeManager(All2AllManager[HandleT]):
    """A token that has several experts on one rank travels there once."""

    def dispatch(self, handle: HandleT, tokens: Tensor, weights: Tensor, experts: Tensor) -> Dispatched:
        """Send each token to the ranks of its experts, sorted by rank."""
        owner = torch.where(experts >= 0, experts // handle.experts_per_rank, -1)
        peers = torch.arange(self.world_size, device=owner.device)
        is_sent = (owner[:, :, None] == peers).any(dim=1)  # (tokens, peers)
        _, token_of_row = torch.nonzero(is_sent.T, as_tuple=True)
        rows = handle.row.pack(tokens, weights, experts)[token_of_row]
        arrived, received = handle.exchange(rows, is_sent.sum(dim=0))
        return Dispatched(*handle.row.unpack(arrived), Route(token_of_row, received, len(tokens)))

    def combine(self, handle: HandleT, answers: Tensor, sent: Dispatched) -> Tensor:
        """Send the answers the same way back and add them up."""
        route = sent.route
        assert isinstance(route, Route)
        returned, _ = handle.exchange(handle.row.pack_answers(answers), route.received)
        output = torch.zeros(route.num_tokens, answers.shape[1], dtype=torch.float32, device=answers.device)
        output.index_add_(0, route.token_of_row, handle.row.unpack_answers(returned).float())
        return output.to(answers.dtype)
