# SPDX-License-Identifier: Apache-2.0
"""A collector of OpenTelemetry spans: OTLP over HTTP, as JSON, which Triton server sends, or as protobuf."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Span(NamedTuple):
    name: str
    trace_id: str
    id: str
    parent_id: str
    start: int  # nanoseconds of the clock
    end: int
    attributes: dict[str, Any]


class Collector:
    """Listens on a free port from construction to `stop`."""

    def __init__(self) -> None:
        self.received = b""  # all bodies, decompressed
        self._spans: list[Span] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace by name; of several with the same name the first that has come."""
        return {span.name: span for span in reversed(self._spans) if span.trace_id == trace_id}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body: bytes, is_json: bool) -> None:
        self.received += body
        as_dict = json.loads if is_json else _from_protobuf
        request = as_dict(body)
        for resource in request["resourceSpans"]:
            for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
                ids = [span.get(name, "") for name in ("traceId", "spanId", "parentSpanId")]
                if not is_json:  # OTLP's own JSON has hexadecimal ids, protobuf's has base64
                    ids = [base64.b64decode(one).hex() for one in ids]
                attributes = {pair["key"]: _value(pair["value"]) for pair in span.get("attributes", ())}
                times = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
                self._spans.append(Span(span["name"], *ids, *times, attributes))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                take(body, "json" in self.headers["content-type"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler


def _from_protobuf(body: bytes) -> dict[str, Any]:
    return json_format.MessageToDict(ExportTraceServiceRequest.FromString(body))


def _value(value: dict[str, Any]) -> Any:
    """A value of an attribute, as JSON spells it: {"intValue": "5"}."""
    [(kind, content)] = value.items()
    if kind == "arrayValue":
        return [_value(one) for one in content["values"]]
    return int(content) if kind == "intValue" else content
