# SPDX-License-Identifier: Apache-2.0
"""The errors that a call can raise, and how they are told apart.

An error on a gRPC stream carries no status, so the server begins each message with the name of its code. Triton server
may put its own words in front of the message. A call that fails as a whole (no connection, a deadline) has a gRPC
status, which decides.
"""

from __future__ import annotations

import re
from typing import ClassVar


class LightLLMError(Exception):
    """A call failed. Each subclass is a known code; this class itself is any other error."""

    code: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class InvalidArgument(LightLLMError):
    """The server cannot serve this request; asking again will not help."""

    code = "INVALID_ARG"


class Unavailable(LightLLMError):
    """The client reached no server, or the server takes no more requests now; asking again later may help."""

    code = "UNAVAILABLE"


class Cancelled(LightLLMError):
    """The request was cancelled, or ended by the server's deadline."""

    code = "CANCELLED"


class NotFound(LightLLMError):
    """The server has no such model."""

    code = "NOT_FOUND"


class Internal(LightLLMError):
    """The server failed, or broke the protocol."""

    code = "INTERNAL"


class DeadlineExceeded(LightLLMError):
    """The caller's timeout passed, and the client cancelled the request on the server."""

    code = "DEADLINE_EXCEEDED"


_BY_CODE: dict[str, type[LightLLMError]] = {
    error.code: error for error in (InvalidArgument, Unavailable, Cancelled, NotFound, Internal, DeadlineExceeded)
}
_BY_STATUS: dict[str, type[LightLLMError]] = {**_BY_CODE, "INVALID_ARGUMENT": InvalidArgument}
# What gRPC says of a call whose connection ended before its status came: a server has died behind a proxy. The last one
# is grpc.aio's if not even the initial metadata had come.
_CUT = re.compile("Stream removed|RST_STREAM|END_STREAM|Internal error from Core")
# The status is CANCELLED if the proxy resets the stream with HTTP/2's CANCEL, and of what the caller has cancelled.
_RESET = "Received RST_STREAM"
_CODED = re.compile(rf"\b({'|'.join(_BY_CODE)}): ")

# Triton server refuses some requests before any of our models sees them; its message then has no code in front.
_SERVER_WORDS: tuple[tuple[re.Pattern[str], type[LightLLMError]], ...] = (
    (
        re.compile("has no available versions|is not ready|is not healthy|at least one version|Server is stopping"),
        Unavailable,
    ),
    (re.compile("unknown model"), NotFound),
    (re.compile("unexpected (shape|inference input|datatype)|inputs? but model|unable to load"), InvalidArgument),
)


def error_from_message(message: str) -> LightLLMError:
    """The error for a stream's `error_message`."""
    coded = _CODED.search(message)
    if coded:
        return _BY_CODE[coded[1]](message[coded.end() :])
    for words, error in _SERVER_WORDS:
        if words.search(message):
            return error(message.strip())
    return LightLLMError(message.strip())


def error_from_status(status: str, details: str) -> LightLLMError:
    """The error for a gRPC status (by name) with its details."""
    if (status in ("UNKNOWN", "INTERNAL") and _CUT.search(details)) or (status == "CANCELLED" and _RESET in details):
        return Unavailable(f"the connection was lost: {details}")
    error = _BY_STATUS.get(status)
    if error is None:
        coded = error_from_message(details)
        return coded if type(coded) is not LightLLMError else LightLLMError(f"{status}: {details}")
    return error(details.removeprefix(f"{error.code}: "))
