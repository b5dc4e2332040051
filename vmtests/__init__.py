"""Tests on real kernels: guests in QEMU that run pytest on this machine's own files, and what they said, as a table.

::

    run ── cli ── phases ── guest        one boot: virtme-ng, scratch disks, a directory both sides write to
                    │         └ start.sh, in the guest
                    ├── results          what pytest's report logs say
                    └── conformance      docs/conformance.md: kernel x plane x case
           kernels ── debian, build      where the kernels come from
           cases/                        the tests; run in the guests only
"""
