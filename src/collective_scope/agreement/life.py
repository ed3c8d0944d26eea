"""
The life of a group in its store, from the first rank that joins to the last one that leaves.

A group is often made again on the same store, under the same name. Each time is a life of its own, with
keys of its own, so that what an earlier one has left behind says nothing to a later one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from .clock import monotonic, sleep
from .store_thread import compare_set, set_first


if TYPE_CHECKING:
    from torch.distributed import Store

ROOT = "collective_scope"


DELETE_S = 1.0
"""How long a rank that joins waits for the last one of the life before to delete its key."""


def join(view: Store, store: Store, rank: int, world_size: int) -> str:
    """
    Return the life of a group that *rank* joins.

    Ranks that believe in different world sizes are not in one life: they would not agree when all have come.

    Args:
        view: The group's own part of the store.
        store: The root of the store.
        rank: Which rank, counted from 0 within the group.
        world_size: Number of ranks of the group.
    """
    key, fresh, seat = _key(world_size), uuid4().hex.encode(), f"seat {uuid4().hex}".encode()
    deadline = monotonic() + DELETE_S
    life = set_first(view, key, fresh)
    # It is over if a rank has left it, or if this rank, in an earlier life, is there already.
    while b" " in life or set_first(store, f"{ROOT}/{life.decode()}/rank/{rank}", seat) != seat:
        if life.split(b" ")[1:2] == [str(world_size).encode()] and monotonic() < deadline:
            sleep(DELETE_S / 1000)  # all have left, and the last one deletes the key: not one of a new life
            life = set_first(view, key, fresh)
            continue
        there = compare_set(view, key, life, fresh)
        # Of a key that is gone, compare_set says that it is as expected.
        life = set_first(view, key, fresh) if there == life else there
    return life.decode()


def leave(view: Store, life: str, rank: int, world_size: int) -> bool:
    """Note that *rank* has left; return whether it was the last of this life, or that is over already."""
    # Each rank that leaves writes a value of its own, so that compare_set tells whether it was this one's.
    left, before = 0, life.encode()
    while True:
        after = f"{life} {left + 1} {rank}".encode()
        there = compare_set(view, _key(world_size), before, after)
        if there in (before, after):
            break
        before = there
        now, *rest = there.decode().split(" ")
        if now != life:
            return True
        left = int(rest[0]) if rest else 0
    if left + 1 == world_size:
        view.delete_key(_key(world_size))
    return left + 1 == world_size


def _key(world_size: int) -> str:
    return f"life of {world_size}"
