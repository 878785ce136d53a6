# SPDX-License-Identifier: Apache-2.0
"""Middleware before all handlers: request ids, API keys and the limit of a body. Pure ASGI."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightllm_backend.config import API_KEY_VARIABLE, ConfigError, EngineConfig
from lightllm_backend.front.caller import CALLER, Caller
from lightllm_backend.front.errors import ApiError
from lightllm_backend.front.request_body import RequestBody

# What anybody may ask: whether the server works, which requests there are, and the page, which asks for a key itself.
OPEN_PATHS = ("/", "/health", "/healthz", "/openapi.json")
OPEN_FOLDERS = ("/page/",)

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_ID_HEADER = b"x-request-id"
_TRACE_HEADERS = (b"traceparent", b"tracestate")


def read_api_keys(config: EngineConfig, environment: Mapping[str, str]) -> frozenset[str]:
    """Read the API keys of the file and of the environment, where commas separate several.

    Raise ConfigError for a file that cannot be read or holds no key: a front without keys would be open to everybody.
    """
    keys = {key.strip() for key in environment.get(API_KEY_VARIABLE, "").split(",")}
    if config.api_key_file is not None:
        allowed = "a file of UTF-8 with an API key a line, readable for the server"
        try:
            lines = Path(config.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"api_key_file is {config.api_key_file!r} ({error}); allowed: {allowed}") from None
        of_file = {line.strip() for line in lines if not line.startswith("#")} - {""}
        if not of_file:
            raise ConfigError(f"api_key_file is {config.api_key_file!r}, which holds no key; allowed: {allowed}")
        keys |= of_file
    return frozenset(keys - {""})


def tenant_name(key: str) -> str:
    """The tenant of an API key: a digest, since tenants appear where keys must not."""
    return "key-" + hashlib.sha256(key.encode()).hexdigest()[:16]


class Guard:
    """Answers what must not reach a handler, and gives each request its id and its tenant.

    scope["state"] has `request_id` and, with API keys, `tenant`. The answer repeats the client's x-request-id.
    """

    def __init__(self, application: ASGIApp, api_keys: Iterable[str], max_body_bytes: int) -> None:
        self._application = application
        self._tenants = {hashlib.sha256(key.encode()).digest(): tenant_name(key) for key in api_keys}
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in _HEADERS}
        request_id = headers.get(_ID_HEADER, b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16).encode()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode()
        trace = tuple((name.decode(), headers[name].decode("latin-1")) for name in _TRACE_HEADERS if name in headers)
        CALLER.set(Caller(request_id.decode(), trace))

        body = RequestBody(receive, self._max_body_bytes)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (_ID_HEADER, request_id)]
            elif not message.get("more_body", False) and not body.has_ended:
                await send({**message, "more_body": True})
                await body.drop_rest()
                message = {"type": "http.response.body"}  # with which uvicorn may close the connection
            await send(message)

        try:
            state["tenant"] = self._tenant(scope, headers.get(b"authorization", b""))
            body.check_length(headers.get(b"content-length", b"0"))
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
            return
        await self._application(scope, body.receive, send_with_id)

    def _tenant(self, scope: Scope, authorization: bytes) -> str:
        """Return the tenant of the request's API key; raise ApiError 401 for a wrong one."""
        path: str = scope["path"]
        if not self._tenants or scope["method"] == "OPTIONS" or path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return ""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, each in the same time, so that the time tells nothing.
        found = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(known, digest)]
        if found and scheme.lower() == b"bearer":
            return found[0]
        what = "is not one of the server's keys" if authorization else "is missing"
        raise ApiError(
            401,
            f"the API key {what}; allowed: the header 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


_HEADERS = frozenset([_ID_HEADER, *_TRACE_HEADERS, b"authorization", b"content-length"])
