"""
A worker of torchrun that runs pytest several times, each time in a process of its own.

The argument is a folder with ``plan.json``: for each run its name, pytest's arguments, with the placeholders
``{results}`` and ``{rank}``, and variables. Results of a run are in the folder of its name: for each rank its
output, its exit code, and its outcomes (see ``conftest.py``).
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist

import collective_scope.pytest_plugin  # noqa: F401  (imported once for all runs, with torch)


def main(folder: Path) -> None:
    """Do all runs, each in a fork of this process, which has done nothing but import."""
    rank, world_size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    gc.freeze()  # the forks need not look through torch
    for number, (name, arguments, variables) in enumerate(json.loads((folder / "plan.json").read_text())):
        results = folder / name
        results.mkdir(exist_ok=True)
        if not (pid := os.fork()):
            # Keys of earlier runs in the store must not be seen.
            os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(number + 1), "SUITE_RUN": name}
            os.environ |= {"SUITE_OUTCOMES": str(results), **variables}
            for fd, stream in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(results / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT), fd)
            options = [each.format(results=results, rank=rank) for each in arguments]
            run([*options, "-o", f"cache_dir={folder / 'cache' / rank}"])
        _, status = os.waitpid(pid, 0)
        (results / f"{rank}.exit").write_text(str(os.waitstatus_to_exitcode(status)))
        store.set(f"driver/{name}/{rank}", "")  # a rank that ended early is not to begin the next run alone
        store.wait([f"driver/{name}/{each}" for each in range(world_size)])


def run(arguments: list[str]) -> None:
    """Run pytest, and end this process."""
    code = 70
    try:
        code = int(pytest.main(arguments))
    except BaseException:  # noqa: BLE001  (kept, and looked at by the test)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
