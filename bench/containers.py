"""The containers whose starts are measured: images as fat as real ones are, of which a start touches a part.

===========  ========  ============================================  ==================================================
container    unpacked  ready when                                    beside what a start touches
===========  ========  ============================================  ==================================================
``numeric``  0.7 GB    numpy, scipy and pandas are imported          matplotlib, scikit-learn, statsmodels, plotly
``torch``    1.9 GB    torch is imported, 512 MiB of weights loaded  transformers and what it needs, torch's own tests
``web``      0.7 GB    FastAPI has answered the first request        celery, boto3, pandas, scikit-learn, lxml
``quick``    0.4 GB    numpy and scipy are imported                  requests; for ``--quick``
===========  ========  ============================================  ==================================================

All are Debian 12 with its Python 3.11 under packages from PyPI, in gzip layers. One package of ``numeric`` and of
``web`` has no compiled byte code, as ``pip install --no-compile`` leaves it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import images
import numpy as np
from images import Image, Recipe, imagemaker  # which lets the tests' modules be found

if TYPE_CHECKING:
    from typing_extensions import Buffer

MIB = 1 << 20

PORT = "PORT"
"""The variable that tells a web server where to listen."""


@dataclass(frozen=True)
class Container:
    """An image and the command that is run in it. ``serves``: it is ready when it answers on :data:`PORT`, otherwise
    when it has ended."""

    name: str
    image: Callable[[], Image]
    command: tuple[str, ...]
    serves: bool = False


# --- applications ----------------------------------------------------------------------------------------------------

TORCH = '''\
"""Loads a model's weights and looks at every one of them."""

import torch
from safetensors.torch import load_file

weights = load_file("/srv/model/model.safetensors")
total = sum(tensor.sum(dtype=torch.float64).item() for tensor in weights.values())
print(f"torch {torch.__version__}: {len(weights)} tensors, sum {total:.6e}")
'''

WEB = '''\
"""A catalogue: a page and an interface to a small database."""

import os

import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader
from pydantic import BaseModel
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Answer(BaseModel):
    number: int
    name: str


engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
Base.metadata.create_all(engine)
with Session(engine) as session:
    session.add_all(Item(number=number, name=f"item {number}") for number in range(20))
    session.commit()

pages = Environment(loader=FileSystemLoader("/srv/app/pages"), autoescape=True)
app = FastAPI()


@app.get("/", response_class=HTMLResponse)
def index() -> str:
    with Session(engine) as session:
        return pages.get_template("index.html").render(items=list(session.scalars(select(Item))))


@app.get("/items/{number}")
def item(number: int) -> Answer:
    with Session(engine) as session:
        found = session.get_one(Item, number)
        return Answer(number=found.number, name=found.name)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")
'''

PAGE = """\
<!doctype html>
<title>Catalogue</title>
<ul>{% for item in items %}<li><a href="/items/{{ item.number }}">{{ item.name }}</a>{% endfor %}</ul>
"""


def files(name: str, content: Mapping[str, bytes]) -> Recipe:
    """A layer of these files, and the directories they are in."""

    def write(out: io.BufferedIOBase) -> None:
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            add_directories(tar, content)
            for path, data in content.items():
                tar.addfile(regular(path, len(data)), io.BytesIO(data))

    digests = {path: hashlib.sha256(data).hexdigest() for path, data in content.items()}
    return Recipe(name, digests, write)


def regular(path: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.mode, entry.mtime, entry.size = 0o644, imagemaker.EPOCH, size
    return entry


def add_directories(tar: tarfile.TarFile, paths: Mapping[str, object]) -> None:
    parents = {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)}
    for directory in sorted(parents):
        entry = tarfile.TarInfo(directory)
        entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, imagemaker.EPOCH
        tar.addfile(entry)


# --- a model ---------------------------------------------------------------------------------------------------------

_LAYERS, _WIDTH, _INNER = 22, 1024, 768
_EXPONENT, _LOWEST = np.uint32(0x7F80_0000), np.uint32(0x0080_0000)


def tensors(mebibytes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as a language model has them; float32, ``mebibytes`` in all."""
    left = mebibytes * MIB // 4
    for layer in range(_LAYERS):
        for part, shape in (
            *((f"attention.{each}.weight", (_WIDTH, _WIDTH)) for each in ("query", "key", "value", "output")),
            ("up.weight", (_INNER, _WIDTH)),
            ("down.weight", (_WIDTH, _INNER)),
            *((f"norm.{number}.weight", (_WIDTH,)) for number in (1, 2, 3)),
        ):
            left -= math.prod(shape)
            yield f"layers.{layer}.{part}", shape
    yield "norm.weight", (_WIDTH,)
    yield "embedding.weight", (left // _WIDTH - 1, _WIDTH)


def weights(mebibytes: int = 512) -> Recipe:
    """``srv/model/model.safetensors``: finite random numbers that nothing compresses.

    The format: 8 bytes of the header's length, the header in JSON padded with spaces, the tensors one after the other
    (https://huggingface.co/docs/safetensors, *Format*).
    """
    path = "srv/model/model.safetensors"
    shapes = dict(tensors(mebibytes))
    sizes = [4 * math.prod(shape) for shape in shapes.values()]

    def write(out: io.BufferedIOBase) -> None:
        header: dict[str, object] = {}
        end = 0
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=MIB) as tar:
            add_directories(tar, {path: None})
            pieces = itertools.chain([len(encoded).to_bytes(8, "little"), encoded], _random_floats(sizes))
            tar.addfile(regular(path, 8 + len(encoded) + end), io.BufferedReader(_Pieces(pieces), MIB))

    return Recipe("weights", {"format": 1, "shapes": list(shapes.items())}, write)


def _random_floats(sizes: Sequence[int]) -> Iterator[bytes]:
    numbers = np.random.default_rng(1)
    for size in sizes:
        bits = np.frombuffer(numbers.bytes(size), np.uint32).copy()
        bits[bits & _EXPONENT == _EXPONENT] ^= _LOWEST  # neither infinite nor no number
        yield bits.tobytes()


class _Pieces(io.RawIOBase):
    """A file of these pieces, each made when it is read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        if not self._piece:
            self._piece = memoryview(next(self._pieces, b""))
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._piece))
        target[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


NUMERIC = ("python3", "-c", "import numpy, scipy, pandas")
APPLICATION = ("python3", "/srv/app/main.py")
QUICK = ("python3", "-c", "import numpy, scipy")
"""What the images run, by their own configs, too."""


# --- images ----------------------------------------------------------------------------------------------------------


def numeric() -> Image:
    packages = imagemaker.pypi(
        "numeric", "numpy", "scipy", "pandas", "matplotlib", "scikit-learn", "statsmodels", "plotly",
        sources_only=("dateutil",),
    )  # fmt: skip
    return imagemaker.make_image("numeric", [imagemaker.debian(), packages], NUMERIC)


def torch() -> Image:
    layers = [
        imagemaker.debian(),
        # Without what it depends on: a registry's default build may name gigabytes of GPU libraries.
        imagemaker.pypi("torch", *images.TORCH, dependencies=False),
        imagemaker.pypi("transformers", *images.TORCH_DEPENDENCIES, "numpy", "safetensors", "transformers"),
        weights(),
        files("torch-application", {"srv/app/main.py": TORCH.encode()}),
    ]
    return imagemaker.make_image("torch", layers, APPLICATION)


def web() -> Image:
    packages = imagemaker.pypi(
        "web", "fastapi", "uvicorn", "jinja2", "sqlalchemy", "alembic", "boto3", "celery", "cryptography", "lxml",
        "numpy", "pandas", "pillow", "psycopg[binary]", "redis", "scikit-learn", "sentry-sdk",
        sources_only=("click",),
    )  # fmt: skip
    content = {"srv/app/main.py": WEB.encode(), "srv/app/pages/index.html": PAGE.encode()}
    return imagemaker.make_image("web", [imagemaker.debian(), packages, files("web-application", content)], APPLICATION)


def quick() -> Image:
    """The demo image without its application, which has a link to a lower layer: containerd does not unpack that."""
    return imagemaker.make_image("quick", imagemaker.demo_layers()[:2], QUICK)


CONTAINERS = {
    container.name: container
    for container in (
        Container("numeric", numeric, NUMERIC),
        Container("torch", torch, APPLICATION),
        Container("web", web, APPLICATION, serves=True),
        Container("quick", quick, QUICK),
    )
}
