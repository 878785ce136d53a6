# SPDX-License-Identifier: Apache-2.0
"""Errors from the messages and statuses that servers send."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import lightllm_client
from lightllm_client import Cancelled, DeadlineExceeded, Internal, InvalidArgument, LightLLMError, NotFound, Unavailable
from lightllm_client.errors import error_from_message, error_from_status


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        ("INVALID_ARG: top_k is -2", InvalidArgument, "INVALID_ARG: top_k is -2"),
        ("in ensemble 'lightllm', UNAVAILABLE: the queue is full", Unavailable, "UNAVAILABLE: the queue is full"),
        ("in ensemble 'x', Failed: CANCELLED: a: b", Cancelled, "CANCELLED: a: b"),
        ("NOT_FOUND: gone", NotFound, "NOT_FOUND: gone"),
        ("INTERNAL: INVALID_ARG: quoted", Internal, "INTERNAL: INVALID_ARG: quoted"),
        ("DEADLINE_EXCEEDED: late", DeadlineExceeded, "DEADLINE_EXCEEDED: late"),
        ("NOT_INTERNAL: x", LightLLMError, "UNKNOWN: NOT_INTERNAL: x"),
        ("INTERNAL", LightLLMError, "UNKNOWN: INTERNAL"),
        # as tritonserver 2.51 says it, before any model of ours is asked
        ("Request for unknown model: 'nope' is not found", NotFound, None),
        ("Request for unknown model: 'lightllm' has no available versions", Unavailable, None),
        ("in ensemble 'lightllm', Stub process 'detokenizer_0_1' is not healthy.", Unavailable, None),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", Unavailable, None),
        ("unexpected inference input 'foo' for model 'lightllm'", InvalidArgument, None),
        (
            "[request id: <id_unknown>] unexpected shape for input 'text_input' for model 'lightllm'.",
            InvalidArgument,
            None,
        ),
        ("something else ", LightLLMError, "UNKNOWN: something else"),
    ],
)
def test_an_error_from_a_message(message, kind, text):
    error = error_from_message(message)
    assert type(error) is kind
    assert str(error) == (text or f"{kind.code}: {message}")


@pytest.mark.parametrize(
    ("status", "details", "kind", "text"),
    [
        ("INVALID_ARGUMENT", "INVALID_ARG: no", InvalidArgument, "INVALID_ARG: no"),
        ("UNAVAILABLE", "last error: INTERNAL: x", Unavailable, "UNAVAILABLE: last error: INTERNAL: x"),
        ("INTERNAL", "broken", Internal, "INTERNAL: broken"),
        ("UNKNOWN", "in ensemble, UNAVAILABLE: full", Unavailable, "UNAVAILABLE: full"),
        # of HAProxy 2.6 whose server dies in the middle of an answer
        (
            "UNKNOWN",
            "Stream removed (Data frame with END_STREAM flag received)",
            Unavailable,
            "UNAVAILABLE: the connection was lost: Stream removed (Data frame with END_STREAM flag received)",
        ),
        # of the same, if no part of the answer has come
        (
            "CANCELLED",
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))",
            Unavailable,
            "UNAVAILABLE: the connection was lost: Stream removed (RST_STREAM (Received RST_STREAM with error code 8))",
        ),
        # the caller's own
        ("CANCELLED", "Locally cancelled by application!", Cancelled, "CANCELLED: Locally cancelled by application!"),
        ("CANCELLED", "Stream removed (Channel closed!)", Cancelled, "CANCELLED: Stream removed (Channel closed!)"),
        (
            "INTERNAL",
            "Internal error from Core",
            Unavailable,
            "UNAVAILABLE: the connection was lost: Internal error from Core",
        ),
        ("UNIMPLEMENTED", "not here", LightLLMError, "UNKNOWN: UNIMPLEMENTED: not here"),
    ],
)
def test_an_error_from_a_status(status, details, kind, text):
    error = error_from_status(status, details)
    assert type(error) is kind
    assert str(error) == text


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(Unavailable("full")))
    assert type(error) is Unavailable
    assert str(error) == "UNAVAILABLE: full"


def test_library_and_command_need_neither_the_backend_nor_jinja2():
    code = (
        "import sys, lightllm_client.__main__; "
        "print([m for m in ('jinja2', 'click', 'lightllm_backend', 'torch') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lightllm_client.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
