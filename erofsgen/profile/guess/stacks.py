"""What well-known packages load beyond what their import statements say, as traces of real imports show it.

A row names a module; what it says happens when that module is imported. Everything is optional: what an image does not
have is passed over, so one row serves many versions.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Stack(NamedTuple):
    """``imports``: modules that are imported by name or by compiled code; ``files``: what is read, as patterns relative
    to the module's directory; ``libraries``: what is loaded with dlopen(3), likewise; ``without``: full names of modules
    that import statements name but no import runs."""

    imports: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()


_NONE: Final = Stack()

_NUMPY_STAR: Final = ("numpy.char", "numpy.ctypeslib", "numpy.f2py", "numpy.fft", "numpy.linalg", "numpy.polynomial",
                      "numpy.random", "numpy.rec", "numpy.strings", "numpy.testing")  # fmt: skip
"""What ``from numpy import *`` imports by name."""

STACKS: Final[dict[str, Stack]] = {
    # the standard library
    "importlib.util": Stack(imports=("importlib._abc", "types", "contextlib", "functools", "warnings")),
    # numerics
    "numpy._core.multiarray": Stack(imports=("numpy._core._exceptions", "numpy.dtypes", "datetime")),
    "scipy._lib._testutils": Stack(imports=("sysconfig",)),
    "scipy._lib.array_api_compat.numpy": Stack(imports=(*_NUMPY_STAR, "scipy._lib.array_api_compat.numpy.fft")),
    "sklearn.externals.array_api_compat.numpy": Stack(
        imports=(*_NUMPY_STAR, "sklearn.externals.array_api_compat.numpy.fft")
    ),
}

NEVER: Final = frozenset({
    "_py_abc", "_pydatetime", "_pydecimal", "_pyio", "_py_warnings", "_threading_local", "asyncio.windows_events",
    "asyncio.windows_utils", "ctypes.wintypes", "multiprocessing.popen_spawn_win32", "numpy.core._multiarray_umath",
    "nturl2path",
})  # fmt: skip
"""Modules that stand in import statements for other systems, or for when compiled ones are missing."""


def known(name: str) -> Stack:
    """The row of a module, an empty one for most."""
    return STACKS.get(name, _NONE)
