"""The sentences that users read: the fact first, ranks sorted and folded, guesses marked as such."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from collective_scope import Outcome, Verdict, _notes, _report
from collective_scope._cleanups import Cleanup
from collective_scope.agreement.process import Place, Process
from collective_scope.agreement.records import AFTER_REVOCATION, OK


def _failed(message: str = "no", *, order: int = 1, phase: str = "body", also: tuple[str, ...] = ()) -> Outcome:
    trace = f'Traceback (most recent call last):\n  File "t.py", line 1, in f\nValueError: {message}\n'
    return Outcome(phase, "ValueError", message, trace, order, also)


def _verdict(world_size: int, *, scope: str = "ep4", **facts: Any) -> Verdict:
    """Return a verdict in which those that are in no other list have arrived."""
    absent = {*facts.get("missing", ()), *facts.get("lost", ())}
    arrived = tuple(rank for rank in range(world_size) if rank not in absent)
    return Verdict(scope, world_size, **{"arrived": arrived, **facts})


def _first(text: str) -> str:
    return text.splitlines()[0]


# Failed peers


def test_peers_failed_one_rank_is_told_with_its_traceback() -> None:
    """The first line names rank, scope and error; who arrived and the traceback follow."""
    verdict = _verdict(4, outcomes={0: OK, 1: _failed("12 / 4096"), 2: OK, 3: OK})

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
    text = _report.peers_failed(_verdict(4, outcomes=outcomes))

    assert _first(text) == "ranks 1, 2 and 3 of 4 failed in scope 'ep4', rank 3 first: ValueError: early"
    assert text.endswith("ValueError: early")


def test_peers_failed_in_a_later_scope_of_the_group_puts_the_first_failure_first() -> None:
    """Failures are counted over the life of a group; a high number is still before a rank that failed in no order."""
    outcomes = {0: OK, 1: _failed("stopped waiting", order=0, phase="barrier"), 2: _failed("the cause", order=17)}
    text = _report.peers_failed(_verdict(3, outcomes=outcomes))

    assert "rank 2 first: ValueError: the cause" in _first(text)
    assert text.splitlines()[1].startswith("  arrived:  2 (body failed: ")


def test_peers_failed_later_errors_of_a_rank_follow_its_first() -> None:
    """Later errors of a rank are in its line."""
    outcomes = {0: OK, 1: _failed("no", also=("cleanup 'a': KeyError: 1", "cleanup 'b': KeyError: 2"))}

    assert (
        "  arrived:  1 (body failed: ValueError: no; then cleanup 'a': KeyError: 1; cleanup 'b': KeyError: 2)"
        in _report.peers_failed(_verdict(2, outcomes=outcomes)).splitlines()
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        # Texts of torch 2.13 and 2.11, gloo, NCCL and UCX when a peer is gone or has given up.
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
        pytest.param("queue.Empty", "timeout", id="queue"),
        pytest.param("mpi4py.MPI.Exception", "MPIX_ERR_REVOKED: Communication object revoked", id="mpi"),
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
    lines = _report.peers_failed(_verdict(4, outcomes=outcomes)).splitlines()

    assert [
        f"  arrived:  1 (body failed: {kind}: {message})",
        f"            0 (body failed: {kind}: {message}; likely a consequence)",
        "            2 (body failed: ValueError: my own)",
        "            3 (body failed: AssertionError: assert 'Timed out' in text)",
    ] == lines[1:5]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("RuntimeError", "Connection closed by peer [::1]:1", id="gloo"),
        pytest.param("RuntimeError", "Read error [127.0.0.1]:1: Connection reset by peer", id="gloo-reset"),
        pytest.param("BrokenPipeError", "[Errno 32] Broken pipe", id="pipe"),
        pytest.param("collective_scope.RevokedInterrupt", "ended at a.py:3, in f", id="interrupt"),
    ],
)
def test_peers_failed_error_over_a_closed_connection_is_listed_after_what_closed_it(kind: str, message: str) -> None:
    """A rank that closes its connections on its way out is heard of by its peers before it can tell why."""
    outcomes = {0: Outcome("body", kind, message, "", 1), 1: _failed("the cause", order=2)}
    lines = _report.peers_failed(_verdict(3, outcomes=outcomes)).splitlines()

    assert lines[0].endswith("rank 1 first: ValueError: the cause")
    assert [
        "  arrived:  1 (body failed: ValueError: the cause)",
        f"            0 (body failed: {kind}: {message}; likely a consequence)",
    ] == lines[1:3]


def test_peers_failed_error_of_gloo_is_told_without_its_place_and_its_guess() -> None:
    """Gloo names a line of its own source, and guesses that a process has crashed, which it has not."""
    message = (
        "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1."
        " This is typically caused by a remote worker crashing. Check the logs of the remote worker."
    )
    phase = f"body{AFTER_REVOCATION}"
    lines = _report.peers_failed(_verdict(2, outcomes={0: Outcome(phase, "RuntimeError", message)})).splitlines()

    told = "body failed, after the group was revoked: RuntimeError: Connection closed by peer"
    assert f"  arrived:  0 ({told})" == lines[1]


def test_peers_failed_error_that_passes_on_another_is_listed_after_it() -> None:
    """A rank may tell of a failure in a scope within before the rank that failed has told of it."""
    kind = "collective_scope.exceptions.PeerFailedError"
    outcomes = {
        0: Outcome("body", kind, "rank 1 of 2 failed", "", 1),
        1: Outcome("body", "ValueError", "my own", "", 2),
    }
    lines = _report.peers_failed(_verdict(2, outcomes=outcomes)).splitlines()

    assert "rank 1 first" in lines[0]
    assert [
        "  arrived:  1 (body failed: ValueError: my own)",
        f"            0 (body failed: {kind}: rank 1 of 2 failed; likely a consequence)",
    ] == lines[1:3]


def test_lost_rank_makes_the_first_failure_likely_a_consequence() -> None:
    """When a process is gone, what its peers say of closed connections came after that."""
    outcomes = {0: Outcome("body", "RuntimeError", "Connection closed by peer", "", 1), 2: _failed("my own", order=2)}
    lines = _report.lost(_verdict(3, outcomes=outcomes, lost=(1,), timeout=0.2)).splitlines()

    assert [
        "  arrived:  2 (body failed: ValueError: my own)",
        "            0 (body failed: RuntimeError: Connection closed by peer; likely a consequence)",
    ] == lines[1:3]


def test_peers_failed_equal_errors_of_many_ranks_share_a_line() -> None:
    """A hundred ranks that failed alike are one line, consequences too."""
    outcomes = {0: _failed("the cause")} | {
        rank: Outcome("body", "RuntimeError", "Connection closed by peer", "", 1 + rank) for rank in range(1, 100)
    }
    lines = _report.peers_failed(_verdict(100, outcomes=outcomes)).splitlines()

    assert [
        "  arrived:  0 (body failed: ValueError: the cause)",
        "            1-99 (body failed: RuntimeError: Connection closed by peer; likely a consequence)",
    ] == lines[1:3]


def test_peers_failed_before_the_round_was_full_gives_the_reason() -> None:
    """A round that was ended for a reason says so beside the failure."""
    verdict = _verdict(2, outcomes={1: _failed()}, reason="rank 1 stopped waiting at the barrier")

    assert (
        "  The wait ended early: rank 1 stopped waiting at the barrier." in _report.peers_failed(verdict).splitlines()
    )


def test_peers_failed_long_message_keeps_the_first_line_short() -> None:
    """A megabyte of message does not push the facts out of sight."""
    text = _report.peers_failed(_verdict(2, outcomes={0: OK, 1: _failed("x\n" * 10_000)}))

    assert len(_first(text)) < 350


def test_peers_failed_in_a_scope_around_this_one_names_that() -> None:
    """A failure around a scope is told with the place at which it happened."""
    facts = {"scope": "inner", "outcomes": {0: OK, 1: _failed(), 2: _failed(order=2)}, "missing": (1, 2)}
    (one, some) = (
        _report.peers_failed(_verdict(3, outside=outside, **facts)) for outside in ({1: "a", 2: "a"}, {1: "a"})
    )

    assert _first(one) == "ranks 1 and 2 of 3 failed in scope 'a', around scope 'inner', rank 1 first: ValueError: no"
    assert _first(some).startswith("ranks 1 and 2 of 3 failed in scope 'inner' or scope 'a' around it, rank 1 first: ")


def test_peers_failed_by_a_skip_reads_as_one() -> None:
    """A test that only some ranks skip is told as that, without a traceback."""
    skip = Outcome("body", "unittest.case.SkipTest", "no GPU", "Traceback ...", 1)

    assert _report.peers_failed(_verdict(2, outcomes={0: OK, 1: skip})).splitlines() == [
        "rank 1 of 2 skipped and its peers did not, in scope 'ep4': unittest.case.SkipTest: no GPU",
        "  arrived:  1 (body skipped: unittest.case.SkipTest: no GPU)",
        "            0 (ok)",
    ]


# Missing ranks


def test_missing_rank_is_named_with_what_the_others_say() -> None:
    """The first line says who is missing, where, since when, and the cause; then who came, then a guess."""
    verdict = _verdict(4, outcomes={0: _failed(), 1: OK, 3: OK}, missing=(2,), timeout=60.04)

    assert _report.missing(verdict).splitlines() == [
        "rank 2 of 4 missing at the exit of scope 'ep4' after 60.0 s; before that, rank 0 failed: ValueError: no",
        "  arrived:  0 (body failed: ValueError: no)",
        "            1, 3 (ok)",
        "  missing:  2",
        *f"  {_report.MISSING_ADVICE}".splitlines(),
    ]


def test_missing_rank_that_told_its_failure_is_told_apart() -> None:
    """A rank that failed and is still cleaning up has told something, and has not arrived."""
    verdict = _verdict(2, outcomes={0: OK, 1: _failed()}, missing=(1,), timeout=30.0)
    lines = _report.missing(verdict).splitlines()

    assert "  arrived:  0 (ok)" in lines
    assert "  told:     1 (body failed: ValueError: no)" in lines
    assert 4 + _report.MISSING_ADVICE.count("\n") + 1 == len(lines)


def test_missing_reason_replaces_the_advice() -> None:
    """A known reason takes the place of a guess."""
    text = _report.missing(_verdict(2, outcomes={0: OK}, missing=(1,), timeout=1.0, reason="the store is frozen"))

    assert text.endswith("\n  The store is frozen.")
    assert _report.MISSING_ADVICE not in text


def test_missing_at_an_entry_says_that_the_body_was_not_run() -> None:
    """A rank that refuses a body says so, and why there was something to wait for."""
    lines = _report.missing(_verdict(2, stage="entry", missing=(1,), timeout=1.0)).splitlines()

    assert "  The body of this scope was not run. Not every rank has left the scope before it." == lines[-1]


def test_no_rank_missing_and_no_agreement_is_not_called_missing() -> None:
    """Where the wait ended although no rank is known to be missing, the reason is all there is."""
    text = _report.missing(_verdict(2, outcomes={0: OK, 1: OK}, timeout=3.0, reason="rank 0 gave up"))

    assert text.splitlines() == [
        "no agreement at the exit of scope 'ep4' after 3.0 s",
        "  arrived:  0, 1 (ok)",
        "  Rank 0 gave up.",
    ]


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
    verdict = _verdict(2, stage=stage, missing=(1,), timeout=1.0)

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
    lines = _report.missing(_verdict(64, scope="s", missing=missing, timeout=1.0)).splitlines()

    assert f"{who} of 64 missing at the exit of scope 's' after 1.0 s" == lines[0]
    assert f"  missing:  {folded}" in lines


def test_missing_in_a_subgroup_has_global_ranks() -> None:
    """Ranks of a subgroup come with what they are called in the default group."""
    verdict = _verdict(3, scope="s", missing=(0, 2), timeout=1.0, global_ranks=(4, 5, 7))

    assert "ranks 0 (global rank 4) and 2 (global rank 7) of 3 missing" in _first(_report.missing(verdict))


# Lost ranks and the store


def test_lost_rank_is_named_before_missing_ones() -> None:
    """Ranks known to be gone come first. Those of which nothing is known are listed."""
    verdict = _verdict(3, outcomes={1: OK}, lost=(0,), missing=(2,), timeout=2.0, reason="the store is gone")

    assert _report.lost(verdict).splitlines() == [
        "rank 0 of 3 lost at the exit of scope 'ep4' after 2.0 s",
        "  arrived:  1 (ok)",
        "  lost:     0",
        "  missing:  2",
        "  The store is gone.",
    ]


def test_lost_at_an_entry_says_that_the_body_was_not_run() -> None:
    """The rank arrived there, not its body."""
    lines = _report.lost(_verdict(2, stage="entry", outcomes={1: OK}, lost=(0,), timeout=0.1)).splitlines()

    assert "rank 0 of 2 lost at the entry of scope 'ep4' after 0.1 s" == lines[0]
    assert "  The body of this scope was not run." == lines[-1]


def test_lost_rank_whose_process_has_ended_and_told_nothing_may_have_told_its_stderr() -> None:
    """A process that torch aborts tells no peer why; where to look comes last."""
    where = {0: Place(_HERE, "exited (killed by SIGABRT)")}
    lost = _report.lost(_verdict(2, outcomes={1: OK}, lost=(0,), where=where, timeout=0.2))
    told = _report.lost(_verdict(2, outcomes={0: _failed("why"), 1: OK}, lost=(0,), where=where, timeout=0.2))

    assert lost.endswith(f"\n  {_report.LOST_ADVICE}")
    assert _report.LOST_ADVICE not in told


def test_lost_alone_says_only_that() -> None:
    """Without missing ranks or a reason, there is nothing more to say."""
    verdict = _verdict(2, outcomes={1: OK}, lost=(0,), timeout=2.0)

    assert _report.lost(verdict).splitlines() == [
        "rank 0 of 2 lost at the exit of scope 'ep4' after 2.0 s",
        "  arrived:  1 (ok)",
        "  lost:     0",
    ]


# Places


_HERE = Process("host", 7)
_FRAMES = '  File "t.py", line 1, in test\n    dist.all_reduce(x)\n'


@pytest.mark.parametrize(
    ("place", "text"),
    [
        pytest.param(
            Place(_HERE, "sleeping", "0 s", "in the body of scope 's'", 1.5),
            "host pid 7, in the body of scope 's' for 1.5 s (sleeping)",
            id="in-a-scope",
        ),
        pytest.param(
            Place(_HERE, "running", phase="has destroyed its group after scope 's'"),
            "host pid 7, has destroyed its group after scope 's' (running)",
            id="last-word",
        ),
        pytest.param(
            Place(_HERE, "running", silence=2.0),
            "host pid 7, no answer for 2.0 s (running); its interpreter is held by native code,"
            " or the machine cannot be reached",
            id="no-answer",
        ),
        pytest.param(Place(_HERE, "running", silence=0.2), "host pid 7 (running)", id="asked-a-moment-ago"),
        pytest.param(Place(_HERE, "stopped", silence=2.0), "host pid 7, no answer for 2.0 s (stopped)", id="stopped"),
        pytest.param(
            Place(_HERE, "exited (killed by SIGKILL)", silence=2.0), "host pid 7, exited (killed by SIGKILL)", id="dead"
        ),
    ],
)
def test_missing_rank_is_shown_where_it_is(place: Place, text: str) -> None:
    """Facts about a missing rank are in its line. A guess is there only where nothing else explains the silence."""
    where = {1: attrs.evolve(place, frames=_FRAMES), 2: place}
    lines = _report.missing(_verdict(4, missing=(1, 2, 3), where=where, timeout=1.0, reason="over")).splitlines()

    assert lines[-6:-1] == [
        "  missing:  3",
        f"            1  {text}",
        f"              {_FRAMES.splitlines()[0]}",
        f"              {_FRAMES.splitlines()[1]}",
        f"            2  {text}",
    ]


# Mismatches


def test_scopes_differ_groups_ranks_by_scope() -> None:
    """Ranks at different scopes are listed by scope, with the usual causes after the facts."""
    names = {0: "a", 1: "b", 2: "a", 3: "a"}
    lines = _report.scopes_differ(_verdict(4, names=names)).splitlines()

    assert lines[0] == "ranks arrived at different scopes"
    assert ["ranks:    0, 2, 3 (scope 'a')", "1 (scope 'b')"] == [line.strip() for line in lines[1:3]]
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
    lines = _report.cleanups_differ(_verdict(3, cleanups=cleanups, agreed=agreed)).splitlines()

    assert lines[0] == f"ranks disagree on the collective cleanups of scope 'ep4'; {what}"
    assert [line.strip() for line in lines[1:]] == ["ranks:    0, 2 (destroy [2], free)", "1 (none)"]


# Logs and notes


@pytest.mark.parametrize(
    ("rank", "world_size", "phase", "text"),
    [
        pytest.param(1, 4, "cleanup 'free'", "rank 1 of 4 failed in scope 'ep4', cleanup 'free'; its peers are told"),
        pytest.param(0, 1, "body", "scope 'ep4' failed, body"),
        pytest.param(
            1,
            4,
            "after_barrier 'free'",
            "rank 1 of 4 failed in scope 'ep4', after_barrier 'free'; after the barrier, so its peers are not told",
        ),
    ],
    ids=["with-peers", "alone", "after-the-barrier"],
)
def test_failed_here_names_rank_scope_and_phase(rank: int, world_size: int, phase: str, text: str) -> None:
    """The log line before a traceback says whose it is, and speaks of peers only where they are told."""
    assert text == _notes.failed_here(rank, world_size, "ep4", phase)


@pytest.mark.parametrize(
    ("in_full", "text"),
    [
        (True, "In addition, cleanup 'free': ValueError: two\nlines"),
        (False, "In addition, cleanup 'free': ValueError: two lines"),
    ],
)
def test_attached_error_has_phase_type_and_message(text: str, *, in_full: bool) -> None:
    """A note about a later error tells it in full, or in a line where it has been told before."""
    assert text == _notes.attached(ValueError("two\nlines"), "cleanup 'free'", in_full=in_full)


def test_skipped_cleanups_are_named_with_their_place() -> None:
    """A cleanup not run is told with the place of its registration, and what becomes of it."""
    cleanups = [Cleanup(print, name, f"t.py:{line}") for line, name in enumerate("ab")]
    text = _notes.skipped(cleanups)

    assert "cleanup 'a' (registered at t.py:0), cleanup 'b' (registered at t.py:1)" in text
    assert text.endswith("kept alive until the process ends.")


def test_scope_left_out_of_order_says_what_happened_and_the_rule() -> None:
    """Misnesting is told with what was wrong, the rule, and the usual causes."""
    lines = _notes.left_out_of_order("ep4", "by another thread").splitlines()

    assert "scope 'ep4' was left by another thread" == lines[0]
    assert "Scopes are left in the reverse order" in lines[1]


# While there is still time


def _place(phase: str = "in the body of scope 'ep4'", frames: str = _FRAMES) -> Place:
    return Place(_HERE, "sleeping", "0 ep4", phase, 10.0, frames)


def test_late_ranks_are_told_in_full_once_and_then_in_few_words() -> None:
    """The first warning has places and stacks; the next says that nothing has changed, and a later one what has."""
    said: dict[int, str] = {}
    facts = _verdict(3, outcomes={0: OK}, missing=(1, 2), where={1: _place(), 2: _place()})
    # A rank that polls runs at one look and sleeps at another.
    moved = attrs.evolve(
        facts, where={1: attrs.evolve(_place(), state="running"), 2: _place("outside of any scope", "")}
    )
    first, second, third = (
        _report.late(attrs.evolve(facts, timeout=seconds), 0, 300 - seconds, said).splitlines()
        for facts, seconds in ((facts, 10.2), (facts, 30.2), (moved, 60.2))
    )

    assert "rank 0 has waited 10.2 of 300.0 s at the exit of scope 'ep4'; ranks 1 and 2 of 3 missing" == first[0]
    assert "  arrived:  0 (ok)" == first[1]
    assert 2 == "\n".join(first).count("dist.all_reduce(x)")
    assert second == [
        "rank 0 has waited 30.2 of 300.0 s at the exit of scope 'ep4'; ranks 1 and 2 of 3 still missing",
        "  ranks 1 and 2: still where they were",
    ]
    assert third == [
        "rank 0 has waited 60.2 of 300.0 s at the exit of scope 'ep4'; ranks 1 and 2 of 3 still missing",
        "  missing:  2  host pid 7, outside of any scope for 10.0 s (sleeping)",
        "  rank 1: still where it was",
    ]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (attrs.evolve(_place(), state="gone"), "host pid 7, gone"),
        (attrs.evolve(_place(), state="stopped"), "host pid 7, in the body of scope 'ep4' for 10.0 s (stopped)"),
        (Place(_HERE, "", silence=3.0), "host pid 7, no answer for 3.0 s"),
    ],
    ids=["gone", "stopped", "elsewhere"],
)
@pytest.mark.parametrize("before", [{}, {1: _place()}], ids=["unknown", "sleeping"])
def test_late_rank_that_ends_or_stops_or_becomes_known_is_told_in_full_again(
    before: dict[int, Place], place: Place, text: str
) -> None:
    """A rank is still where it was only if what was told of it holds."""
    said: dict[int, str] = {}
    facts = _verdict(2, outcomes={0: OK}, missing=(1,))
    _, second = (_report.late(attrs.evolve(facts, where=where), 0, 300, said) for where in (before, {1: place}))

    assert text in second
    assert "still where it was" not in second


def test_late_while_all_work_says_that_no_rank_has_come_and_where_all_are() -> None:
    """When every rank is stuck in its body, the one that speaks lists itself among the others."""
    facts = _verdict(2, arrived=(), missing=(0, 1), timeout=10.0, where=dict.fromkeys((0, 1), _place(frames="")))

    assert _report.late(facts, 0, None, {}).splitlines() == [
        "no rank of 2 has come to the exit of scope 'ep4' for 10.0 s",
        "  where:    0  host pid 7, in the body of scope 'ep4' for 10.0 s (sleeping)",
        "            1  host pid 7, in the body of scope 'ep4' for 10.0 s (sleeping)",
        f"  {_report.UNLIMITED_ADVICE}",
    ]


def test_late_while_all_work_says_when_that_ends_if_it_does() -> None:
    """A scope with a limit says it, the first time; no rank has one for a wait, which the first line bounds."""
    said: dict[int, str] = {}
    facts = _verdict(2, arrived=(), missing=(0, 1), timeout=10.0, where=dict.fromkeys((0, 1), _place()))
    first, second = (_report.late(facts, 0, None, said, 60.0) for _ in range(2))

    assert first.endswith("\n  kill_after ends this 60.0 s after the entry.")
    assert "kill_after" not in second
    assert "kill_after" not in _report.late(facts, 0, 5.0, {}, 60.0)


def test_late_while_all_work_in_different_scopes_says_so() -> None:
    """Ranks that are stuck in bodies of different scopes never come to a barrier that could tell; an inner scope is none."""
    where = {
        rank: attrs.evolve(_place(frames=""), scope=scope) for rank, scope in enumerate(["0 ep4", "0 ep4/0 in", "1 b"])
    }
    facts = _verdict(3, arrived=(), missing=(0, 1, 2), where=where)
    within = attrs.evolve(facts, where={0: where[0], 1: where[1]})

    apart = f"  The ranks are in different scopes. {_report.MISMATCH_ADVICE}"
    assert _report.late(facts, 0, None, {}).endswith(apart)
    assert "different scopes" not in _report.late(within, 0, None, {})


def test_gone_rank_is_told_to_one_in_its_body_with_what_became_of_it() -> None:
    """A process that vanished is told with its end, to a rank that does not wait for it yet."""
    facts = _verdict(2, lost=(1,), timeout=2.5, where={1: Place(_HERE, "exited (killed by SIGKILL)")})

    assert _report.gone(facts, 0).splitlines() == [
        "rank 1 of 2 lost while rank 0 has been in scope 'ep4' for 2.5 s",
        "  lost:     1  host pid 7, exited (killed by SIGKILL)",
    ]


def test_out_of_patience_says_where_all_ranks_are_and_which_this_one_is() -> None:
    """The last words of a process that ends itself: the limit, then all ranks in order."""
    places = {1: _place(), 0: _place("at the barrier of scope 'ep4'", "")}

    assert _report.out_of_patience("ep4", 60.0, places, 1).splitlines() == [
        "scope 'ep4' was not left within kill_after=60.0 s; this process is ended now",
        "  rank 0: host pid 7, at the barrier of scope 'ep4' for 10.0 s (sleeping)",
        "  rank 1 (this one): host pid 7, in the body of scope 'ep4' for 10.0 s (sleeping)",
        f"      {_FRAMES.splitlines()[0]}",
        f"      {_FRAMES.splitlines()[1]}",
    ]
