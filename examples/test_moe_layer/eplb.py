"""Expert parallel load balancing: move experts between ranks, and keep every answer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .data import SEED
from .layer import MoELayer


def rearrange_expert_weights_inplace(layer: MoELayer) -> None:
    """
    Give every expert a new place, the same on all ranks, and move its weights there.

    Collective:
        All ranks of the expert parallel group exchange weights.
    """
    generator = torch.Generator().manual_seed(SEED)
    # physical slot -> the logical expert that will be there
    new = torch.randperm(layer.config.num_experts, generator=generator)
    old = layer.logical_to_physical_map.argsort().cpu()
    for weights in (layer.w1, layer.w2):
        for name, tensor in weights.tensors.items():
            setattr(weights, name, move_rows(tensor, old, new, layer.groups.ep))
    layer.logical_to_physical_map = new.argsort().to(layer.logical_to_physical_map.device)


def move_rows(tensor: Tensor, old: Tensor, new: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return this rank's rows after a move: slot s held *old[s]* and will hold *new[s]*."""
    rank, per_rank = dist.get_rank(group), len(tensor)
    source_slot = old.argsort()[new].tolist()  # where the new tenant of each slot lives now
    # Bytes: not every backend transports fp8.
    before = tensor.contiguous().view(torch.uint8).view(per_rank, -1)
    after = torch.empty_like(before)
    transfers = []
    for slot, source in enumerate(source_slot):
        sender, receiver = source // per_rank, slot // per_rank
        if sender == receiver == rank:
            after[slot % per_rank] = before[source % per_rank]
        elif sender == rank:
            row = before[source % per_rank]
            transfers.append(dist.P2POp(dist.isend, row, group=group, group_peer=receiver))
        elif receiver == rank:
            row = after[slot % per_rank]
            transfers.append(dist.P2POp(dist.irecv, row, group=group, group_peer=sender))
    for work in dist.batch_isend_irecv(transfers) if transfers else []:
        work.wait()
    return after.view(tensor.dtype).view(tensor.shape)
