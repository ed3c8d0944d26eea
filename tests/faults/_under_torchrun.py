"""
A worker of torchrun that plays one fault after the other, as a rank of a pool does.

The faults are in the file ``plan`` of the directory that is its argument; what became
of rank *r* in the fault number *n* goes into ``{n}/performance-{r}``.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path

from tests import _rank
from tests._rank import RankContext
from tests.faults._play import perform
from tests.hosts import set_cable


def main(directory: Path) -> None:
    """Play all faults of the plan."""
    rank = int(os.environ["RANK"])
    # Started from a background job, the process inherits "ignore".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, (fault, world_size, mechanism) in enumerate(pickle.loads((directory / "plan").read_bytes())):
        folder = directory / str(number)
        folder.mkdir(exist_ok=True)
        context = RankContext(
            rank=rank,
            world_size=world_size,
            pids=(),
            store_pid=None,
            backend="gloo",
            store="env",
            port=int(os.environ["MASTER_PORT"]),
            init=False,
            group_timeout_s=None,
            directory=folder,
        )
        _rank.enter(context)
        try:
            performance = perform(rank, 0, fault, world_size, mechanism)
        finally:
            if fault.store == "hosts":
                set_cable("up")  # The rank that should have put it back may be gone.
        (folder / f"performance-{rank}").write_bytes(pickle.dumps(performance))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
