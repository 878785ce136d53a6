# SPDX-License-Identifier: Apache-2.0
"""How every process of a server writes its log: a line a record on standard error, as text or as JSON.

Whoever logs facts gives them beside the message, `log.info("request ended", extra=facts(seconds=0.5))`: as JSON they
are keys of their own, as text they follow the message. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

# Also tells processes that read no settings, such as the guard; it is the setting's own variable.
FORMAT_VARIABLE = "LIGHTLLM_LOG_FORMAT"

_FACTS = "lightllm_facts"


def set_up(process: str, log_format: str | None = None, level: int = logging.INFO) -> None:
    """Make all loggers of this process write to standard error. `process`: its name in the lines.

    log_format: None as long as the settings are not known: then as the environment says.
    """
    if log_format is not None:
        choose(log_format)
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter(process) if _writes_json() else _TextFormatter(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def choose(log_format: str) -> None:
    """Set the format of this process and of those that it starts; JSON leaves out their progress bars."""
    os.environ[FORMAT_VARIABLE] = log_format
    if log_format == "json":
        os.environ["TQDM_DISABLE"] = "1"


def facts(**values: Any) -> dict[str, Any]:
    """Return the `extra` of a record that has these facts."""
    return {_FACTS: values}


def say(process: str, level: str, line: str, values: Mapping[str, Any] | None = None) -> None:
    """Print a line without a logger, as the launch command and the guard do. It is not there if nobody reads it."""
    if _writes_json():
        line = _as_json(time.time(), level, process, line, values or {})
    else:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {f'{level}: ' * (level != 'info')}{line}"
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _writes_json() -> bool:
    return os.environ.get(FORMAT_VARIABLE) == "json"


def _as_json(seconds: float, level: str, process: str, message: str, values: Mapping[str, Any]) -> str:
    stamp = datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
    line = {"time": stamp, "level": level, "process": process, "pid": os.getpid(), "message": message, **values}
    # A lone surrogate, as in a path that is not UTF-8, would keep the line from being written.
    return json.dumps(line, ensure_ascii=False, default=str).encode(errors="replace").decode()


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        values = {"logger": record.name, **getattr(record, _FACTS, {})}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return _as_json(record.created, record.levelname.lower(), self._process, record.getMessage(), values)


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname).1s {process} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        values: Mapping[str, Any] = getattr(record, _FACTS, {})
        # As JSON, since a client chooses some of them: none can look like another line or another fact.
        return super().formatMessage(record) + "".join(f" {key}={json.dumps(one)}" for key, one in values.items())
