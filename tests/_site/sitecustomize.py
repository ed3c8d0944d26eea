"""Let `tests.ranks` ask any Python process of a program for its stacks, and `tests.hosts` set its clock."""

import faulthandler
import os
import signal
import time


faulthandler.enable()
faulthandler.register(signal.SIGUSR1, all_threads=True)
# Started from a background job, the process inherits "ignore".
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "TESTS_WALL_OFFSET_S" in os.environ:
    # Of all clocks, this is the one that has no namespace.
    _now, _offset_s = time.time, float(os.environ["TESTS_WALL_OFFSET_S"])
    time.time = lambda: _now() + _offset_s
