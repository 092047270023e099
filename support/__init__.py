"""Supporting code: files, settings, devices, runs. Nothing here knows about attention.

Import this package before torch, which reads the environment variables below when it is loaded.
"""

import os
import signal
import sys
import threading

# If a standard stream is closed, the next file that is opened gets its number, and printed text
# would end up in that file. Therefore occupy the numbers 0 to 2.
while (null := os.open(os.devnull, os.O_RDWR)) < 3:
    pass
os.close(null)

# With GNU OpenMP, a CPU thread that waits for another one soon gives up its core. Otherwise a
# single busy process beside the training makes it tens of times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# MKL promises the same bits from run to run only if this is set.
os.environ.setdefault("MKL_CBWR", "AUTO")
# Large tensors in large pages: fetching a freed page again takes time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Ctrl-C while a script loads prints no traceback; after that files.run_script handles it. During
# the import of torch, Ctrl-C ends the process at once: a half-loaded torch would crash.
hook = sys.excepthook
sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or hook(kind, *error)
handler = signal.getsignal(signal.SIGINT)
main_thread = threading.current_thread() is threading.main_thread()
if interruptible := main_thread and handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import torch  # noqa: E402, F401

if interruptible:
    signal.signal(signal.SIGINT, handler)
