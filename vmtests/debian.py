"""Debian's packages, of whatever release, without touching the machine's own apt.

A private view: apt with its own lists and cache below ``.cache/apt``, the machine's sources, and the suites of
:data:`SUITES` that the machine does not name, from the mirror it takes its own from. Benchmarks have another one, for
the source of a program they compare with.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from erofsgen.errors import NotFoundError, RemoteError, UnsupportedError
from vmtests.places import CACHE, run

SUITES = ("bookworm", "trixie", "trixie-backports", "sid")

_STOCK = re.compile(r"linux-image-(?P<release>\d+\.\d+[^_]*-amd64)")
_UNWANTED = re.compile(r"-(unsigned|dbg|cloud|rt)(-|$)|-template$")
# linux-base-<release>, which some name too, has nothing but hooks and texts, and leaves the suites first.
_NEEDED = re.compile(r"(linux-(?:binary|modules)-\S+) \(= ([^)]+)\)")


@dataclass(frozen=True)
class Package:
    """One version of a package in an index. ``needs`` are the packages of the same kernel it is not whole without."""

    name: str
    version: str
    needs: tuple[tuple[str, str], ...] = ()

    @property
    def upstream(self) -> str:
        """The kernel's own version, as 6.12.117."""
        return self.version.split("-")[0]

    @property
    def release(self) -> str:
        """What ``uname -r`` says with this image."""
        return self.name.removeprefix("linux-image-")


def parse(stanzas: str) -> list[Package]:
    """The packages of an index, or of what ``apt-cache show`` prints."""
    packages = []
    for stanza in stanzas.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Depends): (.*)$", stanza, re.MULTILINE))
        if "Package" in fields and "Version" in fields:
            needs = tuple(_NEEDED.findall(fields.get("Depends", "")))
            packages.append(Package(fields["Package"], fields["Version"], needs))
    return packages


def newer(one: str, other: str) -> int:
    """Debian's order of versions: negative, 0 or positive. ``dpkg`` decides."""
    for relation, answer in (("lt", -1), ("gt", 1)):
        if subprocess.run(["dpkg", "--compare-versions", one, relation, other], check=False).returncode == 0:
            return answer
    return 0


ORDER = functools.cmp_to_key(newer)
"""A key to sort versions by."""


def stock_images(names: Iterable[str], series: str) -> list[str]:
    """The image packages of a series: "6.12" is 6.12 and 6.12.*, "7.x" is everything that begins with 7."""
    begin = series.removesuffix("x")
    return [
        name
        for name in names
        if (match := _STOCK.fullmatch(name))
        and not _UNWANTED.search(name)
        and re.match(re.escape(begin) + ("" if series.endswith("x") else r"[.+-]"), match["release"])
    ]


def newest_whole(images: Iterable[Package], others: Iterable[Package]) -> list[Package]:
    """The newest image of which everything can be had, first, and what it needs. Raises NotFoundError.

    Indexes list images whose modules have already left the suite.
    """
    there: Mapping[tuple[str, str], Package] = {(package.name, package.version): package for package in others}
    for image in sorted(images, key=lambda image: ORDER(image.version), reverse=True):
        found = [there.get(need) for need in image.needs]
        if None not in found:
            return [image, *(package for package in found if package is not None)]
    raise NotFoundError("no kernel package of this series is complete", hint="try again with --update")


class Apt:
    """The private view. :meth:`update` reads the indexes; the rest works on what was read last.

    Of ``suites`` it has the packages, of ``sources``, suites too, the source packages.
    """

    def __init__(self, root: Path = CACHE / "apt", suites: Sequence[str] = SUITES, sources: Sequence[str] = ()) -> None:
        self.root = root
        self._suites = suites
        self._sources = sources
        self._environment = {"APT_CONFIG": str(root / "apt.conf")}

    def update(self) -> None:
        """Read the indexes. Raises RemoteError; an index that is there already is no reason to stop."""
        self._configure()
        try:
            run("apt-get", "--quiet", "update", environment=self._environment)
        except Exception as error:
            if not any((self.root / "lists").glob("*_Sources*" if self._sources else "*_Packages*")):
                raise RemoteError(f"no package index can be read: {error}") from error

    def source(self, series: str) -> Package:
        """The newest ``linux-source`` of a series."""
        packages = self._show([f"linux-source-{series}"])
        return newest_whole([Package(package.name, package.version) for package in packages], [])[0]

    def stock(self, series: str) -> list[Package]:
        """The newest image of a series and what belongs to it."""
        names = run("apt-cache", "pkgnames", "linux-image-", environment=self._environment).split()
        images = self._show(stock_images(names, series))
        return newest_whole(images, self._show(sorted({name for image in images for name, _ in image.needs})))

    def download(self, package: Package, directory: Path) -> Path:
        """Fetch a package into ``directory``; apt checks what it gets. Returns the file."""
        before = set(directory.glob("*.deb"))
        run(
            "apt-get", "--quiet", "download", f"{package.name}={package.version}",
            cwd=directory, environment=self._environment,
        )  # fmt: skip
        (deb,) = set(directory.glob("*.deb")) - before
        return deb

    def download_source(self, name: str, directory: Path) -> Path:
        """Fetch a source package into ``directory``; apt checks what it gets. Returns the upstream archive."""
        run("apt-get", "--quiet", "source", "--download-only", name, cwd=directory, environment=self._environment)
        (archive,) = (path for path in directory.glob("*.orig.tar.*") if path.suffix != ".asc")
        return archive

    def _show(self, names: list[str]) -> list[Package]:
        """Every version of these packages; names that no index has are passed over."""
        if not names:
            return []
        environment = {**os.environ, **self._environment}
        done = subprocess.run(
            ["apt-cache", "show", *names], env=environment, capture_output=True, text=True, check=False
        )
        return parse(done.stdout)

    def _configure(self) -> None:
        for name in ("lists/partial", "cache/archives/partial"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        uri, named = _machine()
        entries = [("deb", suite) for suite in self._suites if suite not in named]
        entries += [("deb-src", suite) for suite in self._sources]
        lines = [
            f"{kind} [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {uri} {suite} main"
            for kind, suite in entries
        ]
        own = Path("/etc/apt/sources.list")
        if own.exists():
            lines.insert(0, own.read_text())
        (self.root / "sources.list").write_text("\n".join([*lines, ""]))
        (self.root / "apt.conf").write_text(
            f'Dir::Etc::SourceList "{self.root}/sources.list";\n'
            f'Dir::State::Lists "{self.root}/lists";\n'
            f'Dir::Cache "{self.root}/cache";\n'
            'Acquire::Languages "none";\nAcquire::Retries "5";\n'
            'APT::Architectures { "amd64"; };\nAPT::Sandbox::User "root";\n'
        )


def _machine() -> tuple[str, set[str]]:
    """The mirror of Debian's main archive that this machine uses, and the suites it names."""
    targets = run(
        "apt-get", "indextargets", "Created-By: Packages", "Origin: Debian", "--format", "$(REPO_URI) $(CODENAME)"
    )
    named = {suite: uri for uri, suite in (line.split() for line in targets.splitlines())}
    for suite, uri in named.items():
        if "-" not in suite:  # bookworm-security is elsewhere
            return uri, set(named)
    raise UnsupportedError("this machine's apt knows no Debian mirror", hint="kernels come from Debian's packages")
