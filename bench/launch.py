"""Runs a command and writes what the kernel accounted to it, as JSON, to a file descriptor: see :mod:`measure`.

A process of its own and as small as Python gets, since Linux counts the memory of whoever starts a program to that
program's peak. Usage: ``launch.py FD COMMAND…``; the exit code is the command's.
"""

from __future__ import annotations

import json
import os
import sys
import time

started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - started
facts = {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}
os.write(int(sys.argv[1]), json.dumps(facts).encode())
sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
