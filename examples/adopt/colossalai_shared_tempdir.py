"""
ColossalAI's shared temporary folder: rank 0 makes it, all ranks write to it, rank 0 removes it after a barrier.

Megatron's `TempNamedDir` is the same, but for the barrier when the body has raised.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from collective_scope import RenewableGroup, Subtests, current_scope
from examples.adopt.common import SIZES, TIMEOUT, check, launch, say


def save_and_check(size: int, folder: str) -> None:
    say(f"size-{size} writes to {folder}")
    Path(folder, f"shard-{dist.get_rank()}").write_text(str(size))
    check(size)
    assert len(list(Path(folder).iterdir())) == dist.get_world_size()
    say(f"size-{size} passed")


def before() -> None:
    @contextmanager
    def shared_tempdir() -> Iterator[str]:
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder)
        try:
            yield folder[0]
        finally:
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(folder[0])

    dist.init_process_group("gloo", timeout=TIMEOUT)
    for size in SIZES:
        with shared_tempdir() as folder:
            save_and_check(size, folder)
    dist.destroy_process_group()


def after() -> None:
    @contextmanager
    def shared_tempdir() -> Iterator[str]:
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            current_scope().after_barrier(shutil.rmtree, folder[0])
        yield folder[0]

    with Subtests(RenewableGroup(), verbose=True) as subtests:
        for size in SIZES:
            with subtests.test(f"size-{size}"), shared_tempdir() as folder:
                save_and_check(size, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(before, after)
