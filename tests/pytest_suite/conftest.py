"""The group of the suite; and what became of each test, in a file for each rank."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session", name="ranks", autouse=True)
def _ranks() -> Iterator[None]:
    """Make the default group, unless that has been done by ``--collective-scope-make``."""
    if dist.is_initialized():
        yield
        return
    if "SUITE_RUN" in os.environ:  # one of several with the same store
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(os.environ["SUITE_RUN"], store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    elif "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def default_group() -> dist.ProcessGroup | None:
    """Return the group of the suite, once it has been made: what ``--collective-scope-group`` can name."""
    return dist.group.WORLD


@pytest.fixture(name="total")
def _total() -> float:
    """Return the sum of a collective in the setup of a test."""
    return all_reduce(1.0)


def all_reduce(value: float) -> float:
    """Return the sum of *value* over all ranks."""
    tensor = torch.tensor([value])
    dist.all_reduce(tensor)
    return float(tensor.item())


def is_last() -> bool:
    """Whether this is the last rank; the only one is."""
    return dist.get_rank() == dist.get_world_size() - 1


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what became of a phase; not that a subtest passed, as it may have failed on a rank that tells so later."""
    if not report.passed or (report.when == "call" and not isinstance(report, pytest.SubtestReport)):
        kind = f"x{report.outcome}" if hasattr(report, "wasxfail") else report.outcome
        _note(test=f"{report.nodeid} {report.head_line}", when=report.when, outcome=kind, text=report.longreprtext)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Note that the run came to its end."""
    if not hasattr(config, "workerinput"):
        _note(test="", when="end", outcome="", text="")


def _note(**fields: object) -> None:
    path = Path(os.environ["SUITE_OUTCOMES"]) / f"{os.environ.get('RANK', '0')}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")
