"""What a benchmark of several parts is made of: its command line, images in a store, figures and goals by part."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

import hostkit
import images
from hostkit import Host, Plain
from measure import REPOSITORY, Figure, Goal, machine, print_figures, print_goals

from erofsgen.host.mount.state import Plane
from erofsgen.store.directory import DirectoryStore

DATA = ("raw", "compressible")
"""Images of :func:`hostkit.make_data`, by the kind of their packs."""


B = TypeVar("B", bound="Bench")


class Bench:
    """Images in one store below ``work``, and what was measured so far, by part."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work = work
        self.rounds: int = options.rounds
        self.quick: bool = options.quick
        self.size = 64 if self.quick else 1024  # MiB of the large files
        self.image = "demo" if self.quick else str(options.image)
        self.store = DirectoryStore(work / "store")
        self.figures: dict[str, list[Figure]] = {}
        self.goals: list[Goal] = []
        self._part = ""
        self._built: set[str] = set()
        self._places = count()

    def __enter__(self: B) -> B:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing of the bench's own is left running."""

    def measure(self, part: str, work: Callable[[Bench], None]) -> None:
        say(f"{part}: {(work.__doc__ or '').splitlines()[0]}")
        self._part = part
        work(self)

    def note(self, what: str, values: Sequence[float], unit: str) -> float:
        """Put a figure into the part's table; its median."""
        figure = Figure(what, values, unit)
        self.figures.setdefault(self._part, []).append(figure)
        say(f"{self._part}: {what}: {figure.median:.4g} {unit}")
        return figure.median

    def goal(self, goal: str, value: float | None, target: float, *, at_least: bool = False) -> None:
        """``value`` is None where something that it needs could not be had."""
        self.goals.append(Goal(f"{self._part}: {goal}", value, target, at_least))

    def place(self) -> Path:
        return self.work / str(next(self._places))

    def tree(self, name: str) -> Path:
        """The files of an image of :data:`DATA`, made if they are not there."""
        tree = self.work / name
        if not tree.exists():
            hostkit.make_data(tree, self.size, compressible=name == "compressible")
        return tree

    def built(self, name: str) -> str:
        """The image ``name``, built if it is not in the store yet: of :data:`DATA`, or one of the image maker's."""
        if name not in self._built:
            if name in DATA:
                hostkit.build(self.store, f"dir:{self.tree(name)}", name)
                shutil.rmtree(self.tree(name))
            else:
                made = images.service() if name == "service" else images.quick()
                hostkit.build(self.store, f"oci:{made.reference}", name)
            self._built.add(name)
        return name

    def host(self, name: str, options: Sequence[str] = (), *, plane: Plane = "fanotify") -> Host:
        return Host(self.place(), self.store, self.built(name), options, plane=plane)

    def plain(self, name: str) -> Plain:
        return Plain(self.place(), self.store, self.built(name))


def arguments(description: str, *, image_for: str) -> argparse.ArgumentParser:
    """The options that all have. ``image_for``: the parts that measure an image of many files."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--only", help="parts, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds of every comparison (default 5)")
    parser.add_argument("--image", choices=["demo", "service"], default="demo", help=f"for {image_for} (default: demo)")
    parser.add_argument("--work", type=Path, help="where caches, stores and mounts go (default .cache/bench)")
    parser.add_argument("--quick", action="store_true", help="small data, one round: does it all work?")
    parser.add_argument("--json", action="store_true", help="one JSON object per goal on standard output")
    return parser


def measure(
    kind: Callable[[Path, argparse.Namespace], B],
    options: argparse.Namespace,
    measurements: Mapping[str, Callable[[B], None]],
) -> None:
    """Measure the parts that ``options`` name, with a bench of ``kind``, and print what came of it."""
    options.rounds = options.rounds or (1 if options.quick else 5)
    parts = options.only.split(",") if options.only else list(measurements)
    if unknown := set(parts) - set(measurements):
        sys.exit(f"bench: no such part: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        sys.exit("bench: mounting needs root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: told to stop"))

    work = (options.work or REPOSITORY / ".cache" / "bench").resolve()
    work.mkdir(parents=True, exist_ok=True)
    say(machine())
    scratch = tempfile.TemporaryDirectory(dir=work, prefix=f"{Path(sys.argv[0]).stem}-")
    with scratch, kind(Path(scratch.name), options) as bench:
        for part in parts:
            bench.measure(part, measurements[part])
    for part, figures in bench.figures.items():
        print_figures(f"{part}: {(measurements[part].__doc__ or '').strip('.')}", figures, as_json=options.json)
    print_goals(bench.goals, as_json=options.json)


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
