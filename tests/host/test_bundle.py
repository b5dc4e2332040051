"""config.json from image configs, and what is looked up in a root file system nobody vetted."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from erofsgen.errors import FormatError, NotFoundError, StorageError, UsageError
from erofsgen.host.container.bundle import CAPABILITIES, PATH, Options, Volume, runtime_config, write_bundle
from erofsgen.host.container.rootfs import Rootfs
from erofsgen.host.container.users import User, find_user

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
# a comment
app:x:1000:1001:,,,:/srv/app:/bin/sh
broken line
bad:x:many:0::/:/bin/sh
1000:x:77:78::/odd:/bin/sh
homeless:x:5:6:::
huge:x:4294967295:0::/:/bin/sh
"""
GROUP = """\
root:x:0:
staff:x:50:app,other
video:x:44:app
own:x:1001:app
empty:x:60
worse:x:-1:app
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "rootfs"
    (top / "etc").mkdir(parents=True)
    (top / "etc/passwd").write_text(PASSWD)
    (top / "etc/group").write_text(GROUP)
    (top / "usr/bin").mkdir(parents=True)
    (top / "usr/bin/tool").write_text("#!/bin/sh\n")
    (top / "usr/bin/tool").chmod(0o755)
    (top / "usr/bin/data").write_text("")
    return top


def config_of(tree: Path, image: dict[str, object] | None = None, **options: object):
    image = {"config": {"Cmd": ["tool"], **(image or {})}}
    return runtime_config(Rootfs(tree), image, Options(**options), identity="id1")  # type: ignore[arg-type]


class TestUsers:
    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("", User(0, 0, (), "/root")),
            ("0", User(0, 0, (), "/root")),
            ("root", User(0, 0, (), "/root")),
            ("app", User(1000, 1001, (44, 50), "/srv/app")),
            ("app:staff", User(1000, 50, (), "/srv/app")),
            ("app:7", User(1000, 7, (), "/srv/app")),
            ("app:", User(1000, 1001, (44, 50), "/srv/app")),
            ("1000", User(77, 78, (), "/odd")),  # a name of digits is a name first
            ("4242", User(4242, 0, (), "/")),
            ("4242:video", User(4242, 44, (), "/")),
            ("5", User(5, 6, (), "/")),
            ("2147483647:2147483647", User(2147483647, 2147483647, (), "/")),
        ],
    )
    def test_lookup(self, tree, spec, expected):
        assert find_user(Rootfs(tree), spec) == expected

    @pytest.mark.parametrize("spec", ["nobody", "app:nogroup", "bad", "huge", "-1", "2147483648", "app:worse", "٣"])
    def test_not_there(self, tree, spec):
        with pytest.raises(NotFoundError, match="in the image's /etc/"):
            find_user(Rootfs(tree), spec)

    def test_an_image_without_files(self, tmp_path):
        assert find_user(Rootfs(tmp_path), "12:34") == User(12, 34, (), "/")
        assert find_user(Rootfs(tmp_path), "") == User(0, 0, (), "/")
        with pytest.raises(NotFoundError):
            find_user(Rootfs(tmp_path), "root")


class TestHostileRootfs:
    """Nothing of the host is read, whatever the image's links say."""

    @pytest.fixture
    def outside(self, tmp_path):
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside/passwd").write_text("evil:x:0:0::/:/bin/sh\n")
        return tmp_path / "outside"

    @pytest.mark.parametrize("climb", ["absolute", "relative", "directory", "proc"])
    def test_passwd_is_a_link_out(self, tree, outside, climb):
        (tree / "etc/passwd").unlink()
        if climb == "directory":
            for file in (tree / "etc").iterdir():
                file.unlink()
            (tree / "etc").rmdir()
            (tree / "etc").symlink_to(outside)
        else:
            target = {
                "absolute": str(outside / "passwd"),
                "relative": "../../../../../../.." + str(outside / "passwd"),
                "proc": f"/proc/{os.getpid()}/root{outside}/passwd",
            }[climb]
            (tree / "etc/passwd").symlink_to(target)
        with pytest.raises(NotFoundError, match="no user 'evil'"):
            find_user(Rootfs(tree), "evil")

    def test_a_link_inside_is_followed_inside(self, tree):
        (tree / "usr/lib").mkdir()
        (tree / "etc/passwd").rename(tree / "usr/lib/passwd")
        (tree / "etc/passwd").symlink_to("/usr/lib/passwd")
        assert find_user(Rootfs(tree), "app").uid == 1000

    def test_no_fifo_is_opened(self, tree):
        (tree / "etc/passwd").unlink()
        os.mkfifo(tree / "etc/passwd")
        assert find_user(Rootfs(tree), "9") == User(9, 0, (), "/")

    def test_a_loop_of_links(self, tree):
        (tree / "etc/passwd").unlink()
        (tree / "etc/passwd").symlink_to("passwd")
        assert find_user(Rootfs(tree), "9") == User(9, 0, (), "/")

    def test_an_endless_file(self, tree):
        with (tree / "etc/passwd").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(FormatError, match="/etc/passwd of the image is larger"):
            find_user(Rootfs(tree), "app")

    def test_directories_are_made_inside(self, tree, outside):
        (tree / "srv").symlink_to(outside)
        inside = Rootfs(tree)
        with pytest.raises(StorageError, match="/srv in the image: File exists"):
            inside.make_directory("/srv/new")
        (tree / "up").symlink_to("../../usr")
        inside.make_directory("/up/made/below")
        assert (tree / "usr/made/below").is_dir()
        assert stat.S_IMODE((tree / "usr/made").stat().st_mode) & 0o777 == 0o755
        with pytest.raises(StorageError, match="not a directory"):
            inside.make_directory("/etc/passwd")
        inside.make_directory("/")
        assert sorted(os.listdir(outside)) == ["passwd"]


@pytest.mark.parametrize(
    ("image", "options", "arguments"),
    [
        ({"Cmd": ["a", "b"]}, {}, ["a", "b"]),
        ({"Entrypoint": ["e"], "Cmd": ["a"]}, {}, ["e", "a"]),
        ({"Entrypoint": ["e"], "Cmd": ["a"]}, {"command": ["x", "y"]}, ["e", "x", "y"]),
        ({"Entrypoint": ["e"], "Cmd": None}, {}, ["e"]),
        ({"Entrypoint": ["e"], "Cmd": ["a"]}, {"entrypoint": ["n"]}, ["n"]),
        ({"Entrypoint": ["e"], "Cmd": ["a"]}, {"entrypoint": ["n"], "command": ["x"]}, ["n", "x"]),
        ({"Entrypoint": ["e"], "Cmd": ["a"]}, {"entrypoint": [], "command": ["x"]}, ["x"]),
    ],
)
def test_arguments(tree, image, options, arguments):
    assert config_of(tree, image, **options)["process"]["args"] == arguments


@pytest.mark.parametrize(
    ("image", "options"),
    [({"Cmd": None}, {}), ({"Cmd": []}, {}), ({"Cmd": ["a"]}, {"entrypoint": []}), ({"Cmd": [""]}, {})],
)
def test_no_command(tree, image, options):
    with pytest.raises(UsageError, match="the image names no command"):
        config_of(tree, image, **options)


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        ({}, {}, {"PATH": PATH, "HOME": "/root", "HOSTNAME": "id1"}),
        ({"User": "app"}, {"hostname": "h"}, {"HOME": "/srv/app", "HOSTNAME": "h"}),
        ({"Env": ["PATH=/x", "A=b=c", "EMPTY=", "BARE"]}, {}, {"PATH": "/x", "A": "b=c", "EMPTY": "", "BARE": ""}),
        ({"Env": ["A=1", "HOME=/h"]}, {"environment": {"A": "2", "B": "3"}}, {"A": "2", "B": "3", "HOME": "/h"}),
        ({}, {"terminal": True}, {"TERM": "xterm"}),
    ],
)
def test_environment(tree, image, options, expected):
    settings = config_of(tree, image, **options)["process"]["env"]
    environment = dict(setting.split("=", 1) for setting in settings)
    assert len(environment) == len(settings)
    assert expected.items() <= environment.items()
    assert ("TERM" in environment) == ("TERM" in expected)


@pytest.mark.parametrize(
    ("image", "options", "workdir"),
    [
        ({}, {}, "/"),
        ({"WorkingDir": ""}, {}, "/"),
        ({"WorkingDir": "/srv//app/"}, {}, "/srv/app"),
        ({"WorkingDir": "/srv"}, {"workdir": "/other"}, "/other"),
    ],
)
def test_working_directory(tree, image, options, workdir):
    assert config_of(tree, image, **options)["process"]["cwd"] == workdir


def test_credentials(tree):
    process = config_of(tree, {"User": "app"})["process"]
    assert process["user"] == {"uid": 1000, "gid": 1001, "additionalGids": [44, 50]}
    assert process["capabilities"] == {"bounding": list(CAPABILITIES), "effective": [], "permitted": []}
    process = config_of(tree, {"User": "app"}, user="0:50")["process"]
    assert process["user"] == {"uid": 0, "gid": 50, "additionalGids": []}
    assert process["capabilities"]["effective"] == list(CAPABILITIES)
    assert process["noNewPrivileges"] is False
    assert "CAP_SYS_ADMIN" not in CAPABILITIES


def test_annotations(tree):
    image = {
        "os": "linux",
        "architecture": "amd64",
        "config": {"Cmd": ["a"], "StopSignal": "SIGQUIT", "Labels": {"x": "y", "org.opencontainers.image.os": "mine"}},
    }
    assert runtime_config(Rootfs(tree), image, Options(), identity="i")["annotations"] == {
        "org.opencontainers.image.os": "mine",
        "org.opencontainers.image.architecture": "amd64",
        "org.opencontainers.image.stopSignal": "SIGQUIT",
        "x": "y",
    }


@pytest.mark.parametrize("image", [{"Cmd": "not a list"}, {"Env": [1]}, {"Labels": ["x"]}, {"User": 3}])
def test_malformed_configs(tree, image):
    with pytest.raises(FormatError, match="the image's config: "):
        config_of(tree, image)


def test_a_config_without_anything(tree):
    config = runtime_config(Rootfs(tree), {}, Options(command=["x"]), identity="i")
    assert config["process"]["args"] == ["x"]
    assert config["hostname"] == "i"


def test_namespaces_and_network(tree):
    kinds = [entry["type"] for entry in config_of(tree)["linux"]["namespaces"]]
    assert kinds == ["pid", "ipc", "uts", "mount", "cgroup"]
    kinds = [entry["type"] for entry in config_of(tree, network="none")["linux"]["namespaces"]]
    assert kinds == ["pid", "ipc", "uts", "mount", "cgroup", "network"]


def test_mounts(tree, tmp_path):
    mounts = {entry["destination"]: entry for entry in config_of(tree)["mounts"]}
    assert mounts.keys() >= {"/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys"}
    assert "ro" in mounts["/sys"]["options"]
    assert "/tmp" not in mounts
    config = config_of(tree, read_only=True, volumes=[Volume(tmp_path, "/tmp"), Volume(tmp_path, "/v", True)])
    mounts = {entry["destination"]: entry for entry in config["mounts"]}
    assert len(mounts) == len(config["mounts"])
    assert config["root"]["readonly"] is True
    assert mounts["/run"]["type"] == "tmpfs"
    assert (mounts["/tmp"]["source"], mounts["/tmp"]["options"]) == (str(tmp_path), ["rbind", "rprivate", "rw"])
    assert mounts["/v"]["options"] == ["rbind", "rprivate", "ro"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{}:/x", ("/x", False)), ("{}:/x:ro", ("/x", True)), ("{}:/x/../y/:rw", ("/y", False))],
)
def test_volumes(tmp_path, text, expected):
    volume = Volume.parse(text.format(tmp_path))
    assert (volume.source, volume.target, volume.read_only) == (tmp_path, *expected)


@pytest.mark.parametrize("text", ["", "/x", ":/x", "/tmp:", "/tmp:x", "/tmp:/x:rx", "/tmp:/x:ro:rw", "/tmp::ro"])
def test_malformed_volumes(text):
    with pytest.raises(UsageError, match="is not SRC:DST"):
        Volume.parse(text)


def test_a_volume_must_exist(tmp_path):
    with pytest.raises(NotFoundError, match="on this host"):
        Volume.parse(f"{tmp_path}/none:/x")


class TestWriteBundle:
    @pytest.fixture
    def bundle(self, tmp_path):
        (tmp_path / "bundle").mkdir()
        return tmp_path / "bundle"

    def test_files(self, tree, bundle):
        image = {"config": {"Cmd": ["tool"], "WorkingDir": "/made/here"}}
        write_bundle(bundle, tree, image, Options(), identity="id1")
        config = json.loads((bundle / "config.json").read_text())
        assert config["ociVersion"] == "1.0.2"
        assert config["root"] == {"path": str(tree), "readonly": False}
        assert (tree / "made/here").is_dir()
        if os.path.exists("/etc/hosts"):
            assert (bundle / "hosts").read_text().endswith("\n127.0.1.1\tid1\n")
            assert "/etc/hosts" in [mount["destination"] for mount in config["mounts"]]

    def test_no_network_no_hosts(self, tree, bundle):
        write_bundle(bundle, tree, {"config": {"Cmd": ["tool"]}}, Options(network="none"), identity="i")
        assert os.listdir(bundle) == ["config.json"]

    def test_a_volume_over_hosts(self, tree, bundle, tmp_path):
        volume = Volume(tmp_path, "/etc/hosts")
        write_bundle(bundle, tree, {"config": {"Cmd": ["tool"]}}, Options(volumes=[volume]), identity="i")
        assert not (bundle / "hosts").exists()

    @pytest.mark.parametrize("program", ["tool", "/usr/bin/tool", "./tool", "bin/tool"])
    def test_programs(self, tree, bundle, program):
        workdir = {"./tool": "/usr/bin", "bin/tool": "/usr"}.get(program)
        write_bundle(bundle, tree, {}, Options(command=[program], workdir=workdir), identity="i")

    @pytest.mark.parametrize("program", ["data", "nope", "/usr/bin/nope", "/usr/bin", "./tool", "/etc/passwd/x"])
    def test_no_such_program(self, tree, bundle, program):
        with pytest.raises(NotFoundError, match="the image has no program"):
            write_bundle(bundle, tree, {}, Options(command=[program]), identity="i")

    def test_a_program_may_be_in_a_volume(self, tree, bundle, tmp_path):
        options = Options(command=["/v/x"], volumes=[Volume(tmp_path, "/v")])
        write_bundle(bundle, tree, {}, options, identity="i")

    def test_a_relative_working_directory(self, tree, bundle):
        with pytest.raises(UsageError, match="is not absolute"):
            write_bundle(bundle, tree, {}, Options(command=["tool"], workdir="x"), identity="i")
