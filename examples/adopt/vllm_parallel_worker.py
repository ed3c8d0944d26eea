"""
vLLM's `_parallel_worker`: a loop of configurations, failures counted, buffers of a weak cache destroyed by all ranks.

The destroy is a collective, so that all ranks have to have the same buffers at that moment.
"""

from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from collective_scope import RenewableGroup, Subtests
from examples.adopt.common import SIZES, TIMEOUT, check, launch, say


class Handle:
    """A buffer that all ranks make and destroy together."""

    def __init__(self, size: int) -> None:
        self.value = torch.zeros(size)


class All2AllManager:
    """A cache that keeps no handle alive."""

    def __init__(self) -> None:
        self.handles: WeakValueDictionary[int, Handle] = WeakValueDictionary()

    def get(self, size: int) -> Handle:
        """Return the handle of this size, perhaps a new one."""
        return self.handles.setdefault(size, Handle(size))

    def destroy(self) -> None:
        """Destroy what is alive here; a collective for each."""
        for _ in list(self.handles.values()):
            dist.barrier()
        self.handles.clear()


def before() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    failures = []
    manager = All2AllManager()
    for size in SIZES:
        try:
            handle = manager.get(size)
            check(size, handle.value)
            say(f"size-{size} passed")
        except Exception as error:  # noqa: BLE001  (counted)
            failures.append(f"size-{size}: {error}")
        finally:
            manager.destroy()
            dist.barrier()
    dist.destroy_process_group()
    if failures:
        msg = f"{len(failures)} of {len(SIZES)} failed: {'; '.join(failures)}"
        raise RuntimeError(msg)


def after() -> None:
    manager = All2AllManager()
    with Subtests(RenewableGroup(), verbose=True) as subtests:
        for size in SIZES:
            with subtests.test(f"size-{size}") as subtest:
                subtest.scope.collective_cleanup(manager.destroy)
                handle = subtest.scope.hold(manager.get(size))
                check(size, handle.value)
                say(f"size-{size} passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(before, after)
