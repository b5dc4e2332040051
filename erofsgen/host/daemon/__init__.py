"""The daemon: a supervisor that holds what the kernel waits for, a worker that fills, a standby for the supervisor.

::

    kernel ◄── group fd ── supervisor ◄──── control.sock ──── commands
                           │  │   └─ pipe ─ standby: becomes the supervisor when that dies
                  pack fds │  │ done
                  requests ▼  │
                           worker: fill engine, tiers, cache writes, housekeeping

The supervisor imports nothing heavy, answers what is present by itself, and keeps the requests it has read and not
answered; so the worker may die at any moment, and is replaced.
"""
