"""Runs each example as its reader would and checks what it prints."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.ranks import run_script


EXAMPLES = Path(__file__).parent.parent / "examples"
PNG = b"\x89PNG"


def lines_of(example: str) -> list[str]:
    """Run an example; it must exit with 0 and leave nothing on stderr."""
    result = run_script(EXAMPLES / example, timeout=120)
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_hello_scope_slow_rank_keeps_the_fast_one() -> None:
    """No rank leaves before every rank has cleaned up."""
    # Of two ranks that print at once, the ends of lines may come late.
    events = re.findall(r"rank \d (?:cleans up|has left)", "\n".join(lines_of("hello_scope.py")))

    assert {"rank 0 cleans up", "rank 1 cleans up"} == set(events[:2])
    assert {"rank 0 has left", "rank 1 has left"} == set(events[2:])


def test_decorated_worker_shared_folder_is_removed_after_the_barrier() -> None:
    """Each call is a scope, and the folder outlives all writers."""
    assert ["4 shards, folder still there: True", "6 shards, folder still there: True"] == lines_of(
        "decorated_worker.py"
    )


def test_failing_rank_costs_one_subtest_and_no_process() -> None:
    """Each rank gets its own error, the report has the cause first, and the group is made again once."""
    lines = lines_of("failing_rank.py")
    text = "\n".join(lines)

    # Of two ranks that print at once, the ends of lines may come late.
    marks = re.findall(r"(value-\d+) (PASSED|FAILED)", text)
    assert marks == [("value-10", "PASSED"), ("value-20", "FAILED"), ("value-30", "PASSED")]
    cause, where = lines[lines.index("FAILED value-20") + 1 :][:2]
    assert cause == "  rank 1, body: ValueError: no room for 20"
    assert re.fullmatch(r"    .*failing_rank\.py:\d+", where)
    assert re.search(r"^2 passed, 1 failed in ", text, re.MULTILINE)
    assert "[rank 1] ValueError" in text
    assert text.count("[rank 0] ") == 2  # an error of gloo's, whose name is not promised
    for rank in (0, 1):
        assert f"[rank {rank}] the group was made 2 times" in text


def test_straggler_is_located_by_its_peer_and_freed() -> None:
    """The peer's error names the stuck rank, its phase, and its line; the stuck rank has the same as a note."""
    text = "\n".join(lines_of("straggler.py"))
    # Each begins with the name of its rank, in whatever order.
    messages = re.split(r"^(?=\[rank \d\] )", text, flags=re.MULTILINE)
    late = r"rank 1 of 2 missing at the exit of scope 'combine' after [4-8]\.\d s"  # the timeout, and 5 s

    [warning, *_] = [each for each in messages if each.startswith("[rank 0] rank 0 has waited ")]
    [error] = [each for each in messages if re.match(rf"\[rank 0\] BarrierTimeoutError: {late}", each)]
    [freed] = [each for each in messages if each.startswith("[rank 1] was freed: ")]
    assert re.search(f"BarrierTimeoutError: {late}", freed)
    for told in (warning, error, freed):
        assert "in the body of scope 'combine' for " in told
        assert "dist.all_reduce(value)" in told


def test_weak_cache_hangs_as_the_pull_request_ends_it_and_passes_with_hold() -> None:
    """The deadlock is real: with a barrier in ``finally`` both ranks hang, each in another call."""
    variants = ("--variant", "pull_request", "--variant", "scope_hold")
    run = run_script(EXAMPLES / "weak_cache_deadlock.py", *variants, "--deadline", "8", timeout=120)

    assert re.search(r"1 x hung +rank 0 in destroy, rank 1 in barrier$", run.stdout, re.MULTILINE), run.stdout
    assert re.search(r"1 x passed +$", run.stdout, re.MULTILINE), run.stdout


def test_trace_a_run_has_straggler_failure_and_renewal_in_one_track_a_rank(tmp_path: Path) -> None:
    """Peers are in the body of the failed subtest until they are freed; matplotlib, if there, draws a picture of it."""
    trace, pictures = tmp_path / "run.json", [tmp_path / "run.png"] * (find_spec("matplotlib") is not None)
    run = run_script(EXAMPLES / "trace_a_run.py", trace, *pictures, timeout=120)

    bodies: dict[tuple[str, int], tuple[float, float]] = {}
    made: dict[int, list[float]] = defaultdict(list)
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") == "body":
            bodies[event["name"], event["pid"]] = (event["ts"], event["ts"] + event["dur"])
        elif event.get("cat") == "renewal":
            made[event["pid"]].append(event["ts"])
    slow_ends, failing_ends = ([bodies[name, rank][1] for rank in range(4)] for name in ("slow", "fails"))
    assert slow_ends.index(max(slow_ends)) == 2
    assert failing_ends.index(min(failing_ends)) == 1
    for rank in range(4):
        _, renewed = made[rank]
        assert failing_ends[rank] < renewed < bodies["sum-2", rank][0]
    assert "  rank 1, body: ValueError: shapes differ" in run.stdout.splitlines()
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)


def test_picture_of_the_readme_is_small() -> None:
    """It is a PNG that does not slow a page down."""
    picture = (EXAMPLES / "run.png").read_bytes()

    assert picture.startswith(PNG)
    assert len(picture) < 150_000


def test_index_of_examples_names_each_of_them() -> None:
    """Every link of the index leads to a file, and no example is without a question."""
    text = (EXAMPLES / "README.md").read_text()
    linked = {EXAMPLES / link for link in re.findall(r"\]\(([^)]+)\)", text)}
    examples = {path for path in EXAMPLES.glob("*.py") if path.name != "__init__.py"}

    assert [str(path) for path in linked if not path.exists()] == []
    assert examples | {EXAMPLES / "test_moe_layer", EXAMPLES / "pool" / "pool.py"} <= linked


VLLM_PYTHON = os.environ.get("COLLECTIVE_SCOPE_VLLM_PYTHON", "")
"""The Python of the environment with vLLM; the docstring of the example says how to make one."""


@pytest.mark.skipif(not VLLM_PYTHON, reason="needs vLLM: COLLECTIVE_SCOPE_VLLM_PYTHON is not set")
def test_vllm_whose_rank_fails_in_one_configuration_has_right_verdicts_in_all() -> None:
    """Functions of vLLM make its model-parallel state, again after the failure; its layer is right afterwards."""
    result = run_script(EXAMPLES / "vllm_moe_layer.py", python=VLLM_PYTHON, timeout=300.0)

    for rank in (0, 1):
        [line] = [each for each in result.stdout.splitlines() if each.startswith(f"[rank {rank}] ")]
        made = re.fullmatch(r".* 12 of 12 verdicts right; vLLM's groups made in (.*) s, destroyed in .*", line)
        assert made is not None
        assert 2 == len(made[1].split(", "))
    assert "  rank 1, body: ValueError: injected before the collectives" in result.stdout.splitlines()
    assert "11 passed, 1 failed in " in result.stdout
