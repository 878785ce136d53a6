#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# uvicorn 0.54.0: an answer that comes before the end of a large body is lost if the connection is to be closed.
#
# An ASGI application may answer a request by its headers alone: 401 without a key, 413 by its Content-Length. If the
# connection stays open, uvicorn reads the rest of the body and drops it, and the client sees the answer. If it is to be
# closed, uvicorn closes it at once, with the client still sending. TCP answers what then arrives with a reset, which
# also discards what the client has received and not read. A client that sends its body before it reads, as Python's
# http.client and all that is built on it, gets ConnectionResetError or BrokenPipeError instead of the answer. RFC 9112
# (9.6) tells servers to close in stages for this reason. With either parser, httptools and h11, it is the same.
#
# Users meet it with long prompts behind a proxy: nginx 1.22, unless told otherwise, asks its upstreams to close each
# connection, and made a 502 of 9 in 10 such answers. Applications that set "connection: close" with such an answer have
# it without a proxy.
#
# Seen (20 requests each, a body of 9 MB; how many saw the answer 401):
#   httptools  connection kept 20, to be closed by the client's header  0
#   h11        connection kept 20, to be closed by the client's header  0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet uvicorn==0.54.0 httptools==0.9.0 h11==0.16.0

venv/bin/python - <<'PYTHON'
import http.client
import socket
import threading

import uvicorn

REQUESTS = 20
BODY = b"a" * 9_000_000


async def application(scope, receive, send):
    """Answer without looking at the body."""
    headers = [(b"content-length", b"7"), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": b"no key\n"})


def saw_the_answer(port, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/", BODY, headers)
        return connection.getresponse().status == 401
    except ConnectionError:
        return False
    finally:
        connection.close()


for parser in ("httptools", "h11"):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(application, http=parser, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        kept = sum(saw_the_answer(port, {}) for _ in range(REQUESTS))
        closed = sum(saw_the_answer(port, {"connection": "close"}) for _ in range(REQUESTS))
        server.should_exit = True
        thread.join()
    print(f"{parser:10} connection kept {kept}, to be closed by the client's header {closed:2}")
    assert kept == REQUESTS, "changed: answers are lost on connections that are kept, too"
    assert closed < REQUESTS, "changed: no answer is lost"
PYTHON
