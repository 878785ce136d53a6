# SPDX-License-Identifier: Apache-2.0
"""The errors that a call can raise, and how they are told apart.

An error on a gRPC stream carries no status, so the server begins each message with the name of its code. The message
may come wrapped by Triton server, which puts its own words in front. A call that ends as a whole (no connection, a
deadline) does have a gRPC status, and that one is believed first.
"""

from __future__ import annotations

import re
from typing import ClassVar


class LightLLMError(Exception):
    """What went wrong with a call; the subclasses are the known codes, this class itself is any other error."""

    code: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class InvalidArgument(LightLLMError):
    """The request is not one that the server can serve; asking again will not help."""

    code = "INVALID_ARG"


class Unavailable(LightLLMError):
    """No server was reached, or it takes no more requests now; asking again later may help."""

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
    """The caller's timeout passed first; the request was cancelled on the server."""

    code = "DEADLINE_EXCEEDED"


_BY_CODE: dict[str, type[LightLLMError]] = {
    error.code: error for error in (InvalidArgument, Unavailable, Cancelled, NotFound, Internal, DeadlineExceeded)
}
_BY_STATUS: dict[str, type[LightLLMError]] = {**_BY_CODE, "INVALID_ARGUMENT": InvalidArgument}
_CODED = re.compile(rf"\b({'|'.join(_BY_CODE)}): ")

# Triton server refuses some requests before any of our models sees them; its words then have no code in front.
_SERVER_WORDS: tuple[tuple[re.Pattern[str], type[LightLLMError]], ...] = (
    (re.compile("has no available versions|is not ready|at least one version"), Unavailable),
    (re.compile("unknown model"), NotFound),
    (re.compile("unexpected (shape|inference input|datatype)|inputs? but model|unable to load"), InvalidArgument),
)


def error_from_message(message: str) -> LightLLMError:
    """The error that a stream's `error_message` stands for."""
    coded = _CODED.search(message)
    if coded:
        return _BY_CODE[coded[1]](message[coded.end() :])
    for words, error in _SERVER_WORDS:
        if words.search(message):
            return error(message.strip())
    return LightLLMError(message.strip())


def error_from_status(status: str, details: str) -> LightLLMError:
    """The error that a gRPC status (by name) with its details stands for."""
    error = _BY_STATUS.get(status)
    if error is None:
        coded = error_from_message(details)
        return coded if type(coded) is not LightLLMError else LightLLMError(f"{status}: {details}")
    return error(details.removeprefix(f"{error.code}: "))
