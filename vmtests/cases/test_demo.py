"""A real image: Debian 12 with numpy and scipy, 449 MB, from an empty cache."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import time
from pathlib import Path

import pytest
from demo import PLACE
from samples import snapshot

from erofsgen.host.cache.cache import HostCache
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

SHARE = Path(os.environ.get("EROFSGEN_VM_SHARE", "/nonexistent"))
PROGRAM = "import numpy, scipy; print(numpy.sum(numpy.arange(5)))"
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.timeout(1500)
@pytest.mark.case("demo image: Python runs, every byte is right")
def test_python_runs_from_the_image_and_every_byte_is_right(lazy_plane, site):
    """Over fscache by mount(8) alone, else by ours. What was brought goes into the share."""
    if not PLACE.exists():
        pytest.skip("vmtests/cases/demo.py has not made the image")
    image = Image.open(DirectoryStore(PLACE / "store", create=False), "demo")
    if lazy_plane == "fscache":
        HostCache(site.host.root).add(image)
        site.start()
        mounted = site.place / "mnt"
        mounted.mkdir()
        mount = ["mount", "-t", "erofs", "none", mounted, "-o", "fsid=demo,domain_id=erofsgen"]
        subprocess.run(mount, check=True, timeout=60)
    else:
        mounted = site.mount(image)
    started = time.monotonic()
    run = ["chroot", mounted, "/usr/bin/python3", "-c", PROGRAM]
    result = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT, timeout=600, check=False)
    assert (result.stdout, result.stderr) == ("10\n", "")
    engine = site.host.engine()
    figures = {
        "plane": lazy_plane,
        "kernel": os.uname().release,
        "seconds": time.monotonic() - started,
        "image": sum(pack.device_size for pack in image.packs),
        "written": engine["bytes_written"],
        "fetched": engine["bytes_fetched"],
    }
    (SHARE / f"demo-{lazy_plane}.json").write_text(json.dumps(figures))
    assert figures["written"] < figures["image"] / 2
    found, expected = snapshot(mounted), pickle.loads((PLACE / "facts.pickle").read_bytes())
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []
    assert site.host.status()["errors"] == []
