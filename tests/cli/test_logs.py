"""The daemons' log as JSON: of a format alone, and of real daemons in trouble."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lazykit import Host, eventually

from erofsgen.host import logs


def written(*arguments: Any, **more: Any) -> dict[str, Any]:
    """What a call of a logger with these arguments writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    logger = logging.Logger("erofsgen.some.module")
    logger.addHandler(handler)
    logger.log(*arguments, **more)
    text = stream.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert text.isascii()
    return json.loads(text)


def test_a_line():
    before = time.time()
    line = written(logging.WARNING, "%s: %d frames\nfewer", "pack \udc80é", 3, extra={"pack": "ab", "frame": None})
    assert list(line) == ["time", "level", "logger", "pid", "message", "pack"]
    assert line | {"time": ""} == {
        "time": "", "level": "warning", "logger": "erofsgen.some.module", "pid": os.getpid(),
        "message": "pack \udc80é: 3 frames\nfewer", "pack": "ab",
    }  # fmt: skip
    found = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d{3}Z", line["time"])
    assert found
    assert abs(time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S")) - time.timezone - before) < 5


def test_fields_that_are_taken_or_odd():
    line = written(
        logging.INFO, "said", extra={"time": 1, "level": 2, "exception": 3, "path": Path("/x"), "packs": ["a"]}
    )
    assert (line["level"], line["message"], line["path"], line["packs"]) == ("info", "said", "/x", ["a"])
    assert "exception" not in line
    try:
        raise ValueError("odd")
    except ValueError:
        line = written(logging.ERROR, "failed", exc_info=True)
    assert line["exception"].startswith("Traceback (most recent call last)")
    assert line["exception"].endswith("ValueError: odd")


@pytest.mark.parametrize(
    ("wanted", "said"), [("", "INFO hello"), ("text", "INFO hello"), ("json", '"message": "hello"')]
)
def test_the_environment_says_how(wanted: str, said: str):
    code = (
        "from erofsgen.host import logs; import logging, sys; logs.set_up(); logging.info('hello'); print(*sys.modules)"
    )
    environment = {**os.environ, logs.VARIABLE: wanted}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said in done.stderr
    assert not {"numpy", "httpx", "msgspec", "rich"} & set(done.stdout.split())  # the supervisor is to be small


def test_a_format_that_there_is_none_of(sample):
    assert "'xml' is not one of 'text', 'json'" in sample("daemon", "--log-format", "xml", code=2).err
    code = "from erofsgen.host import logs; logs.set_up()"
    environment = {**os.environ, logs.VARIABLE: "xml"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "WARNING EROFSGEN_LOG_FORMAT is text or json, not 'xml'" in done.stderr


@pytest.mark.mount
@pytest.mark.usefixtures("require_root")
def test_a_daemon_in_trouble(own_sample, mount_point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its supervisor, its workers and the log in one file: every line is an object."""
    monkeypatch.setenv(logs.VARIABLE, "json")
    own_sample("mount", "sample:1", mount_point, "--plane", "fanotify")
    host = Host(own_sample.root)
    host.kill("worker")
    eventually(lambda: host.status()["worker_restarts"] == 1)
    own_sample.store.rename(tmp_path / "away")
    with pytest.raises(OSError, match="Input/output error"):
        (mount_point / "data/edited").read_bytes()
    pack = own_sample("explain", "sample:1", "data/edited", "--no-remote", "--json").json["packs"][0]["digest"][7:]
    own_sample("umount", mount_point)
    lines = [json.loads(line) for line in host.log().splitlines()]
    by_logger = {name: [line for line in lines if line["logger"].endswith(name)] for name in ("engine", "workerlink")}
    failures = by_logger["engine"]
    assert {(line["source"], line["pack"], line["level"]) for line in failures} == {
        (str(own_sample.store), pack, "warning")
    }
    (died,) = by_logger["workerlink"]
    assert (died["exit_code"], died["level"]) == (-signal.SIGKILL, "warning")
    assert died["worker"] > 0
    said = [line for line in lines if line["logger"].endswith("supervisor")]
    assert [line["plane"] for line in said if line["message"].startswith("supervisor")] == ["fanotify"]
    (armed,) = [line for line in said if "armed" in line["message"]]
    assert (armed["image"], armed["target"]) == ("sample:1", str(mount_point))
    assert armed["mount"] in armed["message"]
    (denied, *_) = [line for line in said if line["message"].startswith("read failed")]
    assert (denied["level"], denied["pack"]) == ("error", pack)
    assert len({line["pid"] for line in lines}) >= 2
