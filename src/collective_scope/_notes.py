"""Facts in, text out: what is said of one rank, in its log and on its errors."""

from __future__ import annotations

from collections.abc import Iterable

from .agreement.text import message_of, one_line, type_name


MISNESTING_ADVICE = (
    "Scopes are left in the reverse order in which they were entered, by the thread that entered them. Usual\n"
    "  causes: a scope around the yield of a generator that is not closed in order, __exit__() called by hand,\n"
    "  two threads or tasks on one group. The peers are told that this rank failed; later scopes work again."
)


GROUP_IS_DEAD = (
    "gloo has closed the connections of this group for good: every later collective on it fails, whatever the"
    " next scopes do. collective_scope.RenewableGroup frees its ranks before that, and makes the group again"
    " (in pytest: --collective-scope-make)."
)


def failed_here(rank: int, world_size: int, scope: str, phase: str) -> str:
    """Introduce the traceback in the log of the rank that failed."""
    if world_size == 1:
        return f"scope {scope!r} failed, {phase}"
    is_late = phase.startswith("after_barrier")
    told = "after the barrier, so its peers are not told" if is_late else "its peers are told"
    return f"rank {rank} of {world_size} failed in scope {scope!r}, {phase}; {told}"


STILL_DEAD = "its group is dead since scope "


def still_dead(since: str) -> str:
    """Say in few words why a collective failed."""
    return f"{STILL_DEAD}{since!r}"


MADE_TWICE = (
    "The RenewableGroup has made the default group already: leave this call out, or pass a function with it as make"
    " (in pytest: --collective-scope-make package.module:function)."
)

MADE_BEFORE = (
    "There was a default group before the RenewableGroup came to make its own, at the entry of the first scope: leave"
    " that init_process_group() out, or put it into a function that is passed as make (in pytest:"
    " --collective-scope-make package.module:function)."
)

MADE_AGAIN = "The group was revoked in scope "


def destroy_had_failed(error: BaseException) -> str:
    """Say why a group may be there still that was to be destroyed."""
    return f"Destroying the revoked group had failed: {one_line(type_name(error), message_of(error))}"


def made_again(since: str) -> str:
    """Say why a group may be gone that was made before."""
    return (
        f"{MADE_AGAIN}{since!r}, and made again; that destroyed the groups that bodies and fixtures had made. Make in"
        " make() what later scopes need, or make it in each scope: in pytest, in a fixture of function scope."
    )


def attached(exc: BaseException, phase: str, *, in_full: bool = True) -> str:
    """Mention a later error on the one that is raised."""
    kind, message = type_name(exc), message_of(exc)
    return f"In addition, {phase}: {f'{kind}: {message}' if in_full else one_line(kind, message)}"


NOT_RUN = (
    "Not run, because the ranks could not agree to run it together, not all of them came, or the group was revoked: "
)


def skipped(cleanups: Iterable[object]) -> str:
    """Mention cleanups that a rank may not run alone, or not while another rank is missing."""
    return NOT_RUN + ", ".join(map(str, cleanups)) + ". All that it refers to is kept alive until the process ends."


def not_entered(scope: str) -> str:
    """Say that a scope was refused because one around it is over."""
    return f"The body of scope {scope!r} was not run."


def left_out_of_order(scope: str, what: str) -> str:
    """Say that a scope was not left by the rules."""
    return f"scope {scope!r} was left {what}\n  {MISNESTING_ADVICE}"


def left_by_another_thread(scope: str) -> str:
    """Say that a scope was left where it cannot be torn down."""
    return (
        f"scope {scope!r} was left by another thread than the one that entered it\n"
        "  Nothing of it was torn down: its own thread has to leave it. Until then its cleanups do not run, its peers\n"
        "  wait for this rank, and no other thread of this process can enter a scope of the group. Usual cause: a scope\n"
        "  around the yield of a generator that another thread has collected. Close it where it runs, for example by\n"
        "  contextlib.closing()."
    )


def cannot_be_freed(scope: str, reason: str) -> str:
    """Say why a process is ended that nothing else can free."""
    return f"scope {scope!r}: {reason}; this process is ended now"


def group_is_gone(scope: str, since: str) -> str:
    """Warn that a scope ends without its peers."""
    return (
        f"scope {scope!r}: there is no default group any more; it was there until scope {since!r}."
        " This rank leaves alone, and runs no collective cleanup."
    )


def group_came_and_went(scope: str) -> str:
    """Warn that a scope ends without the peers that its body had."""
    return (
        f"scope {scope!r}: its body made a default group and destroyed it, so there is no barrier."
        " Enter a scope within, around the part that uses the group."
    )


def there_was_no_group(scope: str) -> str:
    """Warn that a scope had no peers although it was to have some."""
    return (
        f"scope {scope!r}: the function that was given as its group returned None, at the entry and at the exit, and"
        " there is no default group. This rank has left alone."
    )


def group_was_destroyed(scope: str) -> str:
    """Warn that a group is not there any more, although its barrier works."""
    return f"scope {scope!r}: the process group was destroyed in the body; the barrier goes over its store"
