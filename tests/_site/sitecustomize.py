"""Let `tests.ranks` ask any Python process of a program for its stacks."""

import faulthandler
import signal


faulthandler.enable()
faulthandler.register(signal.SIGUSR1, all_threads=True)
# Started from a background job, the process inherits "ignore".
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
