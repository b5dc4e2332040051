"""An OCI runtime bundle's config.json, from an image's config and what the user asked for.

The result follows the OCI runtime specification 1.0.2 and the image specification's "Conversion to OCI Runtime
Configuration"; what those leave open (capabilities, masked paths, mounts) is podman's. There is no seccomp profile.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from erofsgen.errors import FormatError, NotFoundError, UsageError
from erofsgen.host.container.rootfs import Rootfs
from erofsgen.host.container.users import User, find_user

Network = Literal["host", "none"]

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are looked for in an image that does not say."""

CAPABILITIES: Final = tuple(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE"),
        *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
    )
)
_MASKED: Final = (
    *("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi"),
    *("/proc/timer_list", "/proc/timer_stats", "/sys/dev/block", "/sys/devices/virtual/powercap", "/sys/firmware"),
    "/sys/fs/selinux",
)
_READ_ONLY: Final = ("/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_DESCRIPTORS: Final = 1 << 20


@dataclass(frozen=True)
class Volume:
    """A file or directory of the host, shown in the container."""

    source: Path
    target: str
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Volume:
        """``SRC:DST[:ro|rw]``. Raises UsageError, NotFoundError (no such SRC)."""
        source, *rest = text.split(":")
        target, access = rest if len(rest) == 2 else (*rest, "rw") if len(rest) == 1 else ("", "")
        if access not in ("ro", "rw") or not source or not target.startswith("/"):
            raise UsageError(f"volume {text!r} is not SRC:DST[:ro], with an absolute DST")
        if not os.path.exists(source):
            raise NotFoundError(f"volume {text!r}: no {source} on this host", hint="there are no named volumes here")
        return cls(Path(os.path.realpath(source)), os.path.normpath(target), access == "ro")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user says about a container beyond naming the image. None: as the image says.

    ``environment`` wins over the image's. An ``entrypoint`` makes the image's Cmd void, too.
    """

    command: Sequence[str] = ()
    entrypoint: Sequence[str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None
    user: str | None = None
    volumes: Sequence[Volume] = ()
    hostname: str | None = None
    network: Network = "host"
    read_only: bool = False
    terminal: bool = False


class _Process(msgspec.Struct, rename="pascal"):
    """The part of an image's config that says what to run. Docker writes null for what is absent."""

    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None


def write_bundle(bundle: Path, rootfs: Path, image: Mapping[str, Any], options: Options, *, identity: str) -> None:
    """Make directory ``bundle`` a bundle over the mounted ``rootfs``, which must be writable.

    ``image`` is the image's config, decoded. The working directory is made where it is missing.

    Raises UsageError (no command), NotFoundError (no such user, group or program in the image), FormatError,
    StorageError.
    """
    inside = Rootfs(rootfs)
    config = runtime_config(inside, image, options, identity=identity)
    process = config["process"]
    inside.make_directory(process["cwd"])
    _require_program(inside, process["args"][0], process["env"], process["cwd"], options.volumes)
    taken = {volume.target for volume in options.volumes}
    for name, content in _host_files(options.network, config["hostname"]):
        if f"/etc/{name}" not in taken:
            (bundle / name).write_bytes(content)
            (bundle / name).chmod(0o644)
            config["mounts"].append(_bind(bundle / name, f"/etc/{name}", read_only=False))
    (bundle / "config.json").write_text(json.dumps(config, indent=1))


def command_of(image: Mapping[str, Any], options: Options) -> tuple[list[str], dict[str, str], str]:
    """What a container runs: its arguments, its environment but for what depends on its user, its working directory.

    Raises FormatError, UsageError (no command).
    """
    wanted = _process(image)
    environment = {"PATH": PATH, **dict(_pairs(wanted.env or ())), **options.environment}
    return _arguments(wanted, options), environment, options.workdir or wanted.working_dir or "/"


def runtime_config(rootfs: Rootfs, image: Mapping[str, Any], options: Options, *, identity: str) -> dict[str, Any]:
    """config.json, without the host's files."""
    wanted = _process(image)
    user = find_user(rootfs, wanted.user or "" if options.user is None else options.user)
    workdir = options.workdir or wanted.working_dir or "/"
    if not workdir.startswith("/"):
        raise UsageError(f"working directory {workdir!r} is not absolute")
    hostname = options.hostname or identity
    capabilities = list(CAPABILITIES)
    held = capabilities if user.uid == 0 else []
    process: dict[str, Any] = {
        "terminal": options.terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": _arguments(wanted, options),
        "env": [f"{name}={value}" for name, value in _environment(wanted, options, user, hostname).items()],
        "cwd": os.path.normpath(workdir),
        "capabilities": {"bounding": capabilities, "effective": held, "permitted": held},
        "rlimits": [_descriptor_limit()],
        "noNewPrivileges": False,
    }
    namespaces = ["pid", "ipc", "uts", "mount", "cgroup", *(["network"] if options.network == "none" else [])]
    return {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": os.fspath(rootfs.path), "readonly": options.read_only},
        "hostname": hostname,
        "mounts": list(_mounts(options)),
        "annotations": dict(_annotations(image, wanted)),
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
        },
    }


def _process(image: Mapping[str, Any]) -> _Process:
    try:
        return msgspec.convert(image.get("config") or {}, _Process)
    except msgspec.ValidationError as error:
        raise FormatError(f"the image's config: {error}") from None


def _pairs(settings: Sequence[str]) -> Iterator[tuple[str, str]]:
    for setting in settings:
        name, _, value = setting.partition("=")
        yield name, value


def _arguments(wanted: _Process, options: Options) -> list[str]:
    if options.entrypoint is not None:
        arguments = [*options.entrypoint, *options.command]
    else:
        arguments = [*(wanted.entrypoint or ()), *(options.command or wanted.cmd or ())]
    if not arguments or not arguments[0]:
        raise UsageError("the image names no command", hint="write one behind the image's name")
    return arguments


def _environment(wanted: _Process, options: Options, user: User, hostname: str) -> dict[str, str]:
    environment = {"PATH": PATH, "HOME": user.home, "HOSTNAME": hostname}
    if options.terminal:
        environment["TERM"] = "xterm"
    return {**environment, **dict(_pairs(wanted.env or ())), **options.environment}


def _descriptor_limit() -> dict[str, Any]:
    """As podman sets it, where this process's own limit allows."""
    own = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = _DESCRIPTORS if own == resource.RLIM_INFINITY else min(own, _DESCRIPTORS)
    return {"type": "RLIMIT_NOFILE", "soft": limit, "hard": limit}


def _mounts(options: Options) -> Iterator[dict[str, Any]]:
    taken = {volume.target for volume in options.volumes}
    quiet = ["nosuid", "noexec", "nodev"]
    pseudo = [
        ("/proc", "proc", quiet),
        ("/dev", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        ("/dev/shm", "tmpfs", [*quiet, "mode=1777", "size=65536k"]),  # noqa: S108  (the container's)
        ("/dev/mqueue", "mqueue", quiet),
        ("/sys", "sysfs", [*quiet, "ro"]),
        ("/sys/fs/cgroup", "cgroup", [*quiet, "relatime", "ro"]),
    ]
    if options.read_only:
        pseudo += [(place, "tmpfs", ["nosuid", "nodev", "mode=1777"]) for place in ("/tmp", "/var/tmp")]  # noqa: S108
        pseudo.append(("/run", "tmpfs", ["nosuid", "nodev", "mode=755"]))
    for target, kind, flags in pseudo:
        if target not in taken:
            yield {"destination": target, "type": kind, "source": kind, "options": flags}
    for volume in options.volumes:
        yield _bind(volume.source, volume.target, read_only=volume.read_only)


def _bind(source: Path, target: str, *, read_only: bool) -> dict[str, Any]:
    flags = ["rbind", "rprivate", "ro" if read_only else "rw"]
    return {"destination": target, "type": "bind", "source": os.fspath(source), "options": flags}


def _annotations(image: Mapping[str, Any], wanted: _Process) -> Iterator[tuple[str, str]]:
    """As the image specification says, labels last: they win."""
    for name in ("os", "architecture", "variant", "author", "created"):
        if isinstance(image.get(name), str):
            yield f"org.opencontainers.image.{name}", image[name]
    if wanted.stop_signal:
        yield "org.opencontainers.image.stopSignal", wanted.stop_signal
    yield from (wanted.labels or {}).items()


def _host_files(network: Network, hostname: str) -> Iterator[tuple[str, bytes]]:
    """Copies, so that a container changes its own."""
    if network == "host":
        for name in ("resolv.conf", "hosts"):
            try:
                content = Path("/etc", name).read_bytes()
            except OSError:
                continue
            if name == "hosts":
                content = content.rstrip(b"\n") + b"\n127.0.1.1\t" + os.fsencode(hostname) + b"\n"
            yield name, content


def _require_program(
    rootfs: Rootfs, program: str, environment: Sequence[str], workdir: str, volumes: Sequence[Volume]
) -> None:
    """Raises NotFoundError where the runtime would find nothing to execute; its own words are less clear."""
    if volumes:  # it may be in one
        return
    if "/" in program:
        places = [os.path.join(workdir, program)]
    else:
        path = next((setting[5:] for setting in environment if setting.startswith("PATH=")), "")
        places = [os.path.join(workdir, directory, program) for directory in path.split(":")]
    if not any(rootfs.has_program(place) for place in places):
        where = "" if "/" in program else " in its PATH"
        raise NotFoundError(f"the image has no program {program!r}{where}", hint="see `erofsgen ls`")
