"""The log of a server: a line of JSON an event, and nothing of what callers sent."""

import json
import logging
import traceback
from datetime import UTC, datetime
from pathlib import Path

_LONGEST_EVENT = 1000  # characters


class _JsonFormatter(logging.Formatter):
    """A line of JSON an event: for people still legible, for programs to search."""

    def format(self, record):
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": record.process,
            "event": record.getMessage()[:_LONGEST_EVENT],  # MLflow tells names that callers sent
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = _describe(record.exc_info)
        return json.dumps(entry)


def _describe(exc_info):
    # Where, and what kind, but not the text: it may hold what a caller sent.
    kind, _, trace = exc_info
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
    return f"{kind.__name__} at {' < '.join(reversed(places))}"


def set_up_logging():
    """Has everything that this process logs written to standard error in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("carflavor").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    # MLflow's goes to a handler of its own.
    logging.getLogger("mlflow").handlers.clear()
    logging.getLogger("mlflow").propagate = True
