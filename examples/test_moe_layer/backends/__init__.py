"""All-to-all backends: one manager a file, found by name."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symm_mem

from .base import All2AllManager, Dispatched, Handle


__all__ = ["All2AllManager", "Dispatched", "Handle", "make_manager", "why_unavailable"]


CLASSES = {
    "allgather_reducescatter": "AllGatherManager",
    "all_to_all": "AllToAllManager",
    "shared_memory": "SharedMemoryManager",
    "symm_mem": "SymmMemManager",
    "deep_ep": "DeepEPManager",
    "deep_ep_low_latency": "DeepEPLowLatencyManager",
}


def make_manager(name: str, group: dist.ProcessGroup, device: torch.device) -> All2AllManager[Any]:
    """Make the manager of backend *name*. Local: buffers are built by `get_handle`."""
    # Imported only now: a backend may need what is not installed.
    manager_class = getattr(import_module(f".{name}", __package__), CLASSES[name])
    manager: All2AllManager[Any] = manager_class(group, device)
    return manager


def why_unavailable(name: str, device_type: str) -> str | None:
    """Return why *name* cannot run here, in words; ``None`` if it can."""
    if name == "shared_memory" and device_type != "cpu":
        return "shared_memory is what symm_mem and deep_ep are on GPUs; it needs --device cpu"
    if name not in ("symm_mem", "deep_ep", "deep_ep_low_latency"):
        return None
    lacks = {
        "the package deep_ep, which is not installed": lambda: name != "symm_mem" and find_spec("deep_ep") is None,
        "GPUs": lambda: device_type != "cuda",
        "GPUs with access to each other's memory": lambda: not visible_devices_have_peer_access(),
        "compute capability 9.0": lambda: name == "deep_ep_low_latency" and torch.cuda.get_device_capability() < (9, 0),
        "NVSHMEM, which this torch does not find": lambda: name == "symm_mem" and not symm_mem.is_nvshmem_available(),
    }
    return next((f"{name} needs {what}" for what, is_lacking in lacks.items() if is_lacking()), None)


def visible_devices_have_peer_access() -> bool:
    """Tell whether every GPU can read and write the memory of every other."""
    count = torch.cuda.device_count()
    return all(torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b)
