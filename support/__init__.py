"""What protects the lesson: files, settings, devices, runs. Nothing in here knows of attention."""

import os

# torch reads both when it is loaded, so import `support` before it.
# A CPU thread that waits for another gives up its core soon (GNU OpenMP). Without this, one busy
# process beside the training makes it tens of times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# MKL promises the same bits from run to run only where it is asked to.
os.environ.setdefault("MKL_CBWR", "AUTO")
