"""The images the benchmarks run on, made and cached by the tests' image maker.

================  =========  ==============  =========================================================================
image             data       files           layers
================  =========  ==============  =========================================================================
``service``       2.3 GB     60,000          Debian 12 + Python, torch, scientific Python, an application; gzip
``changed``       the same   the same        ``service`` with one more small layer: the application's next version
``large``         8.3 GB     95,000          ``service`` between synthetic layers, each chunk unique; gzip
``files-100k``    0.05 GB    100,000         one plain tar of small unique files
``files-1m``      0.5 GB     1,000,000       the same, ten times
================  =========  ==============  =========================================================================

``python bench/images.py NAME...`` makes them and prints their ``oci:`` references.
"""

from __future__ import annotations

import io
import itertools
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from isal import isal_zlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import imagemaker
from imagemaker import Compressor, Image, Recipe

TORCH = ("torch==2.13.0",)
TORCH_DEPENDENCIES = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")
SCIENCE = (
    "boto3", "botocore", "matplotlib", "opencv-python-headless", "pandas", "plotly", "polars", "pyarrow", "requests",
    "scikit-learn", "scipy", "transformers",
)  # fmt: skip


def service_layers() -> list[Recipe]:
    """A machine-learning service: what such an image is made of, in the layers a Dockerfile would give it."""
    return [
        imagemaker.debian(),
        # Without what it depends on: a registry's default build may name gigabytes of GPU libraries.
        imagemaker.pypi("torch", *TORCH, dependencies=False),
        imagemaker.pypi("torch-dependencies", *TORCH_DEPENDENCIES),
        imagemaker.pypi("science", *SCIENCE),
        imagemaker.application(1),
    ]


def service() -> Image:
    """At least 2 GB and 40,000 files in five gzip layers."""
    return imagemaker.make_image("service", service_layers())


def changed() -> Image:
    """``service`` after one more build of its application: one small layer on top."""
    return imagemaker.make_image("changed", [*service_layers(), imagemaker.application(2)])


def large() -> Image:
    """``service`` with six gigabytes of data more: memory must not follow the image's size."""
    layers = [fast_gzip_layer(f"weights-{number}", number, 2_000_000_000) for number in (1, 2, 3)]
    return imagemaker.make_image("large", [*service_layers(), *layers])


def small_files(count: int) -> Image:
    """``count`` files of 1 to 999 bytes, 250 to a directory, in one uncompressed layer."""
    name = {100_000: "files-100k", 1_000_000: "files-1m"}.get(count, f"files-{count}")

    def write(out: io.BufferedIOBase) -> None:
        out.writelines(_small_file_tar(count))

    return imagemaker.make_image(name, [Recipe(name, {"format": 2, "count": count}, write, compressor=None)])


def quick() -> Image:
    """A small stand-in for ``service``: the demo image."""
    return imagemaker.make_image("demo", imagemaker.demo_layers())


def quick_changed() -> Image:
    """A small stand-in for ``changed``."""
    return imagemaker.make_image("quick-changed", [*imagemaker.demo_layers(), imagemaker.application(2)])


def quick_large() -> Image:
    """A small stand-in for ``large``: four times ``quick``."""
    return imagemaker.make_image(
        "quick-large", [*imagemaker.demo_layers(), fast_gzip_layer("weights-quick", 9, 900_000_000)]
    )


IMAGES = {
    "service": service,
    "changed": changed,
    "large": large,
    "files-100k": lambda: small_files(100_000),
    "files-1m": lambda: small_files(1_000_000),
}


# --- synthetic layers ------------------------------------------------------------------------------------------------


def _isal_gzip() -> Compressor:
    """Gzip at memory-bus speed, for gigabytes that only have to be there."""
    return isal_zlib.compressobj(1, isal_zlib.DEFLATED, 31)


def fast_gzip_layer(name: str, seed: int, size: int) -> Recipe:
    """``size`` bytes in files like those of data sets and model weights: log-normal sizes, no chunk like another.

    The bytes compress about as well as shared libraries do: half of them random, half of them from a small alphabet.
    """

    def write(out: io.BufferedIOBase) -> None:
        numbers = np.random.default_rng(seed)
        pool = numbers.integers(0, 256, 64 << 20, dtype=np.uint8)
        pool.reshape(-1, 1024)[::2] &= 0x07
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
            for directory in ("srv", f"srv/{name}"):
                entry = tarfile.TarInfo(directory)
                entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, imagemaker.EPOCH
                tar.addfile(entry)
            left = size
            for number in itertools.count():
                if left <= 0:
                    break
                length = min(left, int(np.clip(numbers.lognormal(10.2, 1.9), 100, 48 << 20)))
                left -= length
                start = int(numbers.integers(0, len(pool) - length))
                data = pool[start : start + length].copy()
                stamps = data[: len(data) // 4096 * 4096].reshape(-1, 4096)
                stamps[:, :8] = np.frombuffer((seed << 48 | number).to_bytes(8, "little"), np.uint8)
                entry = tarfile.TarInfo(f"srv/{name}/{number // 500:04}/{number:06}.bin")
                entry.mode, entry.mtime, entry.size = 0o644, imagemaker.EPOCH, length
                tar.addfile(entry, io.BytesIO(data.data))

    return Recipe(name, {"format": 1, "seed": seed, "size": size}, write, compressor=_isal_gzip)


_PER_DIRECTORY = 250


def _small_file_tar(count: int) -> Iterator[bytes]:
    """A tar of ``count`` files, about a microsecond's work each: one header template, its checksum kept up by hand."""
    pool = np.random.default_rng(count).integers(97, 123, 1 << 20, dtype=np.uint8).tobytes()
    sizes = np.random.default_rng(0).integers(1, 1000, count).tolist()

    def template(kind: bytes, mode: int) -> tuple[bytes, int]:
        entry = tarfile.TarInfo("")
        entry.type, entry.mode, entry.mtime = kind, mode, imagemaker.EPOCH
        header = entry.tobuf(tarfile.USTAR_FORMAT)
        return header, sum(header[100:148]) + 8 * 32 + sum(header[156:])

    def header(template: tuple[bytes, int], name: bytes, size: int) -> bytes:
        base, checksum = template
        digits = b"%011o" % size
        checksum += sum(name) + sum(digits) - 11 * 48
        return b"".join(
            (name.ljust(100, b"\0"), base[100:124], digits, base[135:148], b"%06o\0 " % checksum, base[156:])
        )

    files, directories = template(tarfile.REGTYPE, 0o644), template(tarfile.DIRTYPE, 0o755)
    yield header(directories, b"data/", 0)
    for first in range(0, count, _PER_DIRECTORY):
        directory = b"data/%05d/" % (first // _PER_DIRECTORY)
        pieces = [header(directories, directory, 0)]
        for number in range(first, min(count, first + _PER_DIRECTORY)):
            size = sizes[number]
            start = number * 7919 % (len(pool) - 1024)
            content = (b"%d\n" % number + pool[start : start + size])[:size]
            pieces += header(files, b"%sfile-%07d.txt" % (directory, number), size), content, bytes(-size % 512)
        yield b"".join(pieces)
    yield bytes(1024)


if __name__ == "__main__":
    for image in (IMAGES[name]() for name in sys.argv[1:] or IMAGES):
        imagemaker.say(f"{image.tag}: {image.tar_size / 1e6:.0f} MB of tar, {image.blob_size / 1e6:.0f} MB in blobs")
        print(f"oci:{image.reference}")
