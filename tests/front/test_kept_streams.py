# SPDX-License-Identifier: Apache-2.0
"""The front's client of the ensemble, which keeps its gRPC streams for later requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from lightllm_backend.front.caller import CALLER, Caller, CallingClient
from lightllm_backend.front.kept_streams import KeptStreams
from lightllm_client import InvalidArgument
from tests.client.conftest import FakeServer, fake_server, final  # noqa: F401 (a fixture)

# What holds of a stream for each request holds of kept ones.
from tests.client.test_async_client import (  # noqa: F401
    test_a_closed_stream_has_no_more_chunks,
    test_an_error_in_mid_stream_keeps_the_text_before_it,
    test_closing_from_another_task_ends_the_loop,
    test_closing_the_client_cancels_its_streams,
    test_errors_are_those_of_the_synchronous_client,
    test_leaving_a_stream_cancels_it_on_the_server,
    test_no_server_is_unavailable,
)

LIMIT_SECONDS = 60.0
Run = Callable[[Callable[[CallingClient], Any]], Any]


@pytest.fixture
def run(fake_server: FakeServer) -> Run:  # noqa: F811
    def run(function: Callable[[CallingClient], Any]) -> Any:
        async def with_client() -> Any:
            async with CallingClient(fake_server.url) as client:
                return await asyncio.wait_for(function(client), LIMIT_SECONDS)

        return asyncio.run(with_client())

    return run


def test_a_request_takes_the_stream_of_one_that_is_over(run: Run, fake_server: FakeServer) -> None:  # noqa: F811
    async def ask(client: CallingClient) -> list[int]:
        opened = []
        for number in (1, 1, 2, 2):
            texts = await asyncio.gather(*[client.generate("What?", max_tokens=2) for _ in range(number)])
            assert {text.text for text in texts} == {"The capital"}
            opened.append(fake_server.num_streams)
        chunks = [chunk.text async for chunk in client.stream("What?", max_tokens=2)]
        assert chunks == ["The", " capital"]
        return [*opened, fake_server.num_streams]

    assert run(ask) == [1, 1, 2, 2, 2]


def test_a_stream_ends_with_a_request_that_is_left_or_refused(
    run: Run,
    fake_server: FakeServer,  # noqa: F811
) -> None:
    async def ask(client: CallingClient) -> None:
        stream = client.stream("endless")
        await anext(stream)
        await stream.aclose()
        with pytest.raises(InvalidArgument):
            await client.generate("error INVALID_ARG: no")
        assert (await client.generate("What?", max_tokens=1)).text == "The"

    run(ask)
    assert fake_server.num_streams == 3


def test_headers_belong_to_a_stream(run: Run, fake_server: FakeServer) -> None:  # noqa: F811
    async def ask(client: CallingClient) -> None:
        for trace in ("a", "b"):
            CALLER.set(Caller("id", (("traceparent", trace),)))
            await client.generate("What?")

    run(ask)
    assert [request.metadata["traceparent"] for request in fake_server.requests] == ["a", "b"]


class Stream:
    """Stands for a gRPC call."""

    def __init__(self) -> None:
        self.is_done = self.is_half_closed = False

    def done(self) -> bool:
        return self.is_done

    async def write(self, _request: Any) -> None:
        assert not self.is_done
        assert not self.is_half_closed
        await asyncio.sleep(0)

    async def read(self) -> Any:
        return grpc.aio.EOF if self.is_half_closed else final(service_pb2.ModelStreamInferResponse())

    async def done_writing(self) -> None:
        self.is_half_closed = True


def test_streams_that_the_server_ended_and_those_without_room_are_not_used_again() -> None:
    opened: list[Stream] = []

    def open_stream() -> Stream:
        opened.append(Stream())
        return opened[-1]

    async def ask() -> None:
        streams = KeptStreams(open_stream, max_idle=1)
        calls = [streams.call(service_pb2.ModelInferRequest()) for _ in range(2)]
        for _ in range(2):  # both are sent before the first is over
            await asyncio.gather(*[call.read() for call in calls])
        assert [stream.is_half_closed for stream in opened] == [False, True]
        opened[0].is_done = True
        await streams.call(service_pb2.ModelInferRequest()).read()

    asyncio.run(ask())
    assert len(opened) == 3
