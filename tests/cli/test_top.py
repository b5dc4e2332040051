"""`erofsgen top`: once for scripts, live on a terminal, and what it makes of two samples."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from erofsgen.cli import topview
from erofsgen.host import top


def test_without_a_daemon(sample):
    for options in ([], ["--once"]):
        assert sample("top", *options).lines == [f"no daemon runs for {sample.root}"]
    assert sample("top", "--json").json == {"running": False}
    assert not sample.root.exists()


@pytest.mark.mount
@pytest.mark.usefixtures("require_root")
def test_a_mount_at_work(sample, mount_point: Path):
    sample("mount", "sample:1", mount_point, "--plane", "fanotify")
    reader = threading.Timer(0.4, (mount_point / "data/edited").read_bytes)
    reader.start()
    found = sample("top", "--json", "--interval", "1.5").json
    reader.join()
    assert (found["running"], found["plane"], found["denied"], found["cache_limit"]) == (True, "fanotify", 0, None)
    assert 1.5 <= found["interval"] < 10
    assert found["engine"]["frames_per_second"] > 0
    assert found["engine"]["demands_per_second"] > 0
    (source,) = found["sources"]
    assert (source["name"], source["level"], source["state"], source["failed"]) == (str(sample.store), None, "ok", 0)
    assert source["bytes_per_second"] > 1000
    (mount,) = found["mounts"]
    assert (mount["target"], mount["image"], mount["plane"]) == (str(mount_point), "sample:1", "fanotify")
    assert 0 < mount["misses"] <= mount["touches"]
    assert mount["touches_per_second"] > 0
    assert mount["miss_rate"] > 0
    assert mount["missed_per_second"] > 0
    assert mount["waited"] > 0
    assert found["cache_used"] > 1 << 20
    once = sample("top", "--once", "--interval", "0.1").lines
    assert [line.split()[0] for line in once if line] == [
        "daemon", "reads", "engine", "demand", "cache", "TARGET", str(mount_point), "SOURCE", str(sample.store),
    ]  # fmt: skip
    live(sample, b"q")
    stopping = sample.process("top", "--interval", "0.2")
    lines = [stopping.stdout.readline() for _ in range(30)]
    assert sum(line.startswith(b"daemon ") for line in lines) >= 2
    sample("umount", mount_point)
    sample("daemon", "--stop")
    while stopping.stdout.readline() != f"no daemon runs for {sample.root}\n".encode():
        pass
    stopping.send_signal(signal.SIGINT)
    stopping.communicate(timeout=20)
    assert stopping.returncode == 0


def live(sample, key: bytes) -> None:
    """A terminal shows views until somebody wants to leave, and is as before then."""
    main, terminal = pty.openpty()
    before = subprocess.run(["stty", "-a"], stdin=terminal, capture_output=True, check=True).stdout
    watching = sample.process(
        "top", "--interval", "0.2", stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # it is the controlling terminal then
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"},
    )  # fmt: skip
    seen = b""
    until = time.monotonic() + 30
    while seen.count(b"erofsgen top") < 3 and time.monotonic() < until:
        if select.select([main], [], [], 0.5)[0]:
            seen += os.read(main, 1 << 16)
    os.write(main, key)
    while watching.poll() is None and time.monotonic() < until:
        if select.select([main], [], [], 0.1)[0]:
            seen += os.read(main, 1 << 16)
    assert watching.wait(1) == 0
    after = subprocess.run(["stty", "-a"], stdin=terminal, capture_output=True, check=True).stdout
    os.close(main)
    os.close(terminal)
    assert after == before
    assert b"sample:1" in seen
    assert b"\x1b[?1049h" in seen  # its own screen
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"erofsgen top")


# --- what two samples say --------------------------------------------------------------------------------------------


def sampled(
    at: float, *, touches: int, misses: int, frames: int, used: int = 0, limit: int | None = None
) -> top.Sample:
    queued = {"demand": 2, "read_around": 0, "prefetch": 1, "scrub": 0}
    source = {
        "level": 1, "state": "resting", "rests": 3.2, "reads": frames, "bytes": 1000 * frames, "p50": 0.01, "p95": 0.02,
        "failed": 3, "absent": 1, "bad_frames": 1,
    }  # fmt: skip
    engine = {
        "in_flight": 5, "queued": queued, "threads": 8, "frames": frames, "bytes_fetched": 10 * frames,
        "bytes_written": 20 * frames, "demands": frames, "demand_p50": 0.001, "demand_p95": 12.0, "retries": 0,
        "hedges": 0, "sources": {"store": {**source, "level": None}, "tier\x1b": source},
    }  # fmt: skip
    mount = {
        "target": "/mnt", "image": "web", "command": "serve --fast", "touches": touches, "touched_bytes": 0,
        "misses": misses, "missed_bytes": 4096 * misses, "waited": misses / 10,
    }  # fmt: skip
    prefetch = {
        "mounts": {"a": {"command": "serve", "reason": "recorded", "bytes": 25, "of": 100, "state": "reading"}},
        "reasons": {
            "libc": {"frames": 1, "bytes": 10, "used_frames": 0, "used_bytes": 0, "judged_bytes": 0},
            "recorded": {"frames": 1, "bytes": 100, "used_frames": 1, "used_bytes": 60, "judged_bytes": 80},
        },
    }
    supervisor = {
        "version": "1", "plane": "fanotify", "started": time.time() - 90_000, "worker_restarts": 1, "waiting": 4,
        "denied": 7, "mounts": {"a": mount, "b": {**mount, "missed_bytes": 0, "command": ""}}, "recordings": 1,
    }  # fmt: skip
    mounts = [{"id": "a", "target": "/moved", "image": "web", "plane": "fanotify"}]
    return top.Sample(at, supervisor, {"engine": engine, "prefetch": prefetch}, mounts, used, limit)


def test_rates_and_shares():
    before = sampled(10.0, touches=100, misses=10, frames=50)
    view = top.view(before, sampled(12.0, touches=140, misses=20, frames=70, used=512, limit=1024))
    first, second = view.mounts
    assert (first.id, first.target, first.command) == ("a", "/moved", "serve --fast")
    assert (first.touches_per_second, first.miss_rate, first.missed_per_second) == (20.0, 0.25, 20480.0)
    assert (first.waiting, first.prefetched, first.to_prefetch) == (0.5, 25, 100)
    assert (second.id, second.target, second.prefetched) == ("b", "/mnt", None)
    tier, store = view.sources
    assert (tier.level, store.level) == (1, None)
    assert (tier.reads_per_second, tier.bytes_per_second, tier.failed, tier.failures) == (10.0, 10_000.0, 4, 0)
    assert view.engine is not None
    assert (view.engine.fetched_per_second, view.engine.written_per_second) == (100.0, 200.0)
    assert view.denied == 0
    assert [(reason.reason, reason.hit_rate) for reason in view.prefetch] == [("recorded", 0.75), ("libc", None)]
    said = dict(topview.summary(view))
    assert said["daemon"].startswith("plane fanotify, up 1 d 01:00:")
    assert said["cache"] == "512 B of 1.0 KiB, 50.0 %"
    assert "2 demand, 1 prefetch" in said["engine"]
    assert "p95 12.0 s" in said["demand"]
    mounts, sources, prefetch = topview.sections(view)
    assert mounts.rows[0][-1] == "25.0 % of 100 B"
    assert sources.rows[0][:3] == ("tier\\x1b", "1", "resting 3 s")
    assert prefetch.rows[0] == ("recorded", "100 B", "0 B/s", "75.0 %")


def test_counters_that_began_anew():
    """A worker and a supervisor that were replaced count from 0; nothing is negative."""
    view = top.view(
        sampled(10.0, touches=100, misses=10, frames=50), sampled(11.0, touches=5, misses=1, frames=3)
    )  # fmt: skip
    assert view.mounts[0].touches_per_second == 5
    assert view.engine is not None
    assert view.engine.frames_per_second == 3


def test_a_daemon_that_says_little():
    """Of a version without profiles, whose worker does not answer."""
    sample = sampled(1.0, touches=0, misses=0, frames=0)
    bare = {name: value for name, value in sample.supervisor.items() if name not in ("mounts", "recordings")}
    before, after = (top.Sample(at, bare, {}, sample.mounts, 0, None) for at in (1.0, 2.0))
    view = top.view(before, after)
    assert view.engine is None
    assert (view.sources, view.prefetch, view.recordings) == ([], [], 0)
    (mount,) = view.mounts
    assert (mount.target, mount.touches, mount.miss_rate) == ("/moved", 0, None)
    assert dict(topview.summary(view))["engine"] == "the worker does not answer"
