"""Write log lines as text or as JSON objects, with the fields of their request.

Control characters are escaped, so that no client can break a line or forge one.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

# The fields that `extra` of a log call may contain, in the order of the output. None is a payload, a key or a path.
FIELDS = (
    *("request_id", "route", "model", "caller", "status", "code", "ms"),
    *("queue_ms", "size", "bytes_in", "bytes_out"),
)
# C0, DEL, C1, and the line and paragraph separators. They can end a line or move the cursor of a terminal.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class TextFormatter(logging.Formatter):
    """Formats lines as `TIME LEVEL LOGGER MESSAGE key=value …`. A traceback follows in indented lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a log record."""
        line = [_time(record), record.levelname, record.name, _escaped(record.getMessage())]
        line += [f"{key}={value}" for key, value in _fields(record).items()]
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return "".join([" ".join(line), *(f"\n    {_escaped(text)}" for text in trace.splitlines())])


class JsonFormatter(logging.Formatter):
    """Formats each line as a JSON object, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON of a log record."""
        line: dict[str, Any] = {"time": _time(record), "level": record.levelname, "logger": record.name}
        line |= {"message": record.getMessage(), **_fields(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def write_logs(level: str, layout: str) -> None:
    """Write the lines of all loggers to stderr. level: the lowest level to write. layout: text or json."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if layout == "json" else TextFormatter())
    logging.getLogger("huggingface_hub").setLevel(max(logging.ERROR, logging.getLevelName(level.upper())))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: record.__dict__[key] for key in FIELDS if record.__dict__.get(key) is not None}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _escaped(text: str) -> str:
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
