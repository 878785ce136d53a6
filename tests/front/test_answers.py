# SPDX-License-Identifier: Apache-2.0
"""A client that hangs up, at any time, ends the engine's requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lightllm_backend.front.application import make_application
from lightllm_backend.front.state import Front
from tests.front.pretended import PretendedClient, chunk


async def hang_up_after(
    front: Front, body: dict[str, Any], num_messages: int, path: str = "/v1/completions", is_whole: bool = True
) -> None:
    """Call the application as a client that leaves after so many messages, or before its body is whole."""
    left = asyncio.Event()
    num_got = 0
    sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": not is_whole}]

    async def receive() -> dict[str, Any]:
        if sent:
            return sent.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal num_got
        num_got += 1
        if num_got >= num_messages:
            left.set()

    if num_messages == 0:
        asyncio.get_running_loop().call_later(0.05, left.set)
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "headers": [(b"content-type", b"application/json")], "client": None, "server": None,
    }  # fmt: skip
    await asyncio.wait_for(make_application(front)(scope, receive, send), 10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stream", "num_messages"),
    [(False, 0), (True, 0), (True, 2)],
    ids=["whole", "before the first event", "in the stream"],
)
@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"]])
def test_a_client_that_hangs_up(
    front: Front, client: PretendedClient, stream: bool, num_messages: int, prompt: Any
) -> None:
    async def check() -> None:
        client.items = [*([chunk("a", 1)] if num_messages else []), asyncio.Event()]
        await hang_up_after(front, {"prompt": prompt, "stream": stream}, num_messages)
        assert client.streams
        assert all(one.closed for one in client.streams)

    asyncio.run(check())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream"])
def test_a_client_that_hangs_up_during_its_upload_is_no_error(front: Front, client: PretendedClient, path: str) -> None:
    """An exception would end up in the log, with a traceback for each such client."""
    asyncio.run(hang_up_after(front, {"prompt": "Hi"}, 0, path, is_whole=False))
    assert not client.streams
