"""From a container image to Python running from a kernel EROFS mount, with what each step took.

Makes a real multi-layer image on this machine (cached in ``.cache``), converts it with ``erofsgen build``, converts
its next version, mounts the first lazily with ``erofsgen mount``, runs Python inside, shows how much of the image
that has brought to this host, and reads the rest. Every command is shown before it runs. Needs root to mount. Cleans up
after itself, also when it fails or is interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import imagemaker

REPOSITORY = imagemaker.REPOSITORY
EROFSGEN = Path(sys.executable).with_name("erofsgen")
ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/root", "LANG": "C.UTF-8"}
console = Console(highlight=False, soft_wrap=True)


class Demo:
    """The steps, and what they took."""

    def __init__(self, work: Path) -> None:
        self.store = work / "store"
        self.root = work / "host"
        self.mount_point = work / "mnt"
        self.mount_point.mkdir()
        self.options: list[str | Path] = ["--store", self.store, "--root", self.root]
        self.steps: list[tuple[str, str, float]] = []

    def erofsgen(self, *arguments: str) -> tuple[Any, float]:
        """Run a verb; what it reports, and the seconds it took."""
        result, seconds = self.run([EROFSGEN, *self.options, *arguments], "--json")
        return json.loads(result), seconds

    def show(self, *arguments: str) -> None:
        """Run a verb for its printed answer."""
        console.print(escape(self.run([EROFSGEN, *self.options, *arguments])[0]))

    def run(self, command: list[str | Path], *quietly: str) -> tuple[str, float]:
        """Show a command and run it, with ``quietly`` behind it: what it printed, and the seconds it took."""
        shown = shlex.join(map(str, command)).replace(f"{EROFSGEN.parent}/", "").replace(f"{REPOSITORY}/", "")
        console.print(f"[bold]$ {escape(shown)}")
        started = time.perf_counter()
        result = subprocess.run(
            [*command, *quietly], env=ENVIRONMENT, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
        )
        return result.stdout, time.perf_counter() - started

    def step(self, what: str, result: str, seconds: float) -> None:
        self.steps.append((what, result, seconds))

    # --- the steps ---------------------------------------------------------------------------------------------------

    def make_images(self) -> tuple[imagemaker.Image, imagemaker.Image]:
        console.print("[bold]making a container image: Debian 12, PyPI packages, an application (cached in .cache)")
        started = time.perf_counter()
        image = imagemaker.demo_image()
        following = imagemaker.make_image("demo-2", [*imagemaker.demo_layers()[:-1], imagemaker.application(2)])
        self.step(
            "container image",
            f"{len(image.layers)} gzip layers of {image.tar_size / 1e6:.0f} MB, {image.blob_size / 1e6:.0f} MB stored",
            time.perf_counter() - started,
        )
        return image, following

    def build(self, image: imagemaker.Image, name: str) -> None:
        facts, seconds = self.erofsgen("build", f"oci:{image.reference}", "--tag", name)
        self.step(
            f"build {name}",
            f"{facts['inodes']:,} files, {facts['layers']} layers ({facts['reused_layers']} converted before); "
            f"index {facts['index_size'] / 1e6:.2f} MB, {facts['packs']} packs ({facts['new_packs']} new), "
            f"{facts['new_bytes'] / 1e6:.1f} MB new data",
            seconds,
        )

    def mount(self, name: str) -> None:
        _, seconds = self.erofsgen("mount", name, os.fspath(self.mount_point))
        fields = next(
            line.split() for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.mount_point) in line
        )
        self.step(f"mount {name}", f"file system type {fields[2]}, {fields[3].split(',')[0]}", seconds)

    def run_python(self) -> None:
        output, seconds = self.run(["chroot", self.mount_point, "/usr/bin/python3", "/opt/app/main.py"])
        console.print(escape(output))
        self.step("Python from the mount", output.splitlines()[0], seconds)

    def show_filled(self) -> None:
        """What of the image is on this host by now."""
        status, seconds = self.erofsgen("status")
        image, _ = self.erofsgen("inspect", "demo:1")
        size = sum(pack["device_size"] for pack in image["packs"])
        filled, fetched = status["engine"]["bytes_written"], status["engine"]["bytes_fetched"]
        self.step(
            "brought so far",
            f"{filled / 1e6:.0f} of {size / 1e6:.0f} MB ({100 * filled / size:.0f} %), {fetched / 1e6:.1f} MB fetched",
            seconds,
        )

    def read_everything(self) -> None:
        """Every byte through the kernel, which reads it from the packs."""
        started = time.perf_counter()
        total = files = 0
        for top, _, names in os.walk(self.mount_point):
            for name in names:
                path = os.path.join(top, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    with open(path, "rb", buffering=0) as file:
                        while piece := file.read(1 << 20):
                            total += len(piece)
                    files += 1
        self.step("read every file", f"{files:,} files, {total / 1e6:.0f} MB", time.perf_counter() - started)

    def unmount(self) -> None:
        _, seconds = self.run([EROFSGEN, *self.options, "umount", self.mount_point])
        self.step("umount", "", seconds)

    def clean_up(self) -> None:
        """Nothing may stay mounted, whatever happened."""
        while os.path.ismount(self.mount_point):
            subprocess.run(["umount", "--lazy", self.mount_point], check=True)
        if (self.root / "control.sock").exists():
            subprocess.run([EROFSGEN, *self.options, "daemon", "--stop", "--force"], check=True)

    def summary(self) -> Table:
        table = Table("step", "result", title="erofsgen demo", title_justify="left")
        table.add_column("seconds", justify="right")
        for what, result, seconds in self.steps:
            table.add_row(what, result, f"{seconds:.2f}")
        return table


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("demo: mounting needs root: sudo make demo")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    (REPOSITORY / ".cache").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=REPOSITORY / ".cache", prefix="demo-") as work:
        demo = Demo(Path(work))
        try:
            image, following = demo.make_images()
            demo.build(image, "demo:1")
            demo.build(following, "demo:2")
            demo.mount("demo:1")
            console.print()
            demo.run_python()
            demo.show_filled()
            demo.read_everything()
            demo.show("inspect", "demo:1")
            demo.show("images")
            demo.unmount()
        finally:
            demo.clean_up()
    Console().print(demo.summary())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: {shlex.join(map(str, error.cmd))}: exit code {error.returncode}")
