"""
Collective teardown for parallel test suites: the ranks of a group leave each block together.

    from collective_scope import collective_scope

    with collective_scope(group, name=config.id()) as scope:
        scope.cleanup(log.close)                              # local: runs on this rank, whatever the peers do
        scope.collective_cleanup(all2all_manager.destroy)     # on all ranks in lockstep, or on none
        run_one_config(config)
    # here every rank of the group is done cleaning up; or every rank has raised

Start with ``help(collective_scope.collective_scope)``. The errors are in ``collective_scope.exceptions``.
"""

from __future__ import annotations

from typing import get_type_hints as _get_type_hints

from . import exceptions
from ._api import collective_scope
from ._renewable import RenewableGroup
from ._scope import CollectiveScope, current_scope
from ._subtest_result import SubtestResult
from ._subtests import Subtests
from .agreement.records import Outcome, Verdict
from .exceptions import (
    BarrierTimeoutError,
    CleanupMismatchError,
    CollectiveScopeError,
    PeerFailedError,
    PeerLostError,
    RevokedInterrupt,
    ScopeMismatchError,
)


# How the files hang together, each importing only from those below it:
#
#   pytest_plugin, _pytest_phases, _pytest_terminal, _pytest_reports, _pytest_tellings    a scope around each phase of a test
#   __main__                   the command ``check``
#   _subtests, _subtest, _subtest_result, _subtests_report    a loop of subtests, and its report
#   _api                       the function that users call, and what it accepts
#   _renewable                 a group that can be revoked, and made again
#   _scope, _entry             the life of a scope: with, decorator; what the entry does
#   _teardown, _arrival        the steps of the exit; the rounds among them
#   _registry, _failures       what a body registers; what went wrong here, and what surfaces
#   _speaker, _report, _notes  what is said in the log while ranks are late; of several ranks; of one
#   _groups, _membership       what may be passed as group; this rank's membership in it, which lasts
#   _torch, _mpi, _environment    all that is asked of torch, of mpi4py, and of a launcher
#   _kill, _cleanups           the end of a process that is stuck; the stack of cleanups
#   exceptions                 the tree of errors
#   agreement                  how the ranks agree on one verdict; imports nothing from here

__all__ = [
    "BarrierTimeoutError",
    "CleanupMismatchError",
    "CollectiveScope",
    "CollectiveScopeError",
    "Outcome",
    "PeerFailedError",
    "PeerLostError",
    "RenewableGroup",
    "RevokedInterrupt",
    "ScopeMismatchError",
    "SubtestResult",
    "Subtests",
    "Verdict",
    "collective_scope",
    "current_scope",
    "exceptions",
]

__version__ = "0.2.0"

for _public in (
    CollectiveScope,
    Outcome,
    RenewableGroup,
    SubtestResult,
    Subtests,
    Verdict,
    collective_scope,
    current_scope,
):
    # get_type_hints() looks names up in the module, so they are looked up before that changes.
    _public.__annotations__ = _get_type_hints(_public)
    # Messages and reprs show where users import from.
    _public.__module__ = __name__
