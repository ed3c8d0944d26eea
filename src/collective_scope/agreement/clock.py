"""
The clock by which waits are measured, as it was when this module was imported.

Tests put functions of their own into ``time`` while a body runs. The rank's other threads must not call those. Some tools
replace them in every module that has imported them, too, but not what is made of them here.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator


monotonic = functools.partial(time.monotonic)
sleep = functools.partial(time.sleep)


def warning_times(start: float, after: float) -> Iterator[float]:
    """Return when a rank speaks of what lasts since *start*: after 1, 3, 6, 12, 24, 36, ... times *after* seconds."""
    yield from (start + after, start + 3 * after, start + 6 * after)
    yield from itertools.count(start + 12 * after, 12 * after)
