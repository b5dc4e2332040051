"""Metrics as Prometheus scrapes them, of a real daemon with a real mount."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from lazykit import Host, eventually
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from erofsgen.errors import BusyError, StorageError, UsageError
from erofsgen.host.metrics.address import Address
from erofsgen.host.metrics.families import FAMILIES

NAMES = {family.name.removesuffix("_total") for family in FAMILIES}
"""As parsers know them."""

Families = dict[str, "Family"]


class Family:
    """A metric as the parser gives it, with its samples by labels."""

    def __init__(self, metric) -> None:
        self.kind, self.help = metric.type, metric.documentation
        self.samples = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in metric.samples}

    def value(self, **labels: str) -> float:
        """The one sample with these labels among its."""
        (found,) = self.values(**labels)
        return found

    def values(self, **labels: str) -> list[float]:
        return [value for (_, *have), value in self.samples.items() if labels.items() <= dict(have).items()]


def scrape(address: str, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    place = Address.parse(address)
    with socket.socket(socket.AF_UNIX if place.path else socket.AF_INET) as client:
        client.settimeout(10)
        client.connect(place.path or (place.host, place.port))
        connection = http.client.HTTPConnection("localhost")
        connection.sock = client
        connection.request(method, path, headers=headers)
        with connection.getresponse() as response:
            return response.status, response.getheader("Content-Type", ""), response.read().decode()


def families(address: str) -> Families:
    status, kind, text = scrape(address)
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    lint(text)
    return {metric.name: Family(metric) for metric in parse(text)}


def lint(text: str) -> None:
    """What `promtool check metrics` finds fault with."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert kinds.keys() == helps.keys()
    assert len(kinds) == text.count("# TYPE") == text.count("# HELP")
    for name, kind in kinds.items():
        assert re.fullmatch(r"erofsgen_[a-z][a-z0-9_]*", name), name
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"_(count|sum|bucket)$", name), name
        assert not re.search(r"_(counter|gauge|histogram|metric)(_|$)", name), name
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|kib|mib|kilobytes|percent)(_|$)", name), name
        if kind == "histogram":
            assert name.endswith(("_seconds", "_bytes")), name
    for line in text.splitlines():
        name = re.match(r"[a-z0-9_]+", line)
        if name is not None:
            known = {name[0], *(name[0].removesuffix(end) for end in ("_bucket", "_sum", "_count"))}
            assert known & kinds.keys(), line


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def served(address: str) -> bool:
    try:
        return scrape(address)[0] == 200
    except OSError:
        return False


def kill_worker(root: Path) -> None:
    """Returns when another is there."""
    host = Host(root)
    before = host.status()["worker_restarts"]
    host.kill("worker")
    eventually(lambda: host.status()["worker_restarts"] > before)


@pytest.fixture
def address(sample, tmp_path: Path) -> Iterator[str]:
    """Where a daemon in the foreground serves metrics."""
    address = f"unix:{tmp_path}/metrics.sock"
    process = sample.process("daemon", "--plane", "fanotify", "--metrics", address, "--max-bytes", "1G")
    try:
        eventually(lambda: served(address))
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


@pytest.mark.mount
@pytest.mark.usefixtures("require_root")
def test_a_mount_in_numbers(sample, address: str, mount_point: Path):
    before = families(address)
    assert before["erofsgen_engine_frames"].value() == 0
    assert before["erofsgen_demand_seconds"].values(le="+Inf")[0] == 0
    assert before["erofsgen_cache_limit_bytes"].value() == 1 << 30
    assert before["erofsgen_prefetch_bytes"].samples == {}
    sample("mount", "sample:1", mount_point)
    (mount_point / "data/edited").read_bytes()
    time.sleep(1.1)  # for as long the supervisor's answer is kept
    after = families(address)
    engine = Host(sample.root).engine()
    assert after["erofsgen_engine_frames"].value() >= 1
    assert after["erofsgen_engine_written_bytes"].value() >= (mount_point / "data/edited").stat().st_size
    assert after["erofsgen_supervisor_up"].value() == 1
    assert after["erofsgen_mounts"].value(plane="fanotify") == 1
    assert after["erofsgen_waiting_reads"].value() == after["erofsgen_denied_reads"].value() == 0
    assert after["erofsgen_source_reads"].value(source=str(sample.store), level="origin") >= 1
    states = after["erofsgen_source_state"]
    assert [states.value(state=state) for state in ("ok", "resting", "full")] == [1, 0, 0]
    assert {priority for _, (_, priority) in after["erofsgen_engine_queued_frames"].samples} == {
        "demand", "read_around", "prefetch", "scrub",
    }  # fmt: skip
    for name, count in (("erofsgen_demand_seconds", engine["demands"]), ("erofsgen_source_demand_seconds", None)):
        histogram = {name: value for name, value in after[name].samples.items() if name[0].endswith("_bucket")}
        values = [value for _, value in sorted(histogram.items(), key=lambda item: float(dict(item[0][1:])["le"]))]
        assert values == sorted(values)  # each has all that are below it
        (total,) = [value for (kind, *_), value in after[name].samples.items() if kind.endswith("_count")]
        (seconds,) = [value for (kind, *_), value in after[name].samples.items() if kind.endswith("_sum")]
        assert values[-1] == total >= 1
        assert count in (None, total)
        assert 0 < seconds < 60
    for process in ("supervisor", "standby", "worker"):
        assert 1 << 20 < after["erofsgen_process_resident_memory_bytes"].value(process=process) < 1 << 30
        assert abs(time.time() - after["erofsgen_process_start_time_seconds"].value(process=process)) < 600
    for name in ("engine_reads", "engine_written_bytes", "process_cpu_seconds", "denied_reads"):
        name = f"erofsgen_{name}"
        for labels, value in before[name].samples.items():
            assert after[name].samples[labels] >= value, name
    assert set(after) == NAMES
    assert f"metrics  {address}" in sample("status").lines
    counted = ("touches", "touched_bytes", "misses", "missed_bytes", "waited_seconds")
    mounted = [after[f"erofsgen_mount_{name}"].value(image="sample:1") for name in counted]
    assert min(mounted) > 0
    sample("umount", mount_point)
    time.sleep(1.1)
    later = families(address)
    assert later["erofsgen_mounts"].samples == {}
    assert [later[f"erofsgen_mount_{name}"].value(image="sample:1") for name in counted] >= mounted


@pytest.mark.mount
@pytest.mark.usefixtures("require_root")
def test_what_clients_ask_and_the_next_worker_answers(sample, address: str):
    """A worker that is killed leaves a socket behind that nobody listens at."""
    kind = "application/openmetrics-text; version=1.0.0"
    status, got, text = scrape(address, Accept=kind)
    assert (status, got.partition(";")[0]) == (200, kind.partition(";")[0])
    assert {metric.name for metric in parse_openmetrics(text)} == NAMES
    assert scrape(address, method="HEAD")[2] == ""
    assert scrape(address, "/")[0] == 200
    assert scrape(address, "/metrics?name=x")[0] == 200
    assert scrape(address, "/favicon.ico")[0] == 404
    assert scrape(address, method="POST")[0] == 501
    kill_worker(sample.root)
    eventually(lambda: served(address))
    assert families(address)["erofsgen_worker_restarts"].value() == 1
    assert stat.S_IMODE(os.stat(Address.parse(address).path).st_mode) == 0o660
    assert [path.name for path in sample.root.parent.glob(".metrics*")] == []


@pytest.mark.mount
@pytest.mark.usefixtures("require_root")
def test_at_a_port_by_the_daemon_of_a_fuse_mount(sample, mount_point: Path, tmp_path: Path):
    """Whose server writes its log as the daemon does."""
    address = str(free_port())
    process = sample.process("fuse", "sample:1", mount_point, "--metrics", address, "--log-format", "json")
    try:
        eventually(lambda: served(address) and os.path.ismount(mount_point))
        other = tmp_path / "other"
        other.mkdir()
        said = sample("fuse", "sample:1", other, "--metrics", "9464", code=9).err
        assert "serves no metrics at 127.0.0.1:9464" in said
        kill_worker(sample.root)
        eventually(lambda: served(address))
        found = families(address)
        assert found["erofsgen_mounts"].value(plane="fuse") == 1
        assert found["erofsgen_fuse_servers"].value() == 1
        lines = [json.loads(line) for line in Host(sample.root).log().splitlines()]
        (server,) = [line for line in lines if line["logger"] == "fusefallback.serving"]
        (mount,) = sample("mounts", "--json").json
        assert (server["mount"], server["digest"], server["plane"]) == (mount["id"], mount["digest"], "fuse")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("9464", ("", "127.0.0.1", 9464)),
        ("localhost:9464", ("", "localhost", 9464)),
        ("0.0.0.0:1", ("", "0.0.0.0", 1)),
        ("[::1]:65535", ("", "::1", 65535)),
        ("unix:/run/x.sock", ("/run/x.sock", "", 0)),
    ],
)
def test_addresses(text: str, meant: tuple[str, str, int]):
    address = Address.parse(text)
    assert address == meant
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", ":9464", "unix:", "unix:/run/", "0", "65536", "host", "host:", "::1:9464", "1:2:3"]
)
def test_no_addresses(text: str):
    with pytest.raises(UsageError):
        Address.parse(text)


def test_the_daemon_wants_an_address(sample):
    assert "':9464' is no address for metrics" in sample("daemon", "--metrics", ":9464", code=2).err


def test_a_socket_in_use_and_one_that_was_left(tmp_path: Path):
    address = Address.parse(f"unix:{tmp_path}/s")
    with address.listen(), pytest.raises(BusyError):
        address.listen()
    address.listen().close()
    os.unlink(address.path)
    Path(address.path).write_text("precious")
    with pytest.raises(StorageError, match="something else"):
        address.listen()
    assert Path(address.path).read_text() == "precious"
    with pytest.raises(StorageError, match="No such file"):
        Address.parse(f"unix:{tmp_path}/none/s").listen()
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    Address.parse(f"unix:{deep}/s").listen().close()  # sun_path has 108 bytes
    port = Address.parse(str(free_port()))
    with port.listen(), pytest.raises(BusyError):
        port.listen()
    with pytest.raises(UsageError, match="no such host"):
        Address.parse("no.such.host.invalid:9464").listen()


def test_a_full_queue_is_somebody_who_listens(tmp_path: Path):
    address = Address.parse(f"unix:{tmp_path}/s")
    with address.listen() as listening:
        listening.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(address.path)
        with pytest.raises(BusyError):
            address.listen()
        for client in waiting:
            client.close()


# --- what there is to tell -------------------------------------------------------------------------------------------


def test_images_beyond_a_hundred_share_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from erofsgen.host.cache.cache import HostCache
    from erofsgen.host.fill.engine import Engine
    from erofsgen.host.metrics import gather
    from erofsgen.host.metrics.collector import TableCollector

    with Engine([]) as engine:
        gatherer = gather.Gatherer(HostCache(tmp_path), lambda: {"engine": engine.stats(), "prefetch": PREFETCH})
        mount = {"touches": 3, "touched_bytes": 30, "misses": 1, "missed_bytes": 10, "waited": 0.5}
        mounts = {str(number): {**mount, "image": f"image:{number}\udc80"} for number in range(150)}
        status = {"mounts": mounts, "unmounted": {"image:0\udc80": mount, "gone": mount}, "waiting": 0}
        monkeypatch.setattr(gather, "supervisor", lambda root: status)
        found = {metric.name: Family(metric) for metric in TableCollector(gatherer.gather).collect()}
    touches = found["erofsgen_mount_touches"]
    assert len(touches.samples) == 101
    assert touches.value(image="image:0?") == 6
    assert touches.value(image="other") == 51 * 3
    assert math.isclose(sum(found["erofsgen_mount_waited_seconds"].values()), 152 * 0.5)
    wasted = found["erofsgen_prefetch_wasted_bytes"]
    assert (wasted.value(reason="recorded"), wasted.value(reason="libc")) == (20, 0)
    assert found["erofsgen_prefetch_used_bytes"].value(reason="recorded") == 60
    assert found["erofsgen_prefetch_pending_bytes"].value() == 70


PREFETCH = {
    "mounts": {"a": {"command": "x", "reason": "recorded", "bytes": 30, "of": 100, "state": "reading"}},
    "reasons": {
        "recorded": {"frames": 2, "bytes": 100, "used_frames": 1, "used_bytes": 60, "judged_bytes": 80},
        "libc": {"frames": 1, "bytes": 50},
    },
}
