"""Models and other large files that the entrypoint names: in its source, its arguments, its environment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from erofsgen.profile.guess.tree import File, Tree, join

_SUFFIXES: Final = (
    *(b".safetensors", b".bin", b".pt", b".pth", b".ckpt", b".gguf", b".ggml", b".onnx", b".h5", b".hdf5", b".keras"),
    *(b".npz", b".npy", b".tflite", b".pb", b".model", b".msgpack", b".joblib", b".pkl", b".engine", b".plan"),
)
_COMPANIONS: Final = re.compile(
    rb"(?:.*tokenizer.*|.*config\.json|.*\.index\.json|vocab\.\w+|merges\.txt|special_tokens_map\.json|.*\.spm)\Z"
)
_REPOSITORY: Final = re.compile(r"[\w.-]+/[\w.-]+\Z")
_PATH_MAX: Final = 1_000
_FILES_MAX: Final = 1_000


def is_weights(path: bytes) -> bool:
    """Whether a file's name is that of weights."""
    return path.lower().endswith(_SUFFIXES)


def named(tree: Tree, word: str, cwd: str, environment: dict[str, str]) -> Iterator[File]:
    """The files that ``word`` means: a file's path, a directory with a model, a model in the hub's cache."""
    if not 2 < len(word) <= _PATH_MAX or "\0" in word or "\n" in word:
        return
    value = word.partition("=")[2] if word.startswith("-") else word
    path = value.encode("utf-8", "surrogateescape")
    if value.startswith("~/"):
        path = join(environment.get("HOME", "/root").encode("utf-8", "surrogateescape"), path[2:])
    place = join(cwd.encode("utf-8", "surrogateescape"), path)
    file = tree.file(place)
    if file:
        yield file
        return
    yield from _model(tree, place)
    if _REPOSITORY.match(value):
        for directory in _snapshots(tree, value, environment):
            yield from _model(tree, directory)


def _model(tree: Tree, place: bytes) -> Iterator[File]:
    """The files of a directory that holds a model: what describes it first, then weights by their names."""
    directory = tree.directory(place)
    if directory is None or not any(is_weights(name) for name in directory.names):
        return
    weights = sorted(name for name in directory.names if is_weights(name))
    # one format is enough: loaders prefer it
    preferred = [name for name in weights if name.endswith(b".safetensors")] or weights
    companions = sorted(name for name in directory.names if _COMPANIONS.match(name) and name not in preferred)
    for name in [*companions, *preferred][:_FILES_MAX]:
        file = tree.file(join(directory.path, name))
        if file:
            yield file


def _snapshots(tree: Tree, name: str, environment: dict[str, str]) -> Iterator[bytes]:
    """Directories of the Hugging Face hub's cache that hold a repository."""
    home = environment.get("HF_HOME") or environment.get("HOME", "/root") + "/.cache/huggingface"
    hub = environment.get("HF_HUB_CACHE") or environment.get("TRANSFORMERS_CACHE") or home + "/hub"
    snapshots = join(
        hub.encode("utf-8", "surrogateescape"), b"models--" + name.replace("/", "--").encode(), b"snapshots"
    )
    for revision in sorted(tree.names(snapshots))[:8]:
        yield join(snapshots, revision)
