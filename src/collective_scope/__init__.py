"""
Collective teardown for parallel test suites.

    with collective_scope(group) as scope:
        scope.cleanup(free_staging)
        scope.collective_cleanup(all2all_manager.destroy)
        run_one_config(config)

General layout, each module importing only from those below it:

* ``_api``: the function that users call
* ``_scope``, ``_registry``: life cycle, teardown, decorator; what a body registers
* ``_failures``, ``_deadline``: what surfaces; the end of patience
* ``_groups``: what may be passed as ``group``; all that is asked of torch
* ``_barrier``, ``_plain_barrier``: arrive, wait with a real bound, verdict
* ``_lookout``, ``_watcher``: who looks for missing ranks while this one waits; who answers for this one
* ``_protocol``, ``_store_thread``: what is said in the store; calls to it that can be bounded and interrupted
* ``_report``: facts in, text out
* ``_outcome``, ``_process``, ``_cleanups``, ``exceptions``: records, the stack, the errors
"""

from __future__ import annotations

from typing import get_type_hints as _get_type_hints

from . import exceptions
from ._api import collective_scope
from ._outcome import Outcome, Verdict
from ._scope import CollectiveScope, current_scope
from .exceptions import (
    BarrierTimeoutError,
    CleanupMismatchError,
    CollectiveScopeError,
    PeerFailedError,
    PeerLostError,
    ScopeMismatchError,
)


__all__ = [
    "BarrierTimeoutError",
    "CleanupMismatchError",
    "CollectiveScope",
    "CollectiveScopeError",
    "Outcome",
    "PeerFailedError",
    "PeerLostError",
    "ScopeMismatchError",
    "Verdict",
    "collective_scope",
    "current_scope",
    "exceptions",
]

for _public in (CollectiveScope, Outcome, Verdict, collective_scope, current_scope):
    # get_type_hints() looks names up in the module, so they are looked up before that changes.
    _public.__annotations__ = _get_type_hints(_public)
    # Messages and reprs show where users import from.
    _public.__module__ = __name__
