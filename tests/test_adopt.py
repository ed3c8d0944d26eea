"""Suites of other shapes, with the few lines that adopt the library: what a user gets when one rank fails."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree as ET

import attrs
import pytest
import torch.distributed as dist

from tests.ranks import RankPool, RankResult, run_script


ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "adopt"

MOST_CHANGED = 5
MOST_LINES = 40

# Far below the 30 s for which a scope waits for a rank that is stuck.
TIMEOUT_S = 25.0

CAUSES = {"early": "no room for 20", "late": "wrong result for 20"}


@attrs.frozen
class Suite:
    """
    A suite, and what it prints on each rank about the subtests that passed.

    Attributes:
        module: Its name in ``examples/adopt``.
        passed: Regular expressions of what rank 0 prints; of what all ranks print, if not *is_of_rank_0*.
        is_of_rank_0: Whether rank 0 alone prints it.
    """

    module: str
    passed: tuple[str, ...] = (r"\[rank \d\] size-10 passed$", r"\[rank \d\] size-30 passed$")
    is_of_rank_0: bool = False


SUITES = (
    Suite("vllm_parallel_worker"),
    Suite("flashinfer_finally"),
    Suite("sglang_custom_allreduce"),
    Suite("megatron_teardown", (r"^1 failed, 2 passed in ",)),
    Suite(
        "transformer_engine_pool",
        (r"answers passed.*\n(.*\n)*.*answers failed.*\n(.*\n)*.*answers passed",),
        is_of_rank_0=True,
    ),
    Suite("colossalai_shared_tempdir"),
    Suite("deep_ep_test_loop"),
    Suite("pytorch_run_subtests", (r"\[rank \d\] {'size': 10} passed$", r"\[rank \d\] {'size': 30} passed$")),
    Suite("accelerate_script"),
    Suite("lightning_fabric_launcher"),
    Suite("unittest_subtest"),
)

each_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.module)


@pytest.fixture(scope="module", name="pool")
def _pool() -> Iterator[RankPool]:
    """Return two ranks without a group, with what torchrun would put into their environment."""
    with RankPool(2, store="env", host="parent", init=False) as pool:
        yield pool


def _after(rank: int, world_size: int, module: str, fails: str) -> None:  # noqa: ARG001  (given to every function of a rank)
    os.environ["ADOPT_FAILS"] = fails
    try:
        importlib.import_module(f"examples.adopt.{module}").after()
    finally:
        if dist.is_initialized():  # a suite ends its process here
            dist.destroy_process_group()


def _all_that_is_said(result: RankResult) -> str:
    error = "" if result.error is None else result.error.text
    return f"{result.stdout}\n{result.stderr}\n{error}"


@each_suite
@pytest.mark.parametrize("fails", CAUSES)
def test_after_failure_on_one_rank_costs_one_subtest_and_names_rank_and_cause(
    suite: Suite, fails: str, pool: RankPool
) -> None:
    """The other subtests pass on both ranks, both ranks report the one that failed, and no rank waits in vain."""
    results = pool.run(_after, suite.module, fails, timeout=TIMEOUT_S)

    for result in results:
        if result.rank == 0 or not suite.is_of_rank_0:
            for pattern in suite.passed:
                assert re.search(pattern, result.stdout, re.MULTILINE), pattern
        assert result.error is not None
        assert result.error.type_name in ("ExceptionGroup", "SystemExit")
        assert re.search(rf"ValueError: {CAUSES[fails]}", _all_that_is_said(result))
    assert re.search(rf"\brank 1\b.*\bValueError: {CAUSES[fails]}", _all_that_is_said(results[0]))


@each_suite
def test_after_without_failure_passes_on_both_ranks(suite: Suite, pool: RankPool) -> None:
    """The lines that adopt the library break nothing."""
    for result in pool.run(_after, suite.module, "", timeout=TIMEOUT_S):
        assert result.error is None or result.error.message == "0"  # a program that ends well


@pytest.mark.parametrize("fails", CAUSES)
def test_colossalai_shared_tempdir_is_removed_also_if_a_rank_fails(fails: str, pool: RankPool) -> None:
    """No folder stays behind, and none is removed while a rank writes to it."""
    results = pool.run(_after, "colossalai_shared_tempdir", fails, timeout=TIMEOUT_S)

    folders = {Path(path) for result in results for path in re.findall(r"writes to (.+)", result.stdout)}
    assert len(folders) == 3
    assert [] == [folder for folder in folders if folder.exists()]


# The lines


def _lines(function: Callable[[], None]) -> list[str]:
    return [line.strip() for line in inspect.getsource(function).splitlines() if line.strip()]


def _changed(suite: Suite) -> int:
    """Count the lines of `after` that `before` has not, and the import; where only the indentation differs is no change."""
    module = importlib.import_module(f"examples.adopt.{suite.module}")
    before, after = _lines(module.before)[1:], _lines(module.after)[1:]
    opcodes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return 1 + sum(end - start for tag, _, _, start, end in opcodes if tag in ("insert", "replace"))


@each_suite
def test_adoption_takes_at_most_five_lines_and_the_table_says_how_many(suite: Suite) -> None:
    """Each shape is small, and the table of the README is right about what it takes."""
    module = importlib.import_module(f"examples.adopt.{suite.module}")
    [row] = [line for line in (FOLDER / "README.md").read_text().splitlines() if f"]({suite.module}.py) |" in line]

    assert max(len(_lines(module.before)), len(_lines(module.after))) <= MOST_LINES
    assert _changed(suite) <= MOST_CHANGED
    assert row.split("|")[2].strip() == str(_changed(suite))


# PyTorch's classes


@pytest.mark.skipif(find_spec("expecttest") is None, reason="PyTorch's test classes need expecttest")
def test_pytorch_classes_in_scopes_report_each_test_for_itself_and_skip_as_before(tmp_path: Path) -> None:
    """A test that fails names its cause and costs no other; what skips by an exit code is skipped."""
    path = tmp_path / "report.xml"
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={path}")
    run_script("-m", "pytest", *options, FOLDER / "pytorch_classes.py", cwd=ROOT, timeout=120, expect_exit=1)

    cases = {case.get("name"): list(case) for case in ET.parse(path).iter("testcase")}  # noqa: S314  (our own)
    assert {name: [child.tag for child in children] for name, children in cases.items()} == {
        "test_passes": [],
        "test_fails_early": ["failure"],
        "test_fails_late": ["failure"],
        "test_is_skipped": ["skipped"],
        "test_1_fails_early": ["failure"],
        "test_2_passes": [],
        "test_3_fails_late": ["failure"],
        "test_4_passes": [],
        "test_5_is_skipped": ["skipped"],
    }
    for name, fails in (
        ("test_fails", "early"),
        ("test_fails", "late"),
        ("test_1_fails", "early"),
        ("test_3_fails", "late"),
    ):
        [failure] = cases[f"{name}_{fails}"]
        assert f"ValueError: {CAUSES[fails]}" in str(failure.text)
        assert re.search(r"Process 1 exited|\brank 1 ", str(failure.text))
    [failure] = cases["test_fails_early"]
    assert "rank 0 of 2 missing at the exit of scope 'TestNewRanks.test_fails_early'" in str(failure.text)
