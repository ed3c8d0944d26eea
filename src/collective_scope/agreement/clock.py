"""
The clock by which waits are measured, as it was when this module was imported.

Tests put functions of their own into ``time`` while a body runs. The rank's other threads must not call those. Some tools
replace them in every module that has imported them, too, but not what is made of them here.
"""

from __future__ import annotations

import functools
import time


monotonic = functools.partial(time.monotonic)
sleep = functools.partial(time.sleep)
