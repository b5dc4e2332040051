"""How the daemons' log is written: a line for people, or one JSON object for machines.

``EROFSGEN_LOG_FORMAT`` says which, ``text`` or ``json``; processes pass it on to those they start, so that supervisor,
worker, standby and FUSE servers write alike. Their lines may be in one file.

::

    {"time": "2026-03-01T12:00:00.123Z", "level": "warning", "logger": "erofsgen.host.fill.engine", "pid": 4711,
     "message": "origin: pack 0e…: timed out", "source": "origin", "pack": "0e…", "exception": "…"}

Behind ``message`` come the fields that the call gave with ``extra=``, as far as they are known: ``pack`` (SHA-256),
``frame``, ``source``, ``mount`` (its id), ``target``, ``image`` (its name), ``digest`` (its manifest's) and others;
``exception`` where there is one.
Standard library only: the supervisor uses it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Final

VARIABLE: Final = "EROFSGEN_LOG_FORMAT"
FORMATS: Final = ("text", "json")

_logger: Final = logging.getLogger(__name__)

_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; all else was given with ``extra=``."""
_RESERVED: Final = ("time", "level", "logger", "pid", "message", "exception")


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": _module(record.name),
            "pid": record.process,
            "message": record.getMessage(),
        }
        line |= {
            name: value
            for name, value in vars(record).items()
            if name not in _OWN and name not in _RESERVED and value is not None
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up() -> None:
    """Log to standard error from now on, everything but details."""
    wanted = os.environ.get(VARIABLE) or "text"
    handler = logging.StreamHandler()
    if wanted == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if wanted not in FORMATS:
        _logger.warning("%s is text or json, not %r", VARIABLE, wanted)


def _module(name: str) -> str:
    """A logger's name; what was started with ``python -m`` calls itself otherwise."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if name == "__main__" and spec is not None else name


def _rfc3339(seconds: float) -> str:
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"
