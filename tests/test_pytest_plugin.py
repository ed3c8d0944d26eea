"""The pytest plugin: real suites, under real torchrun, and what one process makes of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

import attrs
import pytest

from tests.ranks import run_script, run_torchrun


SUITE = Path(__file__).parent / "pytest_suite"

_NO_DNS = re.compile(r"^.*The hostname of the client socket cannot be retrieved.*\n", re.MULTILINE)
"""Torch prints this because the tests keep it from asking the DNS."""

WIDE = {"COLUMNS": "200"}
"""Lines of the summary are not cut."""

# For each run: pytest's arguments, and variables.
Plan = Mapping[str, tuple[list[str], dict[str, str]]]


@attrs.frozen
class Run:
    """
    The outcome of one pytest run on one rank.

    Attributes:
        folder: Its files are there.
        exit: Its exit code.
        stdout: Its output there.
        stderr: Its output there.
        outcomes: Outcomes of each test, and how often: id, phase, outcome.
        texts: Texts of the failure reports, by test.
        is_whole: Whether the session came to its end.
    """

    folder: Path
    exit: int
    stdout: str
    stderr: str
    outcomes: Counter[tuple[str, str, str]]
    texts: dict[str, str]
    is_whole: bool

    @property
    def counts(self) -> dict[str, int]:
        """Counts in the last line of the terminal, such as ``{"failed": 1, "passed": 2}``, without warnings."""
        line = next((line for line in reversed(self.stdout.splitlines()) if re.search(r" in \d+\.\d\ds", line)), "")
        counted = {
            what.rstrip("s") if what != "passed" else what: int(n) for n, what in re.findall(r"(\d+) (\w+)", line)
        }
        return {what: n for what, n in counted.items() if what != "warning"}

    def count(self, test: str, outcome: str) -> int:
        """Return how often a test of this name had this outcome."""
        return sum(n for (name, _, each), n in self.outcomes.items() if f"::{test} " in name and each == outcome)

    @classmethod
    def read(cls, folder: Path, rank: int = 0, code: int | None = None, stdout: str = "", stderr: str = "") -> Run:
        """Read what `pytest_suite/driver.py` and `pytest_suite/conftest.py` have written."""
        path = folder / f"{rank}.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        tests = [event for event in events if event["when"] != "end"]
        if code is None:
            code = int((folder / f"{rank}.exit").read_text())
            stdout, stderr = ((folder / f"{rank}.{name}").read_text() for name in ("stdout", "stderr"))
        return cls(
            folder=folder,
            exit=code,
            stdout=stdout,
            stderr=_NO_DNS.sub("", stderr),
            outcomes=Counter((event["test"], event["when"], event["outcome"]) for event in tests),
            texts={event["test"]: event["text"] for event in tests if event["outcome"] == "failed"},
            is_whole=len(tests) < len(events),
        )


def run_plan(folder: Path, world_size: int, plan: Plan, timeout: float = 150.0) -> dict[str, list[Run]]:
    """Run pytest under torchrun, several times in one launch; return for each run what came of each rank."""
    (folder / "plan.json").write_text(json.dumps([[name, *each] for name, each in plan.items()]))
    run_torchrun(SUITE / "driver.py", folder, world_size=world_size, timeout=timeout, cwd=SUITE, env=WIDE)
    return {name: [Run.read(folder / name, rank) for rank in range(world_size)] for name in plan}


def run_alone(folder: Path, *arguments: str) -> Run:
    """Run pytest in one process without a launcher."""
    env = {"SUITE_OUTCOMES": str(folder), **WIDE}
    result = run_script("-m", "pytest", *arguments, "-p", "no:cacheprovider", env=env, cwd=SUITE, expect_exit=None)
    return Run.read(folder, 0, result.exit, result.stdout, result.stderr)


SCOPES = "--collective-scope"
MAKE = "--collective-scope-make=auto"
PATIENCE = ["--collective-scope-failure-timeout=60", "--collective-scope-warn-after=60"]
FEW = ["suite_few.py", SCOPES, *PATIENCE]
LATE = {"SUITE_LATE": "1"}

FOUR: Plan = {
    "features": (["suite_features.py", SCOPES, *PATIENCE], {}),
    "faults": (["suite_faults.py", SCOPES, MAKE, *PATIENCE, "--junitxml={results}/{rank}.xml"], {}),
    "divided": (["suite_divided.py", SCOPES, MAKE, *PATIENCE], {}),
}

TWO: Plan = {
    "all": ([*FEW, "--durations=1"], {}),
    "lf": ([*FEW, "--lf"], {}),
    "x": (
        ["suite_few.py", *PATIENCE, "-x", "-o", "collective_scope=true", "-o", "collective_scope_lockstep_gc=true"],
        {},
    ),
    "maxfail": ([*FEW, "--maxfail=2", "-p", "no:capture"], {}),
    "k": ([*FEW, "-k", "marked", "--collective-scope-group=tests.pytest_suite.conftest:default_group"], {}),
    "reruns": ([*FEW, "--reruns=1", "-k", "at_first or again"], {}),
    "marked": (["suite_few.py", *PATIENCE], {"SUITE_BY_NAME": "1"}),
    "xdist": ([*FEW, "-n2"], {}),
    "wrong option": ([*FEW, "--collective-scope-timeout=-1"], {}),
    "wrong marker": (FEW, {"SUITE_WRONG": "1"}),
    "differs": (FEW, {"SUITE_DIFFERS": "1"}),
    "exit": ([*FEW, "-k", "ends"], {"SUITE_ENDS": "exit"}),
    "interrupt": ([*FEW, "-k", "ends"], {"SUITE_ENDS": "interrupt"}),
    "timeout": ([*FEW, "-k", "late"], LATE),
    "timeout by a thread": ([*FEW, "-k", "again or late", "--timeout-method=thread"], LATE),
    "timeout at the barrier": ([*FEW, "-k", "waited_for"], LATE),
    "dies": ([*FEW, "-k", "dies"], {"SUITE_DIES": "1"}),
    "killed": (
        [*FEW, "-k", "again or stuck", "--collective-scope-kill-after=6", "--collective-scope-warn-after=3"],
        LATE,
    ),
}


@pytest.fixture(scope="module", name="four")
def _four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """Return what four ranks make of whole suites."""
    return run_plan(tmp_path_factory.mktemp("four"), 4, FOUR)


@pytest.fixture(scope="module", name="two")
def _two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """Return what two ranks make of a few tests with options of pytest."""
    return run_plan(tmp_path_factory.mktemp("two"), 2, TWO)


@pytest.mark.parametrize("suite", ["features", "faults"])
def test_outcomes_on_four_ranks_are_those_of_one_process(
    suite: str, four: dict[str, list[Run]], tmp_path: Path
) -> None:
    """The reports, the exit code, and the numbers in the terminal are equal; so is the JUnit file, which rank 0 writes."""
    alone = run_alone(tmp_path, f"suite_{suite}.py", f"--junitxml={tmp_path / 'alone.xml'}")

    assert len(alone.outcomes) >= 16
    for run in four[suite]:
        assert alone.outcomes == run.outcomes
        assert (alone.exit, True) == (run.exit, run.is_whole)
    assert alone.counts == four[suite][0].counts
    if suite == "faults":
        (written,) = four[suite][0].folder.glob("*.xml")
        assert "0.xml" == written.name
        assert _junit(tmp_path / "alone.xml") == _junit(written)


@pytest.mark.parametrize("suite", FOUR)
def test_failures_of_any_rank_are_reported_alike_by_all(suite: str, four: dict[str, list[Run]]) -> None:
    """Ranks report the same of the same tests, though they did not do the same; rank 0 alone prints."""
    first, *others = four[suite]

    assert first.is_whole
    for run in others:
        assert first.outcomes == run.outcomes
        assert ("", "") == (run.stdout, run.stderr)
    assert "" == first.stderr


def test_failures_of_one_rank_before_or_after_collectives_are_shown_with_their_cause(
    four: dict[str, list[Run]],
) -> None:
    """Each rank's report names the rank, and has its traceback and its output."""
    run = four["faults"][0]
    failed = [test for test in run.texts if "subtest" not in test]

    assert 10 == len(failed)
    for test in failed:
        for each in four["faults"]:
            assert re.search(r"on the last rank, |not as expected", each.texts[test]), test
            assert "3 (" in each.texts[test], test
    assert 10 == len(re.findall(r"^(?:FAILED|ERROR) .* - rank 3: ValueError", run.stdout, re.MULTILINE))
    # Not what a cleanup prints: then the report is made already.
    assert 9 == len(
        re.findall(r"^-+ Captured stdout \w+, rank 3 -+\nprinted by the last rank", run.stdout, re.MULTILINE)
    )
    assert 2 == len(re.findall(r"^SUBFAILED.* - rank 3: ValueError", run.stdout, re.MULTILINE))


def test_cleanup_that_did_not_run_is_named_in_the_report(four: dict[str, list[Run]]) -> None:
    """All ranks say that a collective cleanup could not run, as the scope does."""
    for run in four["faults"]:
        text = next(text for test, text in run.texts.items() if "test_fails_before_collectives" in test)
        assert re.search(
            r"^Not run, .*: cleanup 'all_reduce' \(registered at .*suite_faults\.py:\d+\)", text, re.MULTILINE
        )


def test_ranks_that_do_different_things_are_told_apart(four: dict[str, list[Run]]) -> None:
    """A skip on one rank is a failure; of several errors the first leads, and all are listed; long reports are cut."""
    run = four["divided"][3]
    texts = {test.partition("::")[2].partition(" ")[0]: text for test, text in run.texts.items()}

    assert "skipped, and other ranks did not: Skipped: only here\n  " in texts["test_skips_on_one_rank"]
    assert "only in this setup" in texts["test_skips_in_the_setup_of_one_rank"]
    assert "ValueError: of the last rank" in texts["test_raises_different_errors"]
    assert "TypeError: of another rank, 4.0" in texts["test_raises_different_errors"]
    assert 4 == sum("[of rank" in test for test, _, outcome in run.outcomes if outcome == "failed")
    assert "characters in all" in four["divided"][0].texts[_name(run, "test_has_too_much_to_tell")]
    assert "UnprintableError" in four["divided"][0].texts[_name(run, "test_raises_what_cannot_be_shown")]
    assert run.count("test_xfails_in_the_body_of_one_rank", "xskipped") == 1
    assert run.count("test_passes_at_the_end", "passed") == 1


def test_options_of_pytest_choose_the_same_tests_on_all_ranks(two: dict[str, list[Run]]) -> None:
    """A failure on one rank counts on all of them: for the last failed, for the first, for the second."""
    for name, counts in {
        "all": {"failed": 4, "passed": 3},
        "lf": {"failed": 4, "deselected": 3},
        "x": {"failed": 1, "passed": 1},
        "maxfail": {"failed": 2, "passed": 1},
        "k": {"failed": 1, "deselected": 6},
        "reruns": {"failed": 1, "passed": 1, "deselected": 5, "rerun": 2},
    }.items():
        first, second = two[name]

        assert counts == first.counts, first.stdout
        assert first.outcomes == second.outcomes
        assert (1, 1, "") == (first.exit, second.exit, second.stdout)
    assert "slowest 1 durations" in two["all"][0].stdout
    assert re.search(
        r"^FAILED .*test_fails_everywhere - ranks 0, 1: AssertionError$", two["all"][0].stdout, re.MULTILINE
    )


def test_without_the_option_only_marked_tests_are_run_together(two: dict[str, list[Run]]) -> None:
    """The rest is each rank's own business, and each prints."""
    first, second = two["marked"]

    assert {"failed": 3, "passed": 5} == first.counts
    assert {"failed": 5, "passed": 3} == second.counts
    for run in (first, second):
        assert "test_marked - rank 1: assert not True" in run.stdout
        assert "test_fails_everywhere - AssertionError" in run.stdout
        assert "by its name needs --collective-scope or @pytest.mark.collective" in run.stdout


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("xdist", 4, "so -n cannot be used under a launcher"),
        ("wrong option", 4, "collective_scope: timeout must be positive and finite"),
        ("wrong marker", 4, "the marker 'collective' of suite_few.py::test_marked_wrongly: timeout must be positive"),
        ("differs", 1, "rank 1 alone has suite_few.py::test_of_parameters[2]"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_test(
    name: str, code: int, text: str, two: dict[str, list[Run]]
) -> None:
    """One sentence says why, on all ranks the same exit code."""
    assert [code, code] == [run.exit for run in two[name]]
    assert text in two[name][0].stderr
    assert not any(run.outcomes for run in two[name])


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [("exit", 9, "has seen enough"), ("interrupt", 2, r"KeyboardInterrupt at .*\.py:\d+, in test_")],
)
def test_the_end_of_the_session_on_one_rank_ends_all(
    name: str, code: int, text: str, two: dict[str, list[Run]]
) -> None:
    """The exit code is that of the rank, whose reason rank 0 tells."""
    assert [code, code] == [run.exit for run in two[name]]
    assert re.search(f"Exit: rank 1: .*{text}", two[name][0].stdout)


def test_timeout_on_one_rank_fails_the_test_on_all(two: dict[str, list[Run]]) -> None:
    """The report shows where that rank was, and what it printed; the other one has waited for it."""
    first, second = two["timeout"]

    assert {"failed": 1, "deselected": 9} == first.counts
    assert first.outcomes == second.outcomes
    assert "test_is_late - rank 1: Failed: Timeout (>3.0s)" in first.stdout
    assert "printed by the rank that is late" in first.stdout
    assert ">           threading.Event().wait()" in first.stdout


def test_timeout_while_a_rank_waits_says_for_which_one(two: dict[str, list[Run]]) -> None:
    """The report names the rank that did not come, and shows no code of the library, in which the wait was ended."""
    first, second = two["timeout at the barrier"]

    assert [1, 1] == [first.exit, second.exit]
    report = first.stdout.partition("= FAILURES =")[2].partition("- Captured")[0]
    assert "Failed: Timeout (>2.0s) from pytest-timeout." in report
    assert "rank 1 of 2 missing at the exit of scope 'suite_few.py::test_is_waited_for (call)'" in report
    assert "Rank 0 stopped waiting at the barrier." in report
    assert not re.search(r"agreement/\w+\.py", report)


def test_rank_that_dies_is_the_cause_of_what_its_peer_raises(two: dict[str, list[Run]]) -> None:
    """A rank that is gone has told nothing; the summary names it before the error of the other one."""
    first = two["dies"][0]

    assert re.search(r"^FAILED .*test_dies - rank 1 lost, and rank 0 failed: RuntimeError", first.stdout, re.MULTILINE)


def test_timeout_by_a_thread_ends_one_rank_and_the_session(two: dict[str, list[Run]]) -> None:
    """The rank that dies prints its stacks; the other one says that it is gone, and what failed before."""
    first, second = two["timeout by a thread"]

    assert [1, 1] == [first.exit, second.exit]
    assert "in test_is_late" in second.stderr
    assert re.search(r"^FAILED .*test_is_late - rank 1 of 2 lost", first.stdout, re.MULTILINE)
    assert "FAILED suite_few.py::test_fails_again - rank 1: ValueError: again" in first.stdout


def test_kill_after_of_a_test_that_hangs_says_where_all_are_and_what_has_failed(two: dict[str, list[Run]]) -> None:
    """A warning comes first, once; the end goes past the capture, with the reports of earlier tests."""
    first, second = two["killed"]
    log = first.stderr + second.stderr
    scope = "scope 'suite_few.py::test_is_stuck (call)'"

    # The rank that is ended first frees the other one, which may get to the end of its session.
    assert {124} <= {first.exit, second.exit} <= {124, 1}
    assert f"{scope} was not left within kill_after=6.0 s" in log
    assert 1 == log.count(f"no rank of 2 has come to the exit of {scope}")
    for line in ("all_reduce(1.0)", "threading.Event().wait()"):
        assert re.search(rf"in test_is_stuck\n +{re.escape(line)}", log), log
    assert 1 == (first.stdout + log).count("E           ValueError: again")


def test_end_of_torchrun_by_a_signal_leaves_a_log_with_all_that_was_known(tmp_path: Path) -> None:
    """Each rank says where it is, and one of them which tests have failed; children of a test are not touched."""
    suite = ["-m", "pytest", "suite_stuck.py", SCOPES, "-p", "no:cacheprovider"]
    env = {"SUITE_OUTCOMES": str(tmp_path)}
    result = run_torchrun(*suite, world_size=2, cwd=SUITE, env=env, expect_exit=None)

    log = result.stdout + result.stderr
    for rank in range(2):
        head = rf"rank {rank} of 2 is ended by SIGTERM in suite_stuck.py::test_is_stuck \(call\), after \d"
        assert re.search(rf"{head}.*\n(?:  .*\n)*  File .*in test_is_stuck\n", log), log
    assert "suite_stuck.py::test_fails_first failed (call):" in log
    assert "E           ValueError: known before the end" in log
    assert "suite_stuck.py F." in log


def test_worker_of_xdist_is_a_world_of_one(tmp_path: Path) -> None:
    """Without a launcher, other processes can run the tests."""
    run = run_alone(tmp_path, "suite_few.py", "-n1", SCOPES)

    assert {"failed": 4, "passed": 3} == run.counts


def test_plugin_that_is_not_asked_for_imports_nothing(tmp_path: Path) -> None:
    """A suite that has nothing to do with it does not pay for torch."""
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    code = (
        "import sys, pytest; print(pytest.main(['-q']), *sorted({'torch', 'collective_scope_pytest'} & {*sys.modules}))"
    )
    result = run_script("-c", code, cwd=tmp_path)

    assert "ExitCode.OK collective_scope_pytest" == result.stdout.splitlines()[-1].replace("0", "ExitCode.OK", 1)


def _junit(path: Path) -> tuple[Counter[tuple[str | None, ...]], dict[str, str]]:
    """Return what became of each test according to a JUnit file, and its totals."""
    root = next(ET.parse(path).getroot().iter("testsuite"))  # noqa: S314  (pytest has written it)
    cases = Counter(
        (case.get("classname"), case.get("name"), *(child.tag for child in case)) for case in root.iter("testcase")
    )
    return cases, {name: root.attrib[name] for name in ("errors", "failures", "skipped")}


def _name(run: Run, test: str) -> str:
    return next(name for name in run.texts if f"::{test} " in name)


_DEAD = """
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session", autouse=True)
def group():
    dist.init_process_group("gloo", timeout=timedelta(seconds=4))


def test_fails_before():
    if dist.get_rank() == 1:
        raise ValueError("the cause")
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("number", range(3))
def test_later(number):
    dist.all_reduce(torch.ones(1))


def test_without_collectives():
    pass
"""


def test_group_that_cannot_be_made_again_is_called_dead_in_full_once_then_in_a_line(tmp_path: Path) -> None:
    """Reports of tests that meet a dead group say since when it is, and show no traceback of torch's."""
    (tmp_path / "test_dead.py").write_text(_DEAD)
    arguments = ("-m", "pytest", "-n0", "-p", "no:cacheprovider", "-p", "no:logging", SCOPES)

    run = run_torchrun(*arguments, world_size=2, cwd=tmp_path, env=WIDE, expect_exit=1)

    assert re.search(r"4 failed, 1 passed in ", run.stdout)
    assert "collective_scope: 2 ranks; no --collective-scope-make, so a rank that is stuck" in run.stdout
    assert 1 == run.stdout.count("RenewableGroup frees its ranks before that")
    later = re.findall(r"^FAILED .*test_later\[\d\] - (.*)$", run.stdout, re.MULTILINE)
    assert all("its group is dead since scope 'test_dead.py::test_fails_before (call)': " in line for line in later[1:])
    assert 3 == len(later)
    sections = re.split(r"^_{5,} (\S+) _{5,}$", run.stdout, flags=re.MULTILINE)
    last = sections[sections.index("test_later[2]") + 1]
    assert "distributed_c10d.py" not in last
    assert len(last.splitlines()) < 12


_SLEEPS = """
import os, time

if os.environ["RANK"] == "1":
    time.sleep(60)  # the fault


def test_nothing():
    pass
"""


def test_rank_that_is_stuck_in_an_import_is_located_by_its_peer(tmp_path: Path) -> None:
    """Rank 0 says in which line rank 1 is, although that has collected no test yet."""
    (tmp_path / "test_sleeps.py").write_text(_SLEEPS)
    limits = ("--collective-scope-timeout=6", "--collective-scope-failure-timeout=3", "--collective-scope-warn-after=2")
    arguments = ("-m", "pytest", "-n0", "-p", "no:cacheprovider", SCOPES, *limits)

    run = run_torchrun(*arguments, world_size=2, cwd=tmp_path, env=WIDE, expect_exit=1)

    assert "rank 1 of 2 missing at the exit of scope 'collection'" in run.stderr
    place = r"missing:  1  \S+ pid \d+, outside of any scope \(sleeping\)\n +File \".*test_sleeps\.py\", line 5, in <module>"
    assert re.search(place, run.stderr)


_VARIOUS = """
import os
import time

import pytest
import torch.distributed as dist

RANK = int(os.environ["RANK"])


@pytest.fixture(scope="module")
def group():
    return dist.new_group([0, 1])


def test_skips_and_fails():
    if RANK == 0:
        pytest.skip("no card")
    assert RANK != 1, "the real bug"


def test_fails_in_two_ways():
    assert RANK != 0, "first"
    raise KeyError("second")


def test_fails_with_an_address():
    raise ValueError(f"the same: <Group object at {id(RANK) + RANK:#x}>")


def test_breaks(group):
    if RANK == 1:
        raise ValueError("the cause")
    dist.barrier(group)


def test_uses_it_again(group):
    dist.barrier(group)


def test_makes_the_group_itself():
    dist.init_process_group("gloo")


@pytest.mark.xfail(strict=True, reason="on rank 1")
@pytest.mark.parametrize("seconds", [0.0, 1.0])  # shorter and longer than the grace
def test_fails_as_expected_on_one_rank(seconds):
    if RANK == 1:
        time.sleep(seconds)
        assert False


@pytest.mark.xfail(strict=True, reason="on no rank")
def test_passes_on_all():
    pass


@pytest.mark.xfail(RANK == 1, strict=True, reason="marked on one rank")
def test_is_to_fail_on_one_rank_and_passes():
    pass
"""


@pytest.fixture(scope="module", name="various")
def _various(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what rank 0 prints of each test, and the summary."""
    folder = tmp_path_factory.mktemp("various")
    (folder / "test_various.py").write_text(_VARIOUS)
    arguments = ("-m", "pytest", "-n0", "-rfEx", "-p", "no:cacheprovider", "-p", "no:logging", SCOPES, MAKE)
    run = run_torchrun(*arguments, world_size=2, cwd=folder, env=WIDE, expect_exit=1)
    sections = re.split(r"^_{5,} (\S+) _{5,}$", run.stdout, flags=re.MULTILINE)
    return {**dict(zip(sections[1::2], sections[2::2], strict=True)), "summary": run.stdout.rpartition("short test")[2]}


def test_skip_on_one_rank_does_not_hide_a_failure_on_another(various: dict[str, str]) -> None:
    """The failure is the headline, with its traceback."""
    assert 'assert RANK != 1, "the real bug"' in various["test_skips_and_fails"]
    assert "test_skips_and_fails - rank 1: AssertionError: the real bug" in various["summary"]


def test_ranks_that_fail_in_two_ways_are_both_shown_with_a_traceback(various: dict[str, str]) -> None:
    """The second failure follows the first, in a section of its own."""
    text = various["test_fails_in_two_ways"]
    assert re.search(r"^-+ rank (0|1), which failed in another way -+$", text, re.MULTILINE)
    assert all(line in text for line in ('assert RANK != 0, "first"', 'raise KeyError("second")'))


def test_ranks_whose_messages_differ_by_an_address_have_failed_alike(various: dict[str, str]) -> None:
    """Where an object is in memory is different on each rank, and no other failure."""
    assert "test_fails_with_an_address - ranks 0, 1: ValueError: the same: " in various["summary"]
    assert "which failed in another way" not in various["test_fails_with_an_address"]


def test_group_of_a_fixture_that_a_revocation_has_destroyed_is_said_to_be_so(various: dict[str, str]) -> None:
    """The report of a later test names the one that cost the group, and says where to make such groups."""
    text = various["test_uses_it_again"]
    assert "The group was revoked in scope 'test_various.py::test_breaks (call)', and made again" in text
    assert "in a fixture of function scope" in text
    assert "and made again" not in various["test_breaks"]


def test_default_group_that_a_test_makes_itself_is_said_to_be_there(various: dict[str, str]) -> None:
    """A suite that has left its own init_process_group in is told what to do with it."""
    assert "The RenewableGroup has made the default group already" in various["test_makes_the_group_itself"]


def test_failure_as_expected_on_one_rank_has_its_own_reason(various: dict[str, str]) -> None:
    """The ranks that have passed report the reason of the one that has not, however much later that fails."""
    line = r"^XFAIL .*test_fails_as_expected_on_one_rank\[.*\] - on rank 1$"
    assert 2 == len(re.findall(line, various["summary"], re.MULTILINE))


def test_pass_that_was_to_be_a_failure_fails_once_on_all_and_at_the_teardown_if_it_was_so_on_some(
    various: dict[str, str],
) -> None:
    """A strict xfail that passes on all ranks is as in one process; one that is marked on some ranks fails on all."""
    assert re.search(r"^FAILED .*test_passes_on_all - \[XPASS\(strict\)\] on no rank", various["summary"], re.MULTILINE)
    assert not re.search(r"^ERROR .*test_passes_on_all", various["summary"], re.MULTILINE)
    assert re.search(r"^ERROR .*test_is_to_fail_on_one_rank_and_passes - rank 1: ", various["summary"], re.MULTILINE)


_MAKE_FAILS = """
import os

import torch.distributed as dist

attempts = []


def make(store):
    attempts.append(1)
    rank = int(os.environ["RANK"])
    if rank == 1 and len(attempts) == 1:
        raise OSError("the card is busy")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
"""

_BARRIERS = """
import os
from pathlib import Path

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def trace(request):
    Path(f"{request.node.name} on {os.environ['RANK']}").touch()


def test_first():
    dist.barrier()


def test_second():
    dist.barrier()
"""


def test_make_that_fails_on_one_rank_costs_one_test_and_is_its_only_error(tmp_path: Path) -> None:
    """No fixture of the test runs that is refused, and no plugin of pytest tears down what it has not set up."""
    (tmp_path / "groups_of_suite.py").write_text(_MAKE_FAILS)
    (tmp_path / "test_suite.py").write_text(_BARRIERS)
    arguments = (
        "-m",
        "pytest",
        "-n0",
        "-p",
        "no:cacheprovider",
        SCOPES,
        "--collective-scope-make=groups_of_suite:make",
    )

    run = run_torchrun(*arguments, world_size=2, cwd=tmp_path, env=WIDE, expect_exit=1)

    assert re.search(r"= 1 passed, 1 error in ", run.stdout)
    assert re.search(r"^ERROR test_suite.py::test_first - rank 1: OSError: the card is busy", run.stdout, re.MULTILINE)
    assert "KeyError" not in run.stdout
    assert ["test_second on 0", "test_second on 1"] == sorted(each.name for each in tmp_path.glob("* on *"))


def test_make_without_a_launcher_makes_a_group_of_one(tmp_path: Path) -> None:
    """A suite that leaves its group to the plugin runs in one process as well."""
    (tmp_path / "test_alone.py").write_text(
        "import torch.distributed as dist\ndef test_alone(): assert dist.get_world_size() == 1\n"
    )

    run = run_script("-m", "pytest", "-n0", "-p", "no:cacheprovider", SCOPES, MAKE, cwd=tmp_path)

    assert "1 passed" in run.stdout


def test_options_without_scopes_are_warned_of(tmp_path: Path) -> None:
    """An option that has no effect is a mistake: --collective-scope was forgotten."""
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")

    run = run_script("-m", "pytest", "-n0", "-p", "no:cacheprovider", MAKE, cwd=tmp_path)

    assert "--collective-scope-make without --collective-scope: no test runs in a scope" in run.stdout
    assert "1 passed, 1 warning" in run.stdout
