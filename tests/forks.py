"""Run something in a forked child of this process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable


def in_a_fork(fn: Callable[[], object]) -> str:
    """Return, as text, what *fn* returns or raises in a forked child, which ends with it."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is what is tested
        pid = os.fork()
    if pid == 0:
        # Nothing of what the parent would do next may be done by the child.
        try:
            os.write(writer, str(fn()).encode())
        except BaseException as error:  # noqa: BLE001  (kept, and looked at by the test)
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text
