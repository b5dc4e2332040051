"""Which kernel is taken: Debian's packages by version, on-demand ones by fragment and source."""

from __future__ import annotations

import pytest

from erofsgen.errors import IntegrityError, NotFoundError, UsageError
from vmtests import build, debian, kernels

INDEX = """\
Package: linux-image-6.1.0-50-amd64
Version: 6.1.176-1
Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool

Package: linux-image-6.12.117+deb13-amd64
Version: 6.12.117-1
Depends: kmod

Package: linux-image-7.3.4+deb13-amd64
Version: 7.3.4-1~bpo13+1
Depends: linux-base-7.3.4+deb13-amd64 (= 7.3.4-1~bpo13+1), linux-modules-7.3.4+deb13-amd64 (= 7.3.4-1~bpo13+1)

Package: linux-image-7.3.10+deb13-amd64
Version: 7.3.10-1
Depends: linux-base-7.3.10+deb13-amd64 (= 7.3.10-1), linux-modules-7.3.10+deb13-amd64 (= 7.3.10-1)

Package: linux-modules-7.3.4+deb13-amd64
Version: 7.3.4-1~bpo13+1

Package: linux-base-7.3.10+deb13-amd64
Version: 7.3.10-1
"""

NAMES = [
    "linux-image-6.1.0-50-amd64",
    "linux-image-6.1.0-50-cloud-amd64",
    "linux-image-6.1.0-50-rt-amd64",
    "linux-image-6.1.0-50-amd64-dbg",
    "linux-image-6.1.0-50-amd64-unsigned",
    "linux-image-6.12.117+deb13-amd64",
    "linux-image-6.12.117+deb13-cloud-amd64",
    "linux-image-6.19.14+deb13-amd64",
    "linux-image-7.3.4+deb13-amd64",
    "linux-image-7.3.4+deb13-amd64-unsigned",
    "linux-image-amd64",
    "linux-image-amd64-signed-template",
]


@pytest.mark.parametrize(
    ("series", "releases"),
    [
        ("6.1", ["6.1.0-50-amd64"]),
        ("6.12", ["6.12.117+deb13-amd64"]),
        ("6.x", ["6.1.0-50-amd64", "6.12.117+deb13-amd64", "6.19.14+deb13-amd64"]),
        ("7.x", ["7.3.4+deb13-amd64"]),
        ("5.x", []),
    ],
)
def test_a_series_is_its_plain_images(series, releases):
    assert debian.stock_images(NAMES, series) == [f"linux-image-{release}" for release in releases]


def test_the_newest_kernel_is_the_newest_that_is_whole():
    """7.3.10 is newer than 7.3.4, but its modules are gone from the index."""
    packages = debian.parse(INDEX)
    images = [package for package in packages if package.name.startswith("linux-image-7")]
    chosen = debian.newest_whole(images, packages)
    assert [package.name for package in chosen] == [f"linux-{kind}-7.3.4+deb13-amd64" for kind in ("image", "modules")]
    assert chosen[0].release == "7.3.4+deb13-amd64"
    modules = debian.Package("linux-modules-7.3.10+deb13-amd64", "7.3.10-1")
    assert debian.newest_whole(images, [*packages, modules])[0].upstream == "7.3.10"


def test_no_whole_kernel_is_said():
    with pytest.raises(NotFoundError):
        debian.newest_whole(debian.parse(INDEX)[2:4], [])


def test_versions_are_compared_as_debian_does():
    versions = ["6.12.9-1", "6.12.117-1", "6.12.117-1~deb12u1", "7.3.4-1~bpo13+1", "7.3.4-1"]
    assert sorted(versions, key=debian.ORDER) == [
        "6.12.9-1", "6.12.117-1~deb12u1", "6.12.117-1", "7.3.4-1~bpo13+1", "7.3.4-1",
    ]  # fmt: skip


def test_a_fragment_is_its_options(tmp_path):
    fragment = tmp_path / "fragment"
    lines = build.FRAGMENT.read_text().splitlines()
    fragment.write_text("\n# other comments\n\n".join(reversed(lines)))
    assert build.fragment_digest(fragment) == build.fragment_digest()
    fragment.write_text("\n".join(line.replace("CONFIG_XFS_FS=y", "CONFIG_XFS_FS=n") for line in lines))
    assert build.fragment_digest(fragment) != build.fragment_digest()


@pytest.fixture
def prebuilt(tmp_path, monkeypatch):
    """A directory of kernels somebody else built, from our fragment."""
    (tmp_path / "bzImage-6.12.117-ondemand").write_bytes(b"kernel")
    (tmp_path / "config-6.12.117-ondemand").write_text("CONFIG_64BIT=y\n")
    (tmp_path / "fragment.config").write_text(build.FRAGMENT.read_text())
    monkeypatch.setenv("EROFSGEN_KERNEL_CACHE", str(tmp_path))
    return tmp_path


def test_a_prebuilt_kernel_of_the_same_fragment_and_source_is_taken(prebuilt):
    assert kernels.prebuilt("6.12.117") == (
        prebuilt / "bzImage-6.12.117-ondemand",
        prebuilt / "config-6.12.117-ondemand",
    )


def test_a_prebuilt_kernel_of_another_source_is_refused(prebuilt):
    assert kernels.prebuilt("6.12.118") is None


def test_a_prebuilt_kernel_of_another_fragment_is_refused(prebuilt):
    with open(prebuilt / "fragment.config", "a") as fragment:
        fragment.write("CONFIG_BTRFS_FS=y\n")
    assert kernels.prebuilt("6.12.117") is None


def test_without_a_place_for_prebuilt_kernels_there_is_none(prebuilt, monkeypatch):
    monkeypatch.delenv("EROFSGEN_KERNEL_CACHE")
    assert kernels.prebuilt("6.12.117") is None


class FakeApt:
    """Debian with one source package."""

    def __init__(self) -> None:
        self.version, self.updates = "6.12.117-1", 0

    def update(self) -> None:
        self.updates += 1

    def source(self, series: str) -> debian.Package:
        return debian.Package(f"linux-source-{series}", self.version)


@pytest.fixture
def cache(tmp_path, prebuilt, monkeypatch):
    """An empty cache of kernels, and Debian as a FakeApt."""
    apt = FakeApt()
    monkeypatch.setattr(kernels, "KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(kernels, "Apt", lambda: apt)
    return apt


def said(text):
    pass


def test_a_kernel_is_made_once(cache):
    kernel = kernels.provide("6.12-ondemand", said)
    assert (kernel.release, kernel.image.read_bytes(), kernel.modules) == ("6.12.117", b"kernel", None)
    assert kernels.provide("6.12-ondemand", said) == kernel
    assert cache.updates == 1


def test_another_fragment_is_another_kernel(cache, tmp_path, monkeypatch):
    kernel = kernels.provide("6.12-ondemand", said)
    changed = tmp_path / "changed.config"
    changed.write_text(build.FRAGMENT.read_text() + "CONFIG_BTRFS_FS=y\n")
    digest = build.fragment_digest
    monkeypatch.setattr(build, "fragment_digest", lambda fragment=changed: digest(fragment))
    (tmp_path / "fragment.config").write_text(changed.read_text())
    other = kernels.provide("6.12-ondemand", said)
    assert other.image != kernel.image
    assert cache.updates == 2


def test_update_takes_a_newer_kernel_and_keeps_one_that_is_the_newest(cache, tmp_path):
    kernels.provide("6.12-ondemand", said)
    for kind in ("bzImage", "config"):
        (tmp_path / f"{kind}-6.12.120-ondemand").write_text(f"new {kind}")
    cache.version = "6.12.120-1"
    assert kernels.provide("6.12-ondemand", said).release == "6.12.117"
    assert kernels.provide("6.12-ondemand", said, update=True).release == "6.12.120"
    assert kernels.provide("6.12-ondemand", said).release == "6.12.120"


def test_what_an_interrupted_run_left_is_not_a_kernel(cache, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kernels.os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kernels.provide("6.12-ondemand", said)
    left = sorted(path.name for path in (tmp_path / "kernels").iterdir())
    assert [name.endswith((".part", "lock")) for name in left] == [True, True]
    assert kernels.provide("6.12-ondemand", said).release == "6.12.117"
    assert not list((tmp_path / "kernels").glob("*.part"))


def test_an_unknown_kernel_is_said():
    with pytest.raises(UsageError, match=r"no kernel '2\.6'"):
        kernels.provide("2.6", said)


@pytest.mark.parametrize("layout", ["old", "new"])
def test_packages_of_both_layouts_come_to_the_same(tmp_path, layout):
    release = "7.3.4+deb13-amd64"
    unpacked, tree = tmp_path / "unpacked", tmp_path / "tree"
    modules = unpacked / ("lib" if layout == "old" else "usr/lib") / "modules" / release
    modules.mkdir(parents=True)
    (tree / "boot").mkdir(parents=True)
    (modules / "modules.dep").write_text("")
    boot = unpacked / "boot"
    boot.mkdir()
    for kind in ("vmlinuz", "config"):
        (boot / f"{kind}-{release}" if layout == "old" else modules / kind).write_text(kind)
    kernels.arrange(unpacked, tree, release)
    assert sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()) == [
        f"boot/config-{release}", f"boot/vmlinuz-{release}", f"lib/modules/{release}/modules.dep",
    ]  # fmt: skip


def test_a_kernel_without_modules_is_refused(tmp_path):
    (tmp_path / "tree/boot").mkdir(parents=True)
    with pytest.raises(NotFoundError):
        kernels.arrange(tmp_path, tmp_path / "tree", "7.3.4")


@pytest.fixture
def source(tmp_path):
    """A kernel's source with options that a fragment may want, and a configuration."""
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs/Kconfig").write_text("config CACHEFILES_ONDEMAND\n\tbool\nmenuconfig EROFS_FS\nconfig TRACING\n")
    (tmp_path / "fragment").write_text(
        "CONFIG_CACHEFILES_ONDEMAND=y\nCONFIG_EROFS_FS=y\nCONFIG_TRACING=y\nCONFIG_NEW=y\nCONFIG_SQUASHFS=n\n"
    )
    return tmp_path


def test_lost_options_are_those_the_kernel_knows(source):
    (source / ".config").write_text("CONFIG_CACHEFILES_ONDEMAND=y\nCONFIG_EROFS_FS=y\n# CONFIG_TRACING is not set\n")
    assert build.lost_options(source, source / "fragment") == ["CONFIG_TRACING"]


def test_a_kernel_that_cannot_do_what_it_is_for_is_refused(source):
    (source / ".config").write_text("CONFIG_EROFS_FS=y\nCONFIG_TRACING=y\n")
    with pytest.raises(IntegrityError, match="CONFIG_CACHEFILES_ONDEMAND"):
        build.lost_options(source, source / "fragment")
