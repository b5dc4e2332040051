"""``erofsgen status``: what the daemon does and how it fares."""

from __future__ import annotations

import time
from typing import Any

from erofsgen.cli.shared import Settings, verb


@verb(json=True)
def command(settings: Settings) -> None:
    """Show the daemon of lazy mounts and how it fares."""
    from erofsgen.cli import output
    from erofsgen.errors import ErofsgenError
    from erofsgen.host.daemon.client import Client
    from erofsgen.host.mount.mounts import mounts

    client = Client.connect(settings.root)
    lazy = [mount for mount in mounts(settings.root) if mount.plane != "eager"]
    facts: dict[str, Any] = {"running": client is not None, "lazy_mounts": len(lazy)}
    if client is not None:
        with client:
            facts.update(client.call("status"))
            try:
                facts.update(client.worker("status"))
            except ErofsgenError as error:
                facts["engine"] = None
                facts["errors"].append({"at": time.time(), "error": str(error)})
    if settings.json:
        output.document(facts)
    elif client is None:
        output.line(f"no daemon runs for {settings.root}")
        if lazy:
            output.line(f"{output.counted(len(lazy), 'lazy mount')} without one: start it with `erofsgen daemon`")
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from erofsgen.cli import output

    engine = facts["engine"]
    rows = [
        ("daemon", f"pid {facts['pid']}, since {_when(facts['started'])}, plane {facts['plane']}"),
        ("worker", f"pid {facts['worker']}, started anew {output.counted(facts['worker_restarts'], 'time')}"),
        ("standby", f"pid {facts['standby']}" if facts["standby"] else "none"),
        ("mounts", f"{facts['lazy_mounts']} lazy, {_kept(facts)}"),
        ("reads", f"{facts['waiting']} waiting, {facts['denied']} failed"),
    ]
    if engine is not None:
        frames, written, fetched = engine["frames"], engine["bytes_written"], engine["bytes_fetched"]
        rows.append(
            ("filled", f"{output.counted(frames, 'frame')}, {output.size(written)}; {output.size(fetched)} fetched")
        )
        for name, source in engine["sources"].items():
            kind = "store" if source["level"] is None else "tier"
            rows.append((kind, f"{output.printable(name)}: {_of_source(source)}"))
    if facts.get("metrics"):
        rows.append(("metrics", output.printable(facts["metrics"])))
    output.facts(rows)
    for error in facts["errors"]:
        output.line(f"{_when(error['at'])} {output.one_line(error['error'])}")


def _of_source(source: dict[str, Any]) -> str:
    from erofsgen.cli import output

    rest = f" {source['rests']:.0f} s" if source["state"] == "resting" else ""
    said = [
        f"{source['state']}{rest}",
        f"{output.counted(source['reads'], 'read')} of {output.size(source['bytes'])}",
        f"p50 {1000 * source['p50']:.1f} ms",
        f"p95 {1000 * source['p95']:.1f} ms",
        f"{source['failed']} failed",
        f"{source['absent']} absent",
        output.counted(source["bad_frames"], "bad frame"),
        f"{source['hedges']} hedged",
    ]
    if source["error"] is not None:
        ago = max(0.0, time.time() - source["error"]["at"])
        said.append(f"{ago:.0f} s ago: {output.one_line(source['error']['error'])}")
    return ", ".join(said)


def _kept(facts: dict[str, Any]) -> str:
    from erofsgen.cli import output

    if "marked_packs" in facts:
        return output.counted(facts["marked_packs"], "marked pack")
    if "servers" in facts:
        return output.counted(facts["servers"], "server")
    return f"{output.counted(facts['open_objects'], 'open object')}, {facts['culled_objects']} culled"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
