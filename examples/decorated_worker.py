"""
The decorator: each call of a worker function is a scope of its own.

Run it with ``python examples/decorated_worker.py``. The worker makes a folder
that both ranks write to. Rank 0 removes it after the barrier, when no rank can
still be writing, and before the process group goes.
"""

import shutil
import tempfile
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from collective_scope import collective_scope, current_scope


@collective_scope(timeout=60)
def write_shards(rank: int, shards: int) -> None:
    store = dist.PrefixStore(f"{shards} shards", dist.group.WORLD.get_group_store())
    if rank == 0:
        store.set("folder", tempfile.mkdtemp())
    path = Path(store.get("folder").decode())
    if rank == 0:
        current_scope().after_barrier(shutil.rmtree, path)
        current_scope().after_barrier(
            lambda: print(f"{shards} shards, folder still there: {path.exists()}", flush=True)
        )
    for shard in range(rank, shards, dist.get_world_size()):
        (path / f"{shard}.txt").write_text(f"written by rank {rank}")


def main(rank: int, world_size: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port)
    # The scope looks the group up when the worker is called: it need not exist when it is decorated.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for shards in (4, 6):
        write_shards(rank, shards)
    dist.destroy_process_group()


if __name__ == "__main__":
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(main, (2, server.port), nprocs=2)
