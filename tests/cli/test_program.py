"""The program around the verbs: options, errors and exit codes, signals and pipes, completion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from erofsgen import __version__, errors
from erofsgen.cli import main, output
from erofsgen.cli.main import EXIT_CODES, VERBS, program

PROGRAM = Path(sys.executable).with_name("erofsgen")


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.run([PROGRAM, *map(str, arguments)], text=True, timeout=60, **options)


# --- help ------------------------------------------------------------------------------------------------------------


def test_version():
    assert run("--version").stdout == f"erofsgen {__version__}\n"


def test_help_names_every_verb_and_exit_code():
    text = run("--help").stdout
    for verb in VERBS:
        assert f"\n  {verb} " in text
    for code, meaning in EXIT_CODES:
        assert f"{code:<4} {meaning}" in text


def test_every_error_class_has_a_documented_code():
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {kind.exit_code for kind in classes} <= {code for code, _ in EXIT_CODES}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(erofsgen, verb: str):
    text = erofsgen(verb, "--help").out.decode()
    assert f"Usage: erofsgen {verb} " in text
    assert "--store" in text
    summary = program.get_command(None, verb).get_short_help_str(200)  # type: ignore[arg-type]
    assert summary.endswith(".")
    assert len(summary) < 60


def test_help_imports_no_heavy_library():
    """What slows the start down stays out until a verb needs it."""
    code = (
        "import sys; from erofsgen.cli.main import run; run(['--help']);"
        "heavy = {'numpy', 'boto3', 'httpx', 'pyroute2', 'lmdb', 'zstandard', 'rich', 'msgspec', 'asyncio', 'ssl'};"
        "sys.exit(' '.join(sorted(heavy & sys.modules.keys())) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "no such command 'frobnicate'"),
        (["build"], "missing argument 'IMAGE'"),
        (["images", "--nonsense"], "no such option"),
        (["build", "x", "--chunk-size", "1Q"], "'1Q' is not a size"),
        (["build", "x", "--chunk-size", "3K"], "chunk size 3072 is not a power of two"),
        (["build", "x", "--compression-level", "0"], "compression level 0 is not a zstd level"),
        (["build", "x", "--max-devices", "0"], "an image has 1 to 65535 devices"),
        (["build", "x", "--tls-verify=maybe"], "--tls-verify is true or false, not 'maybe'"),
        (["build", "https://registry.example/python"], ""),
        (["extract", "image"], "name either a directory or --tar FILE"),
        (["extract", "image", "somewhere", "--tar", "-"], "name either a directory or --tar FILE"),
    ],
)
def test_wrong_usage(erofsgen, arguments: list[str], message: str):
    assert message in erofsgen(*arguments, code=2).err


def test_no_store(erofsgen):
    for arguments in (["images"], ["inspect", "x"], ["check"], ["gc"], ["rm", "x"], ["ls", "x"], ["diff", "x", "y"]):
        outcome = erofsgen(*arguments, code=3)
        assert outcome.err.splitlines()[0] == f"erofsgen: error: no store at {erofsgen.store}"
        assert outcome.err.splitlines()[1].startswith("hint: ")
        assert outcome.out == b""
    assert not erofsgen.store.exists()


def test_a_store_somewhere_else(erofsgen):
    assert "no gopher stores" in erofsgen("--store", "gopher://host/store", "images", code=2).err


def test_no_such_image(sample):
    for arguments in (
        ["inspect", "x"],
        ["check", "x"],
        ["rm", "x"],
        ["ls", "x"],
        ["cat", "x", "/"],
        ["diff", "x", "y"],
    ):
        assert "no image 'x'" in sample(*arguments, code=3).err


@pytest.mark.parametrize("text", ["", "0" * 7, "sha256:", "g" * 64])
def test_what_is_no_digest_prefix_names_no_image(sample, text: str):
    sample("inspect", text, code=3)
    sample("rm", text, code=3)


def test_digests_name_images(sample):
    digest = sample("inspect", "sample:1", "--json").json["digest"]
    for name in (digest, digest[7:], digest[:20], digest[7:15]):
        assert sample("inspect", name, "--json").json["digest"] == digest


def broken(error: BaseException):
    def command(*_: object, **__: object) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            errors.RemoteError("registry.example: refused", hint="try again"),
            6,
            "registry.example: refused\nhint: try again",
        ),
        (errors.BusyError("two\nlines"), 9, "two lines"),
        (errors.FormatError("name \x1b[31m \udce9"), 4, "name \\x1b[31m \\xe9"),
        (PermissionError(13, "Permission denied", "/some/file"), 7, "/some/file: Permission denied"),
        (
            OSError(28, "No space left on device", b"/caf\xe9"),
            7,
            "/caf\\xe9: No space left on device\nhint: free some space and run the command again",
        ),
        (ConnectionResetError(104, "Connection reset by peer"), 6, "Connection reset by peer"),
        (MemoryError(), 1, "out of memory\nhint: close other programs, or use fewer --threads"),
        (
            ValueError("odd"),
            1,
            "internal error: ValueError: odd\nhint: run the command again with --debug and report what it prints",
        ),
    ],
)
def test_every_failure_is_one_line(erofsgen, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str):
    monkeypatch.setattr("erofsgen.cli.shared.Settings.open_store", broken(error))
    assert erofsgen("images", code=code).err == f"erofsgen: error: {said}\n"


def test_debug_adds_a_traceback(erofsgen):
    done = erofsgen.process("--debug", "images")
    _, err = done.communicate(timeout=60)
    assert done.returncode == 3
    assert b"Traceback (most recent call last)" in err
    assert err.decode().splitlines()[-2] == f"erofsgen: error: no store at {erofsgen.store}"


# --- settings --------------------------------------------------------------------------------------------------------


def test_shared_options_work_on_both_sides_of_the_verb(sample, tmp_path: Path, capfdbinary: pytest.CaptureFixture):
    for arguments in (
        ["--store", str(sample.store), "--json", "images"],
        ["images", "--json", "--store", str(sample.store)],
        ["--store", str(tmp_path / "other"), "--json", "images", "--store", str(sample.store)],
    ):
        assert main.run(arguments) == 0
        assert [image["name"] for image in json.loads(capfdbinary.readouterr().out)] == ["sample:1", "sample:2"]


def test_the_environment_names_store_and_root(sample, tmp_path: Path):
    environment = {**os.environ, "EROFSGEN_STORE": str(sample.store)}
    assert "sample:1" in run("images", env=environment).stdout
    assert str(tmp_path) in run("--store", tmp_path, "images", env=environment).stderr


def test_defaults(monkeypatch: pytest.MonkeyPatch):
    from erofsgen.cli.shared import Settings

    for variable in ("EROFSGEN_STORE", "EROFSGEN_ROOT", "XDG_DATA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert (Settings().store, Settings().root) == ("/var/lib/erofsgen/store", Path("/var/lib/erofsgen"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/user")
    assert Settings().store == "/home/user/.local/share/erofsgen/store"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert (Settings().store, Settings().root) == ("/data/erofsgen/store", Path("/data/erofsgen"))
    monkeypatch.setenv("EROFSGEN_ROOT", "/elsewhere")
    assert (Settings().store, Settings().root) == ("/data/erofsgen/store", Path("/elsewhere"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], True), (["--no-tls-verify"], False), (["--tls-verify=false"], False), (["--tls-verify=true"], True)],
)
def test_tls_verify_as_podman_takes_it(
    erofsgen, monkeypatch: pytest.MonkeyPatch, given: list[str], expected: bool, tmp_path: Path
):
    from erofsgen.oci import images

    seen = {}

    def open_image(name: str, **options):
        seen.update(options, name=name)
        raise errors.RemoteError("enough")

    monkeypatch.setattr(images, "open_image", open_image)
    erofsgen("build", *given, "docker://python", code=6)
    assert (seen["tls_verify"], seen["name"]) == (expected, "docker://python")


# --- signals and pipes -----------------------------------------------------------------------------------------------


def test_interrupting_a_build(erofsgen, tmp_path: Path):
    """^C ends a build at once, with 130, nothing half-made and no traceback."""
    pipe = tmp_path / "slow.tar"
    os.mkfifo(pipe)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        build = erofsgen.process("build", f"tar:{pipe}")
        writer = os.open(pipe, os.O_WRONLY)  # waits for the reader: the build has begun
        time.sleep(0.3)
        build.send_signal(number)
        _, err = build.communicate(timeout=60)
        os.close(writer)
        assert build.returncode == code
        assert b"Traceback" not in err
    assert os.listdir(erofsgen.store / "erofsgen" / "tmp") == []
    assert erofsgen("images", "--json").json == []


def test_a_closed_pipe_is_no_error(sample):
    """``erofsgen cat … | head -c 10``"""
    for arguments in (
        ["cat", "sample:1", "data/big"],
        ["ls", "-lR", "sample:1"],
        ["extract", "sample:1", "--tar", "-"],
    ):
        cat = sample.process(*arguments)
        assert cat.stdout
        os.read(cat.stdout.fileno(), 10)
        cat.stdout.close()
        assert cat.stderr
        assert cat.stderr.read() in (b"", b"erofsgen: archiving sample:1\n")
        cat.stderr.close()
        assert cat.wait(60) in (0, 128 + signal.SIGPIPE)


def test_a_full_output_is_an_error(sample):
    with open("/dev/full", "w") as full:
        for arguments in (["images"], ["cat", "sample:1", "data/big"], ["inspect", "sample:1", "--json"]):
            done = sample.process(*arguments, stdout=full)
            _, err = done.communicate(timeout=60)
            assert done.returncode == 7
            assert err.decode().splitlines()[0] == "erofsgen: error: No space left on device"
            assert b"Traceback" not in err
            assert b"Exception ignored" not in err


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_goes_to_standard_error(sample, tmp_path: Path):
    assert sample("check", "sample:1").err.splitlines()[0] == "erofsgen: checking indexes (1)"
    assert sample("--quiet", "check", "sample:1").err == ""
    assert sample("check", "sample:1", "-q").err == ""


def test_bars_on_a_terminal(sample, tmp_path: Path):
    """A terminal gets bars, and is left clean: no line of progress remains."""
    outer, inner = os.openpty()
    done = sample.process("check", "sample:1", stderr=inner, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    os.close(inner)
    drawn = b""
    while True:
        try:
            piece = os.read(outer, 65536)
        except OSError:  # EIO: the other side has closed
            break
        drawn += piece
    os.close(outer)
    done.communicate(timeout=60)
    assert done.returncode == 0
    assert b"checking" in drawn
    assert b"\x1b[?25h" in drawn  # the cursor is visible again
    assert b"\x1b[2K" in drawn  # and the bars are erased


# --- output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_sizes(count: int, text: str):
    assert output.size(count) == text


def test_no_name_can_drive_a_terminal():
    assert output.printable(b"caf\xe9 \x1b[2J \\ \xc2\x9b") == "caf\\xe9 \\x1b[2J \\\\ \\xc2\\x9b"
    assert output.printable("grüße.txt") == "grüße.txt"
    names = [bytes([a, b]) for a in range(1, 256) for b in range(1, 256)]
    shown = [output.printable(name) for name in names]
    assert all(name.isprintable() for name in shown)
    assert len(set(shown)) == len(names)


# --- completion ------------------------------------------------------------------------------------------------------


def complete(store: Path, *words: str) -> list[str]:
    environment = {
        **os.environ,
        "_EROFSGEN_COMPLETE": "bash_complete",
        "EROFSGEN_STORE": str(store),
        "COMP_WORDS": " ".join(["erofsgen", *words]),
        "COMP_CWORD": str(len(words)),
    }
    return [line.partition(",")[2] for line in run(env=environment).stdout.splitlines() if line]


def test_completion(sample, tmp_path: Path):
    assert complete(sample.store, "ma") == []
    assert complete(sample.store, "mo") == ["mount", "mounts"]
    assert complete(sample.store, "inspect", "sam") == ["sample:1", "sample:2"]
    assert complete(sample.store, "diff", "sample:1", "sample:2") == ["sample:2"]
    assert complete(tmp_path / "none", "inspect", "") == []
    assert "--tag" in complete(sample.store, "build", "--t")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(erofsgen, shell: str, tmp_path: Path):
    script = erofsgen("completion", shell).out
    assert b"_EROFSGEN_COMPLETE" in script
    if shell == "bash":
        (tmp_path / "script").write_bytes(script)
        subprocess.run(["bash", "-n", tmp_path / "script"], check=True)
