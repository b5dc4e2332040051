"""What every verb shares: its settings, the options that set them, and how it opens a store and images.

A verb is a function decorated with :func:`verb`; it gets the :class:`Settings` first, then its own arguments. Shared
options may stand before or behind the verb; behind wins. Importing this module must stay cheap: the libraries that do
the work are imported where they are used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from erofsgen.errors import UsageError
from erofsgen.host.daemon.planes import LAZY

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from erofsgen.build.options import BuildOptions
    from erofsgen.host.cache.cache import HostCache
    from erofsgen.host.finding import Finding
    from erofsgen.host.mount.state import Plane
    from erofsgen.progress import Progress
    from erofsgen.store.base import Store
    from erofsgen.store.image import Image

F = TypeVar("F", bound=Callable[..., Any])

_SUFFIXES: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Settings:
    """What the shared options and the environment say. Paths are absolute or relative to the working directory."""

    def __init__(self) -> None:
        home = _data_home()
        self._store = os.environ.get("EROFSGEN_STORE")
        self.root: Path = Path(os.environ.get("EROFSGEN_ROOT") or home)
        self.debug = False
        self.quiet = False
        self.json = False
        self.cache_dirs: list[Path] = []
        self.max_bytes: int | None = None

    @property
    def store(self) -> str:
        """The store: given, in the environment, in the configuration, or this user's own. Raises FormatError."""
        if not self._store:
            from erofsgen.host.config import load

            self._store = load().store or str(_data_home() / "store")
        return self._store

    @store.setter
    def store(self, store: str) -> None:
        self._store = store

    @property
    def config(self) -> str | None:
        """The configuration file, if one was named. The processes that this one starts read it, too."""
        return os.environ.get("EROFSGEN_CONFIG")

    @config.setter
    def config(self, path: str) -> None:
        os.environ["EROFSGEN_CONFIG"] = os.path.abspath(path)

    def cache(self) -> HostCache:
        """The host cache, with what the options say of it recorded. Raises StorageError."""
        from erofsgen.host.cache.cache import HostCache

        return HostCache(self.root, directories=self.cache_dirs, max_bytes=self.max_bytes)

    def finding(self, image: str) -> Finding:
        """An image of the store, from now on on its way into the host cache."""
        from erofsgen.host.finding import Finding

        if self.cache_dirs or self.max_bytes is not None:
            self.cache()  # records these before anything is put there
        finding = Finding(self.root, self.store, image)
        context = click.get_current_context(silent=True)
        if context is not None:
            context.call_on_close(finding.close)
        return finding

    def open_store(self, url: str | None = None, *, create: bool = False, change: bool = False) -> Store:
        """The store, or the one at ``url``, until the verb ends. ``change`` readies an OCI layout that another tool
        has written for changes, too.

        Raises NotFoundError where there is none and ``create`` is not set, StorageError, RemoteError.
        """
        from erofsgen.store.open import open_store

        url = self.store if url is None else url
        store = open_store(url, create=create)
        if change and "://" not in url:
            store = open_store(url, create=True)
        context = click.get_current_context(silent=True)
        if context is not None:
            context.call_on_close(store.close)
        return store

    def open_image(self, name: str) -> Image:
        """The image called ``name`` in the store. Raises NotFoundError, FormatError, IntegrityError, StorageError."""
        from erofsgen.store.image import Image

        return Image.open(self.open_store(), name)

    def plane(self, word: str) -> Plane:
        """The plane that the user's word means; says so where ``auto`` means one of the slower ones.

        Raises UnsupportedError where none works.
        """
        from erofsgen.host.mount.mounts import choose

        plane, reasons = choose(word, self.root)
        if plane in ("blockfuse", "fuse") and reasons and not self.quiet:
            click.echo(f"note: plane {plane}, since others do not work here: {'; '.join(reasons)}", err=True)
        return plane

    def progress(self) -> AbstractContextManager[Progress]:
        """Where work shows how far it is: bars on a terminal, lines elsewhere, nothing with ``--quiet``."""
        from erofsgen.cli import progress

        return progress.reporter(sys.stderr, quiet=self.quiet)


def known_name(store: Store, name: str) -> str:
    """The name that ``store`` has for ``name``, see :func:`erofsgen.oci.reference.known_name`."""
    from erofsgen.oci import reference

    return reference.known_name(name, store.references())


def _data_home() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/erofsgen")
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(home) / "erofsgen"


class Verb(click.Command):
    """A command whose on/off options also take a value: ``--tls-verify=false`` means ``--no-tls-verify``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        switches = {
            on: parameter.secondary_opts[0]
            for parameter in self.get_params(ctx)
            if parameter.secondary_opts
            for on in parameter.opts
        }
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*(_switch(arg, switches) for arg in args[:end]), *args[end:]])


def _switch(argument: str, switches: dict[str, str]) -> str:
    option, equals, value = argument.partition("=")
    if not equals or option not in switches:
        return argument
    if value.lower() in ("true", "1"):
        return option
    if value.lower() in ("false", "0"):
        return switches[option]
    raise UsageError(f"{option} is true or false, not {value!r}")


def verb(*, json: bool = False, name: str | None = None) -> Callable[[Callable[..., int | None]], click.Command]:
    """Makes a function ``(settings, …)`` a command; it returns its exit code, None for 0.

    ``json`` says that it prints facts and takes ``--json``.
    """

    def decorate(function: Callable[..., int | None]) -> click.Command:
        command = click.command(name=name, cls=Verb)(click.pass_obj(function))
        command.params.extend(shared_options(json=json))
        return command

    return decorate


def shared_options(*, json: bool) -> list[click.Parameter]:
    """The options that set :class:`Settings`, for the program and for every verb."""
    options: list[click.Parameter] = [
        _option(["--store"], metavar="STORE", help="A directory or URL with images. Environment: EROFSGEN_STORE."),
        _option(["--root"], metavar="HOSTDIR", type=Path, help="Directory of host state. Environment: EROFSGEN_ROOT."),
        _option(["--config"], metavar="FILE", help="The configuration file. Environment: EROFSGEN_CONFIG."),
        _option(["--debug"], is_flag=True, help="Print a traceback with an error."),
        _option(["--quiet", "-q"], is_flag=True, help="Print no progress."),
    ]
    if json:
        options.append(_option(["--json"], is_flag=True, help="Print one JSON document."))
    return options


def _option(names: list[str], **attributes: Any) -> click.Option:  # noqa: ANN401  (click's)
    return click.Option(names, expose_value=False, callback=_set, **attributes)


def _set(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is not None and value is not False and parameter.name:
        setattr(ctx.find_object(Settings), parameter.name, value)


def complete_image(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """The store's images that begin with what has been typed."""
    from click.shell_completion import CompletionItem

    from erofsgen.errors import ErofsgenError

    try:
        names: Sequence[str] = sorted((ctx.find_object(Settings) or Settings()).open_store().references())
    except ErofsgenError:
        names = ()
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def image_argument(name: str = "image", **attributes: Any) -> Callable[[F], F]:  # noqa: ANN401  (click's)
    """An argument that names an image of the store, completed by the shell."""
    return click.argument(name, shell_complete=complete_image, **attributes)


def plane_options(function: F) -> F:
    """The options that say how an image's data comes to this host."""
    for option in (
        click.option(
            "--plane", type=click.Choice(["auto", *LAZY]), metavar="PLANE", default="auto",
            help="How missing data is noticed; auto takes the first that works here.",
        ),
        click.option("--eager", is_flag=True, help="Put all of the image's data on this host first."),
    ):  # fmt: skip
        function = option(function)
    return function


def start_options(function: F) -> F:
    """The options that say what is brought ahead of a start."""
    from erofsgen.host.prefetch.start import MODES

    for option in (
        click.option("--profile", metavar="NAME", help="The name of the profile; by default the command itself."),
        click.option(
            "--prefetch", type=click.Choice(MODES), metavar="|".join(MODES),
            help="What to bring before it is read; auto, the default: by the profile if there is one, else heuristics.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def copy_options(function: F) -> F:
    """The options of copies between stores."""
    for option in (
        click.option("--jobs", type=click.IntRange(1, 256), metavar="N", default=8, help="Blobs at a time."),
        click.option("--as", "name", metavar="NAME", help="What the image is called there."),
    ):
        function = option(function)
    return function


def cache_options(function: F) -> F:
    """The options that say where the cache is and how large it may grow; what is given is recorded."""
    for option in (
        click.option(
            "--max-bytes", type=Size(), metavar="SIZE", expose_value=False, callback=_configure,
            help="What the cache may take on disk, from now on; 0: no limit.",
        ),
        click.option(
            "--cache-dir", multiple=True, type=click.Path(path_type=Path), metavar="DIR", expose_value=False,
            callback=_configure, help="Keep packs here, from now on; several on several disks share the load.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def _configure(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:  # noqa: ANN401  (click's)
    if value is None or value == ():
        return
    settings = ctx.find_object(Settings)
    assert settings is not None
    if parameter.name == "max_bytes":
        settings.max_bytes = value
    else:
        settings.cache_dirs = list(value)


def build_options(function: F) -> F:
    """The options that say how images are read and built; :func:`chosen_options` makes the latter one thing."""
    for option in (
        click.option(
            "--authfile", type=click.Path(), metavar="FILE",
            help="Registry credentials, as podman and skopeo take them.",
        ),
        click.option(
            "--tls-verify/--no-tls-verify", default=True, help="Check the registry's certificate; default: yes."
        ),
        click.option(
            "--guess/--no-guess", default=None, help="Guess what the image's command will read; default: yes."
        ),
        click.option(
            "--share-pages", is_flag=True, default=None, help="Let Linux 7.0 and later share page cache by content."
        ),
        click.option(
            "--dedup/--no-dedup", default=None, help="Use chunks of packs that are in the store; default: yes."
        ),
        click.option("--max-devices", type=int, metavar="N", help="Packs an image may have, 1 to 65535; default: 256."),
        click.option(
            "--threads", type=int, metavar="N", help="Compression threads per image; default: its share of the cores."
        ),
        click.option("--compression-level", type=int, metavar="N", help="zstd level, 1 to 22 or negative; default: 3."),
        click.option(
            "--chunk-size", type=Size(), metavar="SIZE", help="Unit of deduplication, 4K to 16M; default: 1M."
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def chosen_options(given: dict[str, Any]) -> BuildOptions:
    """What :func:`build_options` gave, defaults where the user said nothing. Raises UsageError."""
    from erofsgen.build.options import BuildOptions

    return BuildOptions(**{name: value for name, value in given.items() if value is not None})


class Size(click.ParamType[int]):
    """A number of bytes: ``65536``, ``64K``, ``1M``, ``1MiB``; units are binary."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).upper().removesuffix("B").removesuffix("I")
        number, suffix = (text[:-1], text[-1]) if text[-1:] in _SUFFIXES and text[-1:] else (text, "")
        if not (number.isascii() and number.isdigit()) or len(number) > 18:
            self.fail(f"{value!r} is not a size; write 65536, 64K or 1M", param, ctx)
        return int(number) << _SUFFIXES[suffix]
