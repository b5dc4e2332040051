"""Container images for the demo, the tests and the benchmarks, made on this machine and cached.

An image is a list of layer recipes. A layer is a tar written by the recipe, compressed the way container builders do
it; an image is an OCI image layout whose blobs are hard links to the layers' blobs::

    .cache/images/
      layers/<name>-<key>/blob          the layer as stored
                          layer.json    media type, digest, size, diff_id, files, bytes
      layouts/<name>-<key>/             an OCI image layout with one tag, <name>
      lock                              held while something is made

``key`` hashes the recipe: everything that decides the bytes. What is there is whole, since directories are renamed
into place; deleting ``.cache`` loses nothing but time.

``python tests/imagemaker.py`` makes the demo image and prints its ``oci:`` reference.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import random
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache" / "images"

EPOCH = 1_700_000_000
"""Time stamp of every file that an image maker creates, in seconds: builds differ by content, not by the clock."""

DIST_PACKAGES = "usr/local/lib/python3.11/dist-packages"
"""Where Debian 12's Python looks for what pip installed."""

LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = LAYER_TAR + "+gzip"


class Compressor(Protocol):
    def compress(self, data: Any, /) -> bytes: ...
    def flush(self) -> bytes: ...


def gzip_compressor() -> Compressor:
    """Gzip as container builders make it: zlib, level 6, no time stamp."""
    return zlib.compressobj(6, zlib.DEFLATED, 31)


@dataclass(frozen=True)
class Recipe:
    """How to make one layer. ``parts`` is JSON-able and, with ``name``, decides the layer's bytes."""

    name: str
    parts: Any
    write: Callable[[io.BufferedIOBase], None]
    compressor: Callable[[], Compressor] | None = gzip_compressor

    @property
    def key(self) -> str:
        how = self.compressor.__name__ if self.compressor else None
        return hashlib.sha256(json.dumps([self.name, self.parts, how]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CachedLayer:
    blob: Path
    media_type: str
    digest: str
    size: int
    diff_id: str
    tar_size: int

    @property
    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class Image:
    """A finished OCI image layout: ``reference`` is what ``erofsgen build``, umoci and skopeo take after ``oci:``."""

    layout: Path
    tag: str
    layers: tuple[CachedLayer, ...]

    @property
    def reference(self) -> str:
        return f"{self.layout}:{self.tag}"

    @property
    def tar_size(self) -> int:
        return sum(layer.tar_size for layer in self.layers)

    @property
    def blob_size(self) -> int:
        return sum(layer.size for layer in self.layers)


def say(text: str) -> None:
    print(f"images: {text}", file=sys.stderr, flush=True)


# --- layers and layouts ----------------------------------------------------------------------------------------------


class _LayerSink(io.RawIOBase):
    """A write-only file that compresses and hashes on its way to the blob."""

    def __init__(self, blob: io.BufferedIOBase, compressor: Compressor | None) -> None:
        self._blob = blob
        self._compressor = compressor
        self.diff = hashlib.sha256()
        self.digest = hashlib.sha256()
        self.tar_size = 0
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        length = len(memoryview(data).cast("B"))
        self.diff.update(data)
        self.tar_size += length
        self._emit(self._compressor.compress(data) if self._compressor else data)
        return length

    def finish(self) -> None:
        if self._compressor:
            self._emit(self._compressor.flush())

    def _emit(self, data: Any) -> None:
        self.digest.update(data)
        self.size += len(data)
        self._blob.write(data)


def _make_layer(recipe: Recipe) -> CachedLayer:
    place = CACHE / "layers" / f"{recipe.name}-{recipe.key}"
    facts = place / "layer.json"
    if not facts.exists():
        say(f"making layer {recipe.name}")
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="layer-") as work:
            with open(Path(work) / "blob", "wb") as blob:
                sink = _LayerSink(blob, recipe.compressor() if recipe.compressor else None)
                with io.BufferedWriter(sink, 1 << 20) as buffered:
                    recipe.write(buffered)
                    buffered.flush()
                    sink.finish()
            (Path(work) / "layer.json").write_text(
                json.dumps(
                    {
                        "media_type": LAYER_GZIP if recipe.compressor else LAYER_TAR,
                        "digest": f"sha256:{sink.digest.hexdigest()}",
                        "size": sink.size,
                        "diff_id": f"sha256:{sink.diff.hexdigest()}",
                        "tar_size": sink.tar_size,
                    }
                )
            )
            os.chmod(work, 0o755)
            os.rename(work, place)
            os.mkdir(work)  # for TemporaryDirectory to remove
    return CachedLayer(blob=place / "blob", **json.loads(facts.read_text()))


def _write_layout(layout: Path, tag: str, layers: tuple[CachedLayer, ...], config: dict[str, Any]) -> None:
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(content: dict[str, Any], media_type: str) -> dict[str, Any]:
        data = json.dumps(content, sort_keys=True).encode()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    for layer in layers:
        with contextlib.suppress(FileExistsError):  # one blob may be two layers
            os.link(layer.blob, blobs / layer.digest.removeprefix("sha256:"))
    config_descriptor = put(config, "application/vnd.oci.image.config.v1+json")
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = put(
        {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": config_descriptor,
            "layers": [layer.descriptor for layer in layers],
        },
        manifest_type,
    )
    manifest["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))


def _config(recipes: list[Recipe], layers: tuple[CachedLayer, ...], command: Sequence[str]) -> dict[str, Any]:
    machine = platform.machine()
    created = "2023-11-14T22:13:20Z"  # EPOCH
    return {
        "created": created,
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine),
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
            "Cmd": list(command),
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": created, "created_by": f"imagemaker {recipe.name}"} for recipe in recipes],
    }


def make_image(name: str, recipes: list[Recipe], command: Sequence[str] = ("python3",)) -> Image:
    """The image of these layers, bottom first, that runs ``command``; made if the cache does not have it.

    Safe to call in parallel. Raises subprocess.CalledProcessError when a tool fails; its output has been printed.
    """
    parts = [name, [recipe.key for recipe in recipes], *([list(command)] if command != ("python3",) else [])]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    layout = CACHE / "layouts" / f"{name}-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            layers = tuple(pool.map(_make_layer, recipes))
        if not layout.exists():
            layout.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="layout-") as work:
                _write_layout(Path(work) / "layout", name, layers, _config(recipes, layers, command))
                os.rename(Path(work) / "layout", layout)
    return Image(layout, name, layers)


def run_tool(*command: str, **options: Any) -> None:
    """Run a system tool quietly; print what it said if it fails."""
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options
    )
    if result.returncode:
        sys.stderr.write(result.stdout.decode(errors="replace"))
        raise subprocess.CalledProcessError(result.returncode, command)


# --- recipe: Debian --------------------------------------------------------------------------------------------------


def debian(*packages: str) -> Recipe:
    """A Debian 12 root file system with Python and ``packages``, from the sources this machine's apt is set up with."""
    included = ("python3", "ca-certificates", *packages)

    def write(out: io.BufferedIOBase) -> None:
        with tempfile.TemporaryDirectory(prefix="erofsgen-debian-") as work:
            tar = Path(work, "rootfs.tar")
            run_tool(
                "mmdebstrap",
                "--variant=minbase",
                f"--include={','.join(included)}",
                "--aptopt=Acquire::Retries 5",
                "bookworm",
                str(tar),
                *_debian_sources(),
                env={**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH)},
            )
            with open(tar, "rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)

    return Recipe("debian", {"suite": "bookworm", "packages": included}, write)


def _debian_sources() -> list[str]:
    """One-line apt sources for bookworm as this machine has them; none, for mmdebstrap's own choice, if it has none."""
    if not shutil.which("apt-get"):
        return []
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    wanted = {"bookworm", "bookworm-updates", "bookworm-security"}
    rows = {tuple(line.split()) for line in listing.splitlines()}
    chosen = sorted(row for row in rows if len(row) == 3 and row[1] in wanted and row[2] == "main")
    return [f"deb {' '.join(row)}" for row in chosen] if any(row[1] == "bookworm" for row in chosen) else []


# --- recipe: PyPI packages -------------------------------------------------------------------------------------------


def pypi(name: str, *requirements: str, dependencies: bool = True, sources_only: Sequence[str] = ()) -> Recipe:
    """Python packages as ``pip install`` puts them into Debian's dist-packages, with their compiled byte code.

    The top-level packages and modules ``sources_only`` have none, as with ``pip install --no-compile``.
    """

    def write(out: io.BufferedIOBase) -> None:
        with tempfile.TemporaryDirectory(prefix="erofsgen-pypi-") as work:
            target = Path(work, DIST_PACKAGES)
            pip_install(target, requirements, dependencies=dependencies)
            for module in sources_only:
                _remove_bytecode(target, module)
            write_tree(out, Path(work))

    parts = {"requirements": requirements, "dependencies": dependencies}
    return Recipe(f"pypi-{name}", {**parts, "sources_only": sources_only} if sources_only else parts, write)


def _remove_bytecode(target: Path, module: str) -> None:
    """What compiling ``module``, a package or a file at the top of ``target``, has left. There must be something."""
    found = [*(target / module).rglob("*.pyc"), *(target / "__pycache__").glob(f"{module}.*.pyc")]
    if not found:
        raise FileNotFoundError(f"{target / module}: no byte code to remove")
    for path in found:
        path.unlink()
        with contextlib.suppress(OSError):  # other modules' is there, too
            path.parent.rmdir()


def pip_install(target: Path, requirements: tuple[str, ...], *, dependencies: bool = True) -> None:
    """Install wheels for Debian 12's Python into ``target``, byte-compiled, every time stamp :data:`EPOCH`."""
    # Fixed options: the wheels must suit the image's Python whatever interpreter runs this.
    run_tool(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check",
        "--retries", "10", "--no-compile", "--no-warn-conflicts", "--only-binary", ":all:", "--python-version", "3.11",
        *(() if dependencies else ("--no-deps",)), "--target", str(target), *requirements,
    )  # fmt: skip
    shutil.rmtree(target / "bin", ignore_errors=True)  # scripts that name this machine's interpreter
    for directory, _, names in os.walk(target):
        for name in names:
            os.utime(os.path.join(directory, name), (EPOCH, EPOCH), follow_symlinks=False)
    # Some packages ship templates and test data that do not compile: pip itself ignores that, too.
    root = str(target).removesuffix(DIST_PACKAGES)
    subprocess.run(
        [sys.executable, "-m", "compileall", "-qq", "-j", "0", "-s", root, "-p", "/", str(target)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL,
        check=False,
    )


def write_tree(out: io.BufferedIOBase, root: Path) -> None:
    """Append everything below ``root`` to a new tar: names sorted, owned by root, times :data:`EPOCH`."""

    def normal(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = EPOCH
        entry.mode = stat.S_IMODE(entry.mode) & ~0o022
        return entry

    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
        tar.copybufsize = 1 << 20  # type: ignore[assignment]
        for path in sorted(root.rglob("*")):
            tar.add(path, str(path.relative_to(root)), recursive=False, filter=normal)


# --- recipe: an application, with everything a layer can say ---------------------------------------------------------

APPLICATION = '''\
"""Says what the image can do: imports its packages and multiplies two matrices."""

import platform
import sys

import numpy
import requests

matrix = numpy.arange(250_000, dtype=numpy.float64).reshape(500, 500)
print(f"Python {platform.python_version()}, numpy {numpy.__version__}, requests {requests.__version__}")
print(f"trace of a 500x500 product: {numpy.trace(matrix @ matrix.T):.6e}")
sys.exit(0)
'''

CAP_NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
"""``security.capability``: struct vfs_cap_data revision 2, effective, CAP_NET_RAW permitted (linux/capability.h)."""

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, who)
    for tag, permissions, who in (
        (0x01, 6, 0xFFFFFFFF),  # owner
        (0x02, 6, 1000),  # user 1000
        (0x04, 4, 0xFFFFFFFF),  # group
        (0x10, 6, 0xFFFFFFFF),  # mask
        (0x20, 4, 0xFFFFFFFF),  # others
    )
)
"""``system.posix_acl_access`` of a file with mode 0664 (linux/posix_acl_xattr.h)."""


def application(version: int = 1, *, payload: int = 3 << 20) -> Recipe:
    """A small application over Debian: a whiteout of every kind, links, special files, xattrs, changed attributes.

    ``version`` changes the application's code and data, nothing else; ``payload`` is its data's size in bytes.
    """

    def write(out: io.BufferedIOBase) -> None:
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
            for entry, content in application_entries(version, payload):
                tar.addfile(entry, io.BytesIO(content))

    content = io.BytesIO()
    write(content)
    return Recipe("application", {"sha256": hashlib.sha256(content.getbuffer()).hexdigest()}, write)


def application_entries(version: int, payload: int) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The application layer's tar entries and their content."""

    def entry(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, content: bytes = b"", **fields: Any) -> Any:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.mtime, info.size = kind, mode, EPOCH + version, len(content)
        for xattr, value in fields.pop("xattrs", {}).items():
            info.pax_headers[f"SCHILY.xattr.{xattr}"] = value.decode("utf-8", "surrogateescape")
        for field, value in fields.items():
            setattr(info, field, value)
        return info, content

    def directory(name: str, mode: int = 0o755, **fields: Any) -> Any:
        return entry(name, tarfile.DIRTYPE, mode, **fields)

    numbers = random.Random(version)
    data = numbers.randbytes(payload + 17)
    owner = {"uid": 1000, "gid": 1000}

    yield directory("opt")
    yield directory("opt/app", **owner)
    yield entry("opt/app/main.py", mode=0o755, content=APPLICATION.encode(), xattrs={"user.origin": b"demo"}, **owner)
    # A link's header repeats its target's attributes, as every real builder writes it: unpackers differ on the rest.
    yield entry("opt/app/alias.py", tarfile.LNKTYPE, 0o755, linkname="opt/app/main.py", **owner)
    yield entry("opt/app/current", tarfile.SYMTYPE, 0o777, linkname="main.py")
    yield entry("opt/app/VERSION", content=b"%d\n" % version)
    yield entry("opt/app/empty")
    yield entry("opt/app/weights.bin", content=data)
    yield entry("opt/app/weights-copy.bin", content=data)  # the same chunks twice
    yield entry("opt/app/zeros.bin", content=bytes(payload // 2))
    yield entry("opt/app/shared.txt", mode=0o664, content=b"for user 1000\n", xattrs={"system.posix_acl_access": ACL})
    yield entry("opt/app/ping", mode=0o755, content=b"#!/bin/sh\n", xattrs={"security.capability": CAP_NET_RAW})
    yield entry("opt/app/queue", tarfile.FIFOTYPE, 0o600)
    yield entry("opt/app/null", tarfile.CHRTYPE, 0o666, devmajor=1, devminor=3)
    yield entry("opt/app/grüße-世界.txt", content=b"a name in UTF-8\n")
    deep = "opt/app/" + "/".join(f"a-directory-with-a-long-name-{level:02}" for level in range(8))
    for end in range(len("opt/app/"), len(deep) + 1):
        if end == len(deep) or deep[end] == "/":
            yield directory(deep[:end])
    yield entry(f"{deep}/{'n' * 200}", content=b"a path beyond ustar's 256 bytes\n")
    # What the layers below had: a changed directory, a link across layers, whiteouts, an opaque directory.
    yield directory("usr/local/share", 0o2775, gid=50)
    yield entry("usr/local/bin/python", tarfile.LNKTYPE, 0o755, linkname="usr/bin/python3.11", mtime=EPOCH)
    yield entry("etc/.wh.issue.net")
    yield entry("usr/share/.wh.debconf")
    yield directory("usr/share/doc")
    yield entry("usr/share/doc/.wh..wh..opq")
    yield entry("usr/share/doc/README", content=b"Documentation is not part of this image.\n")


# --- images ----------------------------------------------------------------------------------------------------------

DEMO_REQUIREMENTS = ("numpy", "requests", "scipy")


def demo_layers() -> list[Recipe]:
    return [debian(), pypi("demo", *DEMO_REQUIREMENTS), application()]


def demo_image() -> Image:
    """Debian 12 with Python, numpy, scipy and requests under a small application: about 400 MB in three gzip layers."""
    return make_image("demo", demo_layers())


def unpacked(image: Image) -> Path:
    """The image's root file system as ``umoci unpack`` lays it out, owners and xattrs included; needs root. Read only!

    Kept beside the image in the cache: the unpacker is not ours, so its answer does not change with our code.
    """
    place = CACHE / "unpacked" / image.layout.name
    place.parent.mkdir(exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            work = place.with_name(place.name + ".part")
            shutil.rmtree(work, ignore_errors=True)
            run_tool("umoci", "unpack", "--image", image.reference, str(work))
            os.rename(work, place)
    return place / "rootfs"


if __name__ == "__main__":
    image = demo_image()
    say(f"{image.tar_size / 1e6:.0f} MB in {len(image.layers)} layers, {image.blob_size / 1e6:.0f} MB compressed")
    print(f"oci:{image.reference}")
