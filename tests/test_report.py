"""The sentences that users read: the fact first, ranks sorted and folded, guesses marked as such."""

from __future__ import annotations

import pytest

from collective_scope import _report
from collective_scope._cleanups import Cleanup
from collective_scope._outcome import OK, Outcome, Verdict


def _failed(message: str = "no", *, order: int = 1, phase: str = "body", also: tuple[str, ...] = ()) -> Outcome:
    trace = f'Traceback (most recent call last):\n  File "t.py", line 1, in f\nValueError: {message}\n'
    return Outcome(phase, "ValueError", message, trace, order, also)


def _first(text: str) -> str:
    return text.splitlines()[0]


# Failed peers


def test_peers_failed_one_rank_is_told_with_its_traceback() -> None:
    """The first line names rank, scope and error; who arrived and the traceback follow."""
    verdict = Verdict("ep4", 0, 4, outcomes={0: OK, 1: _failed("12 / 4096"), 2: OK, 3: OK})

    assert _report.peers_failed(verdict).splitlines() == [
        "rank 1 of 4 failed in scope 'ep4': ValueError: 12 / 4096",
        "  arrived:  1 (body failed: ValueError: 12 / 4096)",
        "            0, 2, 3 (ok)",
        "  rank 1, body:",
        "    Traceback (most recent call last):",
        '      File "t.py", line 1, in f',
        "    ValueError: 12 / 4096",
    ]


def test_peers_failed_several_ranks_are_sorted_and_the_first_failure_is_told() -> None:
    """Failed ranks are listed by number; the failure that was published first is the one that is quoted."""
    outcomes = {0: OK, 1: _failed("late", order=3), 2: _failed("later", order=4), 3: _failed("early", order=2)}
    text = _report.peers_failed(Verdict("ep4", 0, 4, outcomes=outcomes))

    assert _first(text) == "ranks 1, 2 and 3 of 4 failed in scope 'ep4', rank 3 first: ValueError: early"
    assert text.endswith("ValueError: early")


def test_peers_failed_in_a_later_scope_of_the_group_puts_the_first_failure_first() -> None:
    """Failures are counted over the life of a group; a high number is still before a rank that failed in no order."""
    outcomes = {0: OK, 1: _failed("stopped waiting", order=0, phase="barrier"), 2: _failed("the cause", order=17)}
    text = _report.peers_failed(Verdict("ep4", 9, 3, outcomes=outcomes))

    assert "rank 2 first: ValueError: the cause" in _first(text)
    assert text.splitlines()[1].startswith("  arrived:  2 (body failed: ")


def test_peers_failed_later_errors_of_a_rank_follow_its_first() -> None:
    """What else went wrong on a rank is in its line."""
    outcomes = {0: OK, 1: _failed("no", also=("cleanup 'a': KeyError: 1", "cleanup 'b': KeyError: 2"))}

    assert (
        "  arrived:  1 (body failed: ValueError: no; then cleanup 'a': KeyError: 1; cleanup 'b': KeyError: 2)"
        in _report.peers_failed(Verdict("ep4", 0, 2, outcomes=outcomes)).splitlines()
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        # What torch 2.13 and 2.11, gloo, NCCL and UCX say when a peer is gone or has given up.
        pytest.param(
            "RuntimeError", "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1", id="gloo"
        ),
        pytest.param("RuntimeError", "Read error [127.0.0.1]:1: Connection reset by peer", id="gloo-reset"),
        pytest.param("RuntimeError", "Timed out waiting 1800000ms for recv operation to complete", id="gloo-timeout"),
        pytest.param(
            "torch.distributed.DistBackendError",
            "NCCL error: remote process exited or there was a network error",
            id="nccl",
        ),
        pytest.param("torch.distributed.DistBackendError", "NCCL communicator was aborted on rank 1", id="nccl-abort"),
        pytest.param(
            "torch.distributed.DistNetworkError",
            "failed to recv, got 0 bytes. Connection was likely closed",
            id="store",
        ),
        pytest.param("BrokenPipeError", "[Errno 32] Broken pipe", id="pipe"),
        pytest.param("queue.Empty", "timeout", id="queue"),
        pytest.param("mpi4py.MPI.Exception", "MPIX_ERR_REVOKED: Communication object revoked", id="mpi"),
        pytest.param("collective_scope.exceptions.PeerFailedError", "rank 1 of 2 failed", id="inner-scope"),
    ],
)
def test_peers_failed_error_after_the_first_that_speaks_of_a_peer_is_likely_a_consequence(
    kind: str, message: str
) -> None:
    """Cause before consequence: the first failure is never marked, a later one is where its words are those of a lost peer."""
    outcomes = {
        0: Outcome("body", kind, message, "", 2),
        1: Outcome("body", kind, message, "", 1),
        2: Outcome("body", "ValueError", "my own", "", 3),
        3: Outcome("body", "AssertionError", "assert 'Timed out' in text", "", 4),
    }
    lines = _report.peers_failed(Verdict("ep4", 0, 4, outcomes=outcomes)).splitlines()

    assert [
        f"  arrived:  1 (body failed: {kind}: {message})",
        f"            0 (body failed: {kind}: {message}; likely a consequence)",
        "            2 (body failed: ValueError: my own)",
        "            3 (body failed: AssertionError: assert 'Timed out' in text)",
    ] == lines[1:5]


def test_lost_rank_makes_the_first_failure_likely_a_consequence() -> None:
    """When a process is gone, what its peers say of closed connections came after that."""
    outcomes = {0: Outcome("body", "RuntimeError", "Connection closed by peer", "", 1), 2: _failed("my own", order=2)}
    lines = _report.lost(Verdict("ep4", 0, 3, outcomes=outcomes, lost=[1], timeout=0.2)).splitlines()

    assert [
        "  arrived:  0 (body failed: RuntimeError: Connection closed by peer; likely a consequence)",
        "            2 (body failed: ValueError: my own)",
    ] == lines[1:3]


def test_peers_failed_equal_errors_of_many_ranks_share_a_line() -> None:
    """A hundred ranks that failed alike are one line, consequences too."""
    outcomes = {0: _failed("the cause")} | {
        rank: Outcome("body", "RuntimeError", "Connection closed by peer", "", 1 + rank) for rank in range(1, 100)
    }
    lines = _report.peers_failed(Verdict("ep4", 0, 100, outcomes=outcomes)).splitlines()

    assert [
        "  arrived:  0 (body failed: ValueError: the cause)",
        "            1-99 (body failed: RuntimeError: Connection closed by peer; likely a consequence)",
    ] == lines[1:3]


def test_peers_failed_before_the_round_was_full_gives_the_reason() -> None:
    """A round that was ended for a reason says so beside the failure."""
    verdict = Verdict("ep4", 0, 2, outcomes={1: _failed()}, reason="rank 1 stopped waiting at the barrier")

    assert "  rank 1 stopped waiting at the barrier" in _report.peers_failed(verdict).splitlines()


def test_peers_failed_long_message_keeps_the_first_line_short() -> None:
    """A megabyte of message does not push the facts out of sight."""
    text = _report.peers_failed(Verdict("ep4", 0, 2, outcomes={0: OK, 1: _failed("x\n" * 10_000)}))

    assert len(_first(text)) < 350


# Missing ranks


def test_missing_rank_is_named_with_what_the_others_say() -> None:
    """The first line says who is missing, where, and since when; then who came, then a guess."""
    verdict = Verdict("ep4", 3, 4, outcomes={0: _failed(), 1: OK, 3: OK}, missing=[2], timeout=60.04)

    assert _report.missing(verdict).splitlines() == [
        "rank 2 of 4 missing at the exit of scope 'ep4' after 60.0 s",
        "  arrived:  0 (body failed: ValueError: no)",
        "            1, 3 (ok)",
        "  missing:  2",
        *f"  {_report.MISSING_ADVICE}".splitlines(),
    ]


def test_missing_rank_that_told_its_failure_is_told_apart() -> None:
    """A rank that failed and is still cleaning up has told something, and has not arrived."""
    verdict = Verdict("ep4", 3, 2, outcomes={0: OK, 1: _failed()}, missing=[1], timeout=30.0)
    lines = _report.missing(verdict).splitlines()

    assert "  arrived:  0 (ok)" in lines
    assert "  told:     1 (body failed: ValueError: no)" in lines
    assert 4 + _report.MISSING_ADVICE.count("\n") + 1 == len(lines)


def test_missing_reason_replaces_the_advice() -> None:
    """What is known takes the place of what is guessed."""
    text = _report.missing(Verdict("ep4", 3, 2, outcomes={0: OK}, missing=[1], timeout=1.0, reason="It is frozen."))

    assert text.endswith("\n  It is frozen.")
    assert _report.MISSING_ADVICE not in text


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        pytest.param("exit", "exit", id="exit"),
        pytest.param("exit 2", "exit", id="after-collective-cleanups"),
        pytest.param("entry", "entry", id="entry"),
    ],
)
def test_missing_at_any_stage_names_the_place(stage: str, place: str) -> None:
    """Users read of the entry and the exit, not of rounds."""
    verdict = Verdict("ep4", 0, 2, stage=stage, missing=[1], timeout=1.0)

    assert f"rank 1 of 2 missing at the {place} of scope 'ep4' after 1.0 s" == _first(_report.missing(verdict))


@pytest.mark.parametrize(
    ("missing", "who", "folded"),
    [
        pytest.param([3], "rank 3", "3", id="one"),
        pytest.param([1, 3], "ranks 1 and 3", "1, 3", id="two"),
        pytest.param([4, 5], "ranks 4 and 5", "4, 5", id="run-of-two"),
        pytest.param([0, 2, 3, 4, 9], "ranks 0, 2, 3, 4 and 9", "0, 2-4, 9", id="run-of-three"),
        pytest.param(
            list(range(0, 40, 2)),
            f"ranks {', '.join(map(str, range(0, 32, 2)))} and 4 more",
            f"{', '.join(map(str, range(0, 32, 2)))}, and 4 more",
            id="many",
        ),
        pytest.param(
            list(range(64)), f"ranks {', '.join(map(str, range(16)))} and 48 more", "0-63", id="many-in-a-row"
        ),
    ],
)
def test_missing_ranks_are_sorted_folded_and_capped(missing: list[int], who: str, folded: str) -> None:
    """However many ranks are missing, the text stays readable and says how many there are."""
    lines = _report.missing(Verdict("s", 0, 64, missing=missing, timeout=1.0)).splitlines()

    assert f"{who} of 64 missing at the exit of scope 's' after 1.0 s" == lines[0]
    assert f"  missing:  {folded}" in lines


def test_missing_in_a_subgroup_has_global_ranks() -> None:
    """Ranks of a subgroup come with what they are called in the default group."""
    verdict = Verdict("s", 0, 3, missing=[0, 2], timeout=1.0, global_ranks=[4, 5, 7])

    assert "ranks 0 (global rank 4) and 2 (global rank 7) of 3 missing" in _first(_report.missing(verdict))


# Lost ranks and the store


def test_lost_rank_is_named_before_missing_ones() -> None:
    """Who is known to be gone comes first; those of whom nothing is known are listed."""
    verdict = Verdict("ep4", 0, 3, outcomes={1: OK}, lost=[0], missing=[2], timeout=2.0, reason="The store is gone.")

    assert _report.lost(verdict).splitlines() == [
        "rank 0 of 3 lost at the exit of scope 'ep4' after 2.0 s",
        "  arrived:  1 (ok)",
        "  lost:     0",
        "  missing:  2",
        "  The store is gone.",
    ]


def test_lost_at_an_entry_says_that_the_body_was_not_run() -> None:
    """What arrived there is the rank, not its body."""
    lines = _report.lost(Verdict("ep4", 1, 2, stage="entry", outcomes={1: OK}, lost=[0], timeout=0.1)).splitlines()

    assert "rank 0 of 2 lost at the entry of scope 'ep4' after 0.1 s" == lines[0]
    assert "  The body of this scope was not run." == lines[-1]


def test_lost_alone_says_only_that() -> None:
    """Without missing ranks or a reason, there is nothing more to say."""
    verdict = Verdict("ep4", 0, 2, outcomes={1: OK}, lost=[0], timeout=2.0)

    assert _report.lost(verdict).splitlines() == [
        "rank 0 of 2 lost at the exit of scope 'ep4' after 2.0 s",
        "  arrived:  1 (ok)",
        "  lost:     0",
    ]


@pytest.mark.parametrize(
    ("server", "error", "text"),
    [
        pytest.param(
            0, None, "The group's store (hosted by rank 0) has not answered for 1.5 s: its process is", id="frozen"
        ),
        pytest.param(
            None,
            RuntimeError("Connection\nreset"),
            "The group's store (hosted outside of the group) is gone: RuntimeError: Connection reset",
            id="gone",
        ),
    ],
)
def test_store_trouble_tells_who_hosted_it_and_what_it_did(
    server: int | None, error: Exception | None, text: str
) -> None:
    """Trouble with the store is told with its host, and without claims about the ranks."""
    assert _report.store_trouble(server, 1.5, error).startswith(text)


# Mismatches


def test_scopes_differ_groups_ranks_by_scope() -> None:
    """Ranks at different scopes are listed by scope, with the usual causes after the facts."""
    names = {0: ("a", 4), 1: ("b", 4), 2: ("a", 4), 3: ("a", 4)}
    lines = _report.scopes_differ(Verdict("a", 4, 4, names=names)).splitlines()

    assert lines[0] == "ranks arrived at different scopes"
    assert [line.strip() for line in lines[1:3]] == [
        "ranks:    0, 2, 3 (scope 'a', sequence 4)",
        "1 (scope 'b', sequence 4)",
    ]
    assert lines[3:] == f"  {_report.MISMATCH_ADVICE}".splitlines()


@pytest.mark.parametrize(
    ("agreed", "what"),
    [
        pytest.param((), "none of them ran", id="none"),
        pytest.param(("destroy", "free"), "what all share ran: destroy, free", id="some"),
    ],
)
def test_cleanups_differ_names_lists_and_fingerprints(agreed: tuple[str, ...], what: str) -> None:
    """Collective cleanups that differ are listed by rank, and it is said what was run."""
    cleanups = {0: (("destroy", "2"), ("free", "")), 1: (), 2: (("destroy", "2"), ("free", ""))}
    lines = _report.cleanups_differ(Verdict("ep4", 0, 3, cleanups=cleanups, agreed=agreed)).splitlines()

    assert lines[0] == f"ranks disagree on the collective cleanups of scope 'ep4'; {what}"
    assert [line.strip() for line in lines[1:]] == ["ranks:    0, 2 (destroy [2], free)", "1 (none)"]


# Logs and notes


def test_failed_here_names_rank_scope_and_phase() -> None:
    """The log line before a traceback says whose it is."""
    text = _report.failed_here(1, 4, "ep4", "cleanup 'free'")

    assert text.startswith("rank 1 of 4 failed in scope 'ep4', cleanup 'free'")


def test_attached_error_is_told_in_full() -> None:
    """A note about a later error has its phase, type and message."""
    assert "In addition, cleanup 'free': KeyError: 'key'" == _report.attached(KeyError("key"), "cleanup 'free'")


def test_skipped_cleanups_are_named_with_their_place() -> None:
    """A collective cleanup that nobody ran is told with the place of its registration."""
    cleanups = [Cleanup(print, name, f"t.py:{line}") for line, name in enumerate("ab")]

    assert _report.skipped(cleanups).endswith("cleanup 'a' (registered at t.py:0), cleanup 'b' (registered at t.py:1)")


def test_stopped_waiting_names_rank_and_signal() -> None:
    """Peers of an interrupted rank read who ended the wait, and why."""
    text = _report.stopped_waiting(2, KeyboardInterrupt())

    assert text == "rank 2 stopped waiting at the barrier: KeyboardInterrupt"


@pytest.mark.parametrize(
    ("missing", "who"), [pytest.param([1], "rank 1", id="one"), pytest.param([], "nobody", id="none")]
)
def test_waiting_rank_names_whom_it_waits_for(missing: list[int], who: str) -> None:
    """A soft warning says who waits, how long, and for whom."""
    text = _report.waiting(Verdict("ep4", 0, 2, outcomes={0: OK}, missing=missing), 0, 10.2)

    assert _first(text) == f"rank 0 has waited 10.2 s at the exit of scope 'ep4'; {who} of 2 missing"
    assert "  arrived:  0 (ok)" in text


def test_waiting_blindly_says_why_nobody_is_named() -> None:
    """Without an answer from the store, a soft warning says that instead of names."""
    text = _report.waiting_blindly("ep4", 0, 10.2, "the store does not answer")

    assert text == "rank 0 has waited 10.2 s in scope 'ep4'; the store does not answer, so nobody can be named"
