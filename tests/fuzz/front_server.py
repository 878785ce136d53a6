# SPDX-License-Identifier: Apache-2.0
"""Sends random requests to a front that listens, over a connection for each."""

from __future__ import annotations

import http.client
import json
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from tests.e2e.calls import in_parallel
from tests.fuzz.http_calls import Answer, HttpCall, check_answer

HANGING_SECONDS = 120.0


class ListeningFront:
    """A front at a port of this machine. It counts the statuses of the answers; one that does not come is an error."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.statuses: Counter[int] = Counter()
        answer = self._call(HttpCall("GET", "/openapi.json", (), ()))
        assert answer is not None
        self.document: dict[str, Any] = json.loads(answer.body)

    def check(self, call: HttpCall) -> None:
        """Make the call and judge its answer."""
        answer = self._call(call)
        if answer is not None:
            self.statuses[answer.status] += 1
            check_answer(call, answer, self.document)

    def check_all(self, calls: Sequence[HttpCall]) -> None:
        """Make the calls at once and judge each answer."""
        in_parallel([lambda call=call: self.check(call) for call in calls])  # type: ignore[misc]

    def _call(self, call: HttpCall) -> Answer | None:
        with socket.create_connection(("127.0.0.1", self._port), HANGING_SECONDS) as connection:
            connection.sendall(_message(call))
            if call.hangs_up_after == 0:
                return None
            response = http.client.HTTPResponse(connection, method=call.method)
            response.begin()
            if call.hangs_up_after is not None:
                response.read1(call.hangs_up_after)
                return None
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())


def _message(call: HttpCall) -> bytes:
    """The bytes of a request. Without a content-length its body travels in chunks."""
    headers = {"host": "front", "connection": "close", **dict(call.headers)}
    body = call.body
    if "content-length" not in headers:
        headers["transfer-encoding"] = "chunked"
        chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in call.pieces if piece]
        body = b"".join(chunks) + b"0\r\n\r\n"
    lines = [f"{call.method} {quote(call.path, safe='/?&=%')} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
