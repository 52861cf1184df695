"""The server's log: a line for each request, as text or JSON, without what was asked."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from typing import IO, Any

TRACEBACK = "VLMPORT_TRACEBACK"  # set to log the traceback of a defect


class Log:
    """Writes lines to a stream, stderr by default.

    A request's line has its id, method, path, status, time and sizes, the model and the numbers of
    tokens; never a text, an image, an address or a key.
    """

    def __init__(self, *, as_json: bool = False, stream: IO[str] | None = None):
        self._as_json, self._stream = as_json, stream

    def request(self, request_id: str, **facts: Any) -> None:
        """Log a request that is done."""
        self._write("request", request_id=request_id, **facts)

    def event(self, event: str, **facts: Any) -> None:
        """Log an event of the server."""
        self._write(event, **facts)

    def defect(self, request_id: str, error: BaseException) -> None:
        """Log an error that is not ours: its type and place, and the traceback on request."""
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
        facts = {"type": type(error).__name__, "at": place, "text": str(error)[:200]}
        if os.environ.get(TRACEBACK):
            facts["traceback"] = "".join(traceback.format_exception(error))
        self._write("defect", request_id=request_id, **facts)

    def _write(self, event: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._as_json:
            line = json.dumps({"time": now, "event": event, **facts}, ensure_ascii=True)
        else:
            shown = " ".join(f"{name}={_plain(value)}" for name, value in facts.items())
            line = f"{now} {event} {shown}".rstrip()
        stream = self._stream or sys.stderr
        try:
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError):  # a closed pipe ends no request
            pass


class LibraryHandler(logging.Handler):
    """Passes on what a library logs, each record as one line."""

    def __init__(self, log: Log, name: str):
        super().__init__(logging.WARNING)
        self._log, self._event = log, name

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record, without the traceback in it."""
        text = record.getMessage()[:300]
        self._log.event(self._event, level=record.levelname.lower(), text=text)


def _plain(value: Any) -> str:
    text = str(value)
    is_plain = text.isascii() and text.isprintable() and " " not in text and '"' not in text
    return text if is_plain and text else json.dumps(text)
