"""``python -m collective_scope check``: one screen, and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from collective_scope import __version__
from collective_scope.__main__ import nccl_advice


CHECK = ("-m", "collective_scope", "check")


def _run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        env=os.environ | variables,
    )


def test_check_alone_says_versions_and_how_to_go_on() -> None:
    """Without torchrun there is one process, which is told what to type next."""
    done = _run(*CHECK)

    assert 0 == done.returncode
    first, alone, following = done.stdout.splitlines()
    assert first.startswith(f"collective_scope {__version__}, torch {torch.__version__}, Python 3.")
    assert alone.startswith("alone ")
    assert "torchrun --nproc-per-node 2 -m collective_scope check" in following


def test_check_under_torchrun_says_what_every_rank_found() -> None:
    """Rank 0 prints one screen for all: the store and its host, times, control threads."""
    done = _run("-m", "torch.distributed.run", "--nproc-per-node", "2", *CHECK)

    assert 0 == done.returncode, done.stderr
    titles = [line.split("  ")[0] for line in done.stdout.splitlines()[1:]]
    assert ["ranks", "store", "round trip", "a scope", "control", "all well"] == titles
    assert "ranks        2 on 1 host: " in done.stdout
    assert "served by none of the ranks: the launcher" in done.stdout
    assert "its thread is alive on every rank" in done.stdout


def test_check_without_numpy_is_well(tmp_path: Path) -> None:
    """Nothing but torch and attrs is needed."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError")

    done = _run("-m", "torch.distributed.run", "--nproc-per-node", "2", *CHECK, PYTHONPATH=str(tmp_path))

    assert 0 == done.returncode, done.stderr
    assert "all well" in done.stdout


@pytest.mark.parametrize(
    ("variables", "advised"),
    [
        ({}, ["TORCH_NCCL_ASYNC_ERROR_HANDLING=0"]),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, []),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_BLOCKING_WAIT": "0"}, []),
        (
            {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "TORCH_NCCL_BLOCKING_WAIT": "1"},
            ["TORCH_NCCL_ASYNC_ERROR_HANDLING=0", "TORCH_NCCL_BLOCKING_WAIT=0"],
        ),
    ],
)
def test_check_advises_settings_of_nccl_that_are_not_so(variables: dict[str, str], advised: list[str]) -> None:
    """A variable that is unset has torch's default."""
    assert advised == [line.partition(" ")[0] for line in nccl_advice(variables)]


def test_check_of_anything_else_says_how_to_use_it() -> None:
    """A wrong word is refused with exit code 2."""
    done = _run("-m", "collective_scope", "chekc")

    assert (2, True) == (done.returncode, done.stderr.startswith("usage: "))
