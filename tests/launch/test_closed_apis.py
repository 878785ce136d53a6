# SPDX-License-Identifier: Apache-2.0
"""The options that close Triton server's administration APIs: nobody can guess or send the value that opens them."""

from __future__ import annotations

import http.client

import grpc
import pytest

from lightllm_backend.launch.closed_apis import closing_options


def opening_values() -> list[str]:
    return [option.rpartition("=")[2] for option in closing_options(())]


def test_each_start_has_another_value() -> None:
    assert len({value for _ in range(3) for value in opening_values()}) == 3


def test_no_header_can_carry_the_value() -> None:
    for value in opening_values():
        connection = http.client.HTTPConnection("127.0.0.1")
        connection.putrequest("GET", "/v2/logging")
        with pytest.raises(ValueError, match="Invalid header value"):
            connection.putheader("closed", value)
        with grpc.insecure_channel("127.0.0.1:1") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/any")(b"", metadata=[("closed", value)])
        assert refused.value.code() is grpc.StatusCode.INTERNAL  # and not UNAVAILABLE, as nobody listens there
