"""build-many on Ray: a cluster of this machine's own, which nobody else can reach. It takes seconds to start."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from batchkit import descendants, layer, write_list
from servers import faulty_registry

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

LISTENING = "0A"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.fixture(autouse=True)
def require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Ray is not installed")


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def listening(pids: list[int]) -> set[str]:
    """The addresses at which these processes can be reached, as /proc/net writes them."""
    sockets = set()
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    sockets.add(os.readlink(descriptor))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == LISTENING and f"socket:[{row[9]}]" in sockets}


def test_a_batch_on_ray(erofsgen, tmp_path: Path):
    """It is built as without Ray, a worker that is killed is replaced, and nothing listens but on loopback."""
    seen: dict[str, set] = {}

    def look_and_kill(handler) -> None:
        family = descendants(process.pid)
        workers = [pid for pid in family if command(pid).startswith(b"ray::build_one")]
        seen["addresses"] = listening([process.pid, *family])
        seen["environment"] = set(Path(f"/proc/{workers[0]}/environ").read_bytes().split(b"\0"))
        for worker in workers:
            os.kill(worker, signal.SIGKILL)

    names = ("one", "two", "three")
    with faulty_registry() as registry:
        for name in names:
            registry.add_image(layer("base"), layer(name), tag=name)
        own = next(digest for digest, data in registry.blobs.items() if data == layer("two"))
        registry.fault(own.removeprefix("sha256:"), look_and_kill)
        images = [f"{registry.host}/team/app:{name} tag={name}" for name in (*names, "missing")]
        given = write_list(tmp_path / "list", *images)
        process = erofsgen.process("build-many", given, "--jobs", "1", "--json", "--cluster")
        out, err = process.communicate(timeout=100)
        assert process.returncode == 3, err
        outcomes = json.loads(out)
        found = [(outcome["name"], outcome["status"], outcome["attempts"]) for outcome in outcomes]
        assert found == [("one", "built", 1), ("two", "built", 2), ("three", "built", 1), ("missing", "failed", 1)]
        assert seen["addresses"]
        assert seen["addresses"] <= LOOPBACK
        assert {b"RAY_AUTH_MODE=token", b"RAY_USAGE_STATS_ENABLED=0"} <= seen["environment"]

        images = {image["name"]: image["digest"] for image in erofsgen("images", "--json").json}
        assert images == {outcome["name"]: outcome["digest"] for outcome in outcomes[:3]}
        assert erofsgen("check", "--json").json["problems"] == []
        again = erofsgen("build-many", given, "--json", code=3).json
        assert [outcome["status"] for outcome in again] == ["unchanged"] * 3 + ["failed"]


@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:1"])
def test_where_there_is_no_cluster(erofsgen, tmp_path: Path, address: str):
    process = erofsgen.process("build-many", write_list(tmp_path / "list", "python:3"), f"--cluster={address}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (6, b"")
    assert f"erofsgen: error: no Ray cluster at {address}: ".encode() in err
