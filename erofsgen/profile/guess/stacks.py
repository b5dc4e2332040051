"""What well-known packages load beyond what their import statements say, as traces of real imports show it.

A row names a module; what it says happens when that module is imported. Everything is optional: what an image does not
have is passed over, so one row serves many versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Final, NamedTuple


class Stack(NamedTuple):
    """``imports``: modules that are imported by name or by compiled code; ``lazy``: patterns of names, and what is
    imported when such a name is imported from the module; ``files``: what is read, as patterns relative to the
    module's directory; ``libraries``: what is loaded with dlopen(3), likewise; ``without``: full names of modules that
    import statements name but no import runs."""

    imports: tuple[str, ...] = ()
    lazy: tuple[tuple[str, tuple[str, ...]], ...] = ()
    files: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()

    def named(self, names: Iterable[str]) -> Iterator[str]:
        """The modules that are imported where these names are imported from this one."""
        for pattern, modules in self.lazy:
            if any(fnmatchcase(name, pattern) for name in names):
                yield from modules


_NONE: Final = Stack()

_NUMPY_STAR: Final = ("numpy.char", "numpy.ctypeslib", "numpy.f2py", "numpy.fft", "numpy.linalg", "numpy.polynomial",
                      "numpy.random", "numpy.rec", "numpy.strings", "numpy.testing")  # fmt: skip
"""What ``from numpy import *`` imports by name."""

_CONFIG_VARS: Final = tuple(
    f"_sysconfigdata_{middle}_{machine}-linux-{libc}"
    for middle, libc in (("_linux", "gnu"), ("", "gnu"), ("_linux", "musl"))
    for machine in ("x86_64", "aarch64")
)
"""What ``sysconfig.get_config_vars()`` imports; Debian has the second kind."""

_HUB: Final = (
    "huggingface_hub.constants", "huggingface_hub.utils._fixes", "huggingface_hub.utils._validators",
    "huggingface_hub.utils._headers", "huggingface_hub.utils._chunk_utils", "huggingface_hub.utils._datetime",
    "huggingface_hub.utils._hf_uris", "huggingface_hub.utils._safetensors", "huggingface_hub.utils._pagination",
    "huggingface_hub.utils._experimental", "huggingface_hub._commit_api", "huggingface_hub.hf_api",
    "huggingface_hub.repocard", "huggingface_hub._snapshot_download",
)  # fmt: skip

STACKS: Final[dict[str, Stack]] = {
    # the standard library
    "concurrent.futures": Stack(imports=("concurrent.futures.thread",)),
    "importlib.util": Stack(imports=("importlib._abc", "types", "contextlib", "functools", "warnings")),
    "zoneinfo": Stack(imports=_CONFIG_VARS, without=frozenset({"zoneinfo._zoneinfo"})),
    # numerics
    "numpy._core.multiarray": Stack(imports=("numpy._core._exceptions", "numpy.dtypes", "datetime")),
    "numpy.core.multiarray": Stack(imports=("numpy.core._exceptions", "datetime")),
    "numpy.random.bit_generator": Stack(imports=("secrets",)),
    "pandas": Stack(
        imports=("dateutil", "dateutil.tz", "dateutil.easter", "dateutil.parser", "_strptime", "numpy.random")
    ),
    "pandas.compat._constants": Stack(imports=_CONFIG_VARS),
    "scipy._lib._testutils": Stack(imports=_CONFIG_VARS),
    "scipy._lib.array_api_compat.numpy": Stack(imports=(*_NUMPY_STAR, "scipy._lib.array_api_compat.numpy.fft")),
    "scipy.sparse.csgraph": Stack(imports=("scipy.sparse.csgraph._validation",)),
    "sklearn": Stack(files=("utils/_repr_html/*.css",)),
    "sklearn.externals.array_api_compat.numpy": Stack(
        imports=(*_NUMPY_STAR, "sklearn.externals.array_api_compat.numpy.fft")
    ),
    "matplotlib": Stack(files=("mpl-data/matplotlibrc", "mpl-data/stylelib/*.mplstyle")),
    "matplotlib.font_manager": Stack(files=("mpl-data/fonts/ttf/*.ttf", "mpl-data/fonts/*/*.afm")),
    # machine learning
    "jax": Stack(
        imports=("numpy.ma", "jaxlib.mlir.dialects.func", "jaxlib.mlir.dialects.chlo", *_CONFIG_VARS),
        files=tuple(
            f"../{name}-*.dist-info/METADATA"
            for name in ("jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy")
        ),
    ),
    "tensorflow": Stack(
        imports=(
            "tensorflow.python.platform._pywrap_cpu_feature_guard", "tensorflow.python.data.ops.batch_op",
            "tensorflow.python.data.ops.shuffle_op", "tensorflow.python.data.ops.repeat_op", *_CONFIG_VARS,
        ),
    ),
    "torch": Stack(
        files=(
            # sources of configuration modules and of what is scripted
            "__init__.py", "functional.py", "_export/config.py", "_library/custom_ops.py", "_native/registry.py",
            "compiler/config.py", "cuda/__init__.py", "distributed/config.py", "fx/experimental/_config.py",
            "nn/functional.py", "nn/modules/rnn.py", "utils/_debug_mode/_mode.py",
            "../*.dist-info/entry_points.txt",
        ),
        libraries=("lib/libtorch_global_deps.so",),
        without=frozenset({"torch.cuda._sanitizer"}),
    ),
    "transformers": Stack(
        imports=_HUB,
        lazy=(
            ("AutoConfig", ("transformers.models.auto.configuration_auto",)),
            ("*Tokenizer*", ("tokenizers", "transformers.models.auto.tokenization_auto")),
            ("Auto*Processor", ("transformers.models.auto.processing_auto", "torch")),
            ("AutoModel*", ("transformers.models.auto.modeling_auto", "torch")),
            ("*Model", ("transformers.modeling_utils", "torch")),
            ("*For*", ("transformers.modeling_utils", "torch")),
            ("pipeline", ("transformers.pipelines", "tokenizers", "torch")),
            ("Trainer*", ("transformers.trainer", "torch")),
        ),
        files=(
            "models/*/[!m]*.py", "models/*/modeling_*.py", "models/*/*/*.py",
            *(
                f"../{name}-*.dist-info/METADATA"
                for name in (
                    "filelock", "httpcore2", "httpx2", "huggingface_hub", "numpy", "packaging", "pyyaml", "PyYAML",
                    "regex", "safetensors", "tokenizers", "torch", "tqdm",
                )
            ),
        ),
    ),
    # servers
    "certifi.core": Stack(imports=("importlib.readers", "importlib.resources.readers")),
    "django.template": Stack(imports=("django.templatetags.i18n", "django.template.loader_tags")),
    "fastapi": Stack(
        imports=("pydantic.plugin._loader",), files=("../*.dist-info/entry_points.txt",)
    ),
    "gunicorn.app.base": Stack(imports=("asyncio", "gunicorn.glogging", "gunicorn.workers.sync")),
    "sqlalchemy": Stack(imports=("sqlalchemy.sql.default_comparator", "sqlalchemy.engine.default")),
    "sqlalchemy.util.compat": Stack(imports=_CONFIG_VARS),
    "uvicorn": Stack(
        imports=(
            "multiprocessing.connection",
            "uvicorn.lifespan.on", "uvicorn.logging", "uvicorn.loops.auto", "uvicorn.loops.asyncio",
            "uvicorn.protocols.http.auto", "uvicorn.protocols.http.h11_impl", "uvicorn.protocols.websockets.auto",
        ),
    ),
}  # fmt: skip

NEVER: Final = frozenset({
    "_py_abc", "_pydatetime", "_pydecimal", "_pyio", "_py_warnings", "_threading_local", "asyncio.windows_events",
    "asyncio.windows_utils", "ctypes.wintypes", "multiprocessing.popen_spawn_win32", "numpy.core._multiarray_umath",
    "nturl2path", "click._winconsole",
})  # fmt: skip
"""Modules that stand in import statements for other systems, or for when compiled ones are missing."""


def known(name: str) -> Stack:
    """The row of a module, an empty one for most."""
    return STACKS.get(name, _NONE)
