"""What protects the lesson: files, settings, devices, runs. Nothing in here knows of attention."""

import os
import signal
import sys
import threading

# A closed stream leaves its number to the next file that is opened, and what is printed would land
# there. So numbers 0 to 2 are taken.
while (null := os.open(os.devnull, os.O_RDWR)) < 3:
    pass
os.close(null)

# torch reads both when it is loaded.
# A CPU thread that waits for another gives up its core soon (GNU OpenMP). Without this, one busy
# process beside the training makes it tens of times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# MKL promises the same bits from run to run only where it is asked to.
os.environ.setdefault("MKL_CBWR", "AUTO")
# Large tensors lie in large pages, where the system has them. A page that is freed and fetched anew
# costs time, and with GPT-2's vocabulary there are many.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Ctrl-C while a script loads: there is nothing to lose, and nothing to say. (Then see
# files.run_script.) Half loaded, torch would crash; so there Ctrl-C ends the process at once.
show = sys.excepthook
sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or show(kind, *error)
on_interrupt = signal.getsignal(signal.SIGINT)
at_once = on_interrupt is signal.default_int_handler
at_once = at_once and threading.current_thread() is threading.main_thread()
if at_once:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import torch  # noqa: E402, F401

if at_once:
    signal.signal(signal.SIGINT, on_interrupt)
