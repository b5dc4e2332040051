"""The program: finds the verb, runs it, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import click

from erofsgen import __version__
from erofsgen.cli.shared import Settings, shared_options
from erofsgen.errors import Explanation, explain

VERBS: Final = (
    "build",
    "build-many",
    "images",
    "inspect",
    "ls",
    "cat",
    "explain",
    "extract",
    "check",
    "diff",
    "rm",
    "gc",
    "push",
    "pull",
    "copy",
    "cache",
    "profile",
    "optimize",
    "mount",
    "umount",
    "mounts",
    "daemon",
    "fscached",
    "fuse",
    "status",
    "top",
    "config",
    "run",
    "doctor",
    "completion",
)
"""In the order ``--help`` lists them; ``erofsgen.cli.<verb>``, without the dash, defines the command as ``command``."""

EXIT_CODES: Final = (
    (0, "success"),
    (1, "an error not listed here, or differences with `diff --exit-code`"),
    (2, "the command line or an image reference is malformed"),
    (3, "no such image, tag, path or blob"),
    (4, "bytes are not what their format says"),
    (5, "bytes are not what their digest or length says, or `check` or `cache verify` found something"),
    (6, "a registry or a store refused or could not be reached"),
    (7, "the local disk refused: full, read-only, permission"),
    (8, "understood, but not possible here"),
    (9, "somebody else holds what is needed: a lock, a mount"),
    (130, "interrupted (128 + the signal's number for others)"),
)

_EPILOG: Final = "\b\nExit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES)


class Program(click.Group):
    """Imports a verb's module when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"erofsgen.cli.{cmd_name.replace('-', '')}").command
        assert isinstance(command, click.Command)
        return command


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:  # noqa: ARG001
    if value:
        click.echo(f"erofsgen {__version__}")
        ctx.exit()


program = Program(
    "erofsgen",
    params=[
        *shared_options(json=True),
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
        ),
    ],
    help="Container images as EROFS indexes and content-addressed packs, mounted by the kernel's own EROFS.",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
"""The command line, as click sees it."""


def main() -> NoReturn:
    """Entry point of the ``erofsgen`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    instruction = os.environ.get("_EROFSGEN_COMPLETE")
    if instruction:
        from click.shell_completion import shell_complete

        return shell_complete(program, {"obj": Settings()}, "erofsgen", "_EROFSGEN_COMPLETE", instruction)
    settings = Settings()
    try:
        code = _invoke(arguments, settings)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (the one place that reports)
        if settings.debug:
            import traceback

            traceback.print_exception(error)
        return _report(error)
    return code


def _invoke(arguments: Sequence[str], settings: Settings) -> int:
    try:
        with program.make_context("erofsgen", list(arguments), obj=settings) as context:
            return program.invoke(context) or 0
    except click.exceptions.Exit as leaving:  # --help, --version
        return leaving.exit_code


def _report(error: BaseException) -> int:
    """Say what went wrong on standard error, as one line and a hint; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        _discard_output()
        return 128 + signal.SIGPIPE
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        _say("interrupted")
        return 128 + signal.SIGINT
    message, hint, code = _explain(error)
    _say(f"error: {message}")
    if hint:
        _say_line(f"hint: {hint}")
    if isinstance(error, OSError):
        _discard_output()  # what is still buffered cannot be written either
    return code


def _explain(error: BaseException) -> Explanation:
    if isinstance(error, click.ClickException):
        context: Any = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "erofsgen"
        message = error.format_message().rstrip(".")
        return Explanation(message[:1].lower() + message[1:], f"see `{where} --help`", error.exit_code)
    return explain(error)


def _say(text: str) -> None:
    _say_line(f"erofsgen: {text}")


def _say_line(text: str) -> None:
    from erofsgen.cli.output import one_line

    try:
        sys.stderr.write(one_line(text) + "\n")
        sys.stderr.flush()
    except (OSError, AttributeError):
        pass  # nobody listens


def _discard_output() -> None:
    """Nobody reads standard output any more: let the interpreter's last flush go nowhere."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    except OSError:
        pass


def _terminate(number: int, frame: object) -> NoReturn:  # noqa: ARG001  (a signal handler's arguments)
    raise SystemExit(128 + number)
