# SPDX-License-Identifier: Apache-2.0
"""The lines of the log, as text and as JSON."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest

from lightllm_backend import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Put back what `set_up` changes in this process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.setattr(root, "handlers", [])
        yield
    root.handlers = handlers
    root.setLevel(level)


def test_json_has_facts_and_exceptions_as_keys(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("worker-0", "json")
    log = logging.getLogger("lightllm.x")
    log.info("%d running", 3, extra=logs.facts(seconds=0.5, tenant="a\nb"))
    try:
        raise ValueError("a bad \udc80 path")
    except ValueError:
        log.exception("it failed at \udc80")
    logs.say("guard", "error", "the engine is replaced", {"pid_of": 7})
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.items() >= {
        "level": "info", "process": "worker-0", "pid": os.getpid(), "logger": "lightllm.x", "message": "3 running",
        "seconds": 0.5, "tenant": "a\nb",
    }.items()  # fmt: skip
    assert second["message"] == "it failed at ?"
    assert "ValueError: a bad" in second["exception"]
    assert (third["process"], third["level"], third["message"], third["pid_of"]) == (
        "guard", "error", "the engine is replaced", 7,
    )  # fmt: skip
    assert first["time"].endswith("+00:00")


def test_text_has_facts_behind_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("front", "text", logging.WARNING)
    log = logging.getLogger("lightllm.x")
    log.info("not told")
    log.warning("request ended", extra=logs.facts(request_id="r\n1 seconds=9", seconds=0.5))
    logs.say("guard", "error", "the engine is replaced")
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(' W front lightllm.x: request ended request_id="r\\n1 seconds=9" seconds=0.5')
    assert second.endswith(" error: the engine is replaced")
    assert os.environ[logs.FORMAT_VARIABLE] == "text", "for the processes that it starts"


def test_json_leaves_out_progress_bars() -> None:
    """The processes that are started next write lines alone."""
    logs.set_up("generation", "json")
    program = "from tqdm import tqdm; print(*tqdm([3]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
