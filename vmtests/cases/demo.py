"""The demo image for guests, prepared on the host: a store, and what ``umoci unpack`` says is in it.

``python vmtests/cases/demo.py`` makes ``.cache/vmtests/demo`` where it is missing or old::

    store/          the image, as `demo`
    facts.pickle    tests/samples.py's snapshot of the unpacked tree
    key             which image, and which version of what is stored
"""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PLACE = REPOSITORY / ".cache" / "vmtests" / "demo"


def prepare():
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import imagemaker
    from samples import snapshot

    from erofsgen.build.record import VERSION

    image = imagemaker.demo_image()
    key = f"{image.layout.name} {VERSION}"
    if (PLACE / "key").exists() and (PLACE / "key").read_text() == key:
        return
    part = PLACE.with_name("demo.part")
    for old in (PLACE, part):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir(parents=True)
    program = Path(sys.executable).with_name("erofsgen")
    subprocess.run(
        [program, "--store", part / "store", "build", f"oci:{image.reference}", "--tag", "demo"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    (part / "facts.pickle").write_bytes(pickle.dumps(snapshot(imagemaker.unpacked(image))))
    (part / "key").write_text(key)
    part.rename(PLACE)


if __name__ == "__main__":
    prepare()
