# SPDX-License-Identifier: Apache-2.0
"""A gRPC server that answers like the ensemble with made-up words, and remembers what it was asked.

What the prompt begins with decides: "endless" streams until the request is cancelled, "error X" answers with the error
message X, "late error X" does so after two words, "busy N" answers the first N requests with UNAVAILABLE, "status X"
ends the call with that gRPC status, "silent" ends the request without an answer; anything else gets as many words as
max_tokens says.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

WORDS = ("The", " capital", " of", " Japan", " is", " Tōkyō", " 🗼", ".")
DTYPES = {"BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}


@dataclass
class Recorded:
    """A request as it came."""

    model: str
    tensors: dict[str, tuple[str, list[int], list[Any]]]  # name → datatype, shape, values
    peer: str
    timeout: float | None
    metadata: dict[str, str] = field(default_factory=dict)
    answered: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def end(self) -> None:
        if not self.answered:
            self.cancelled.set()
        self.ended.set()

    def value(self, name: str, default: Any) -> Any:
        return self.tensors[name][2][0] if name in self.tensors else default


class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves on a free port of 127.0.0.1 from `start` to `stop`."""

    def __init__(self) -> None:
        self.requests: list[Recorded] = []
        self.num_streams = 0  # that were opened
        self.unready = ""  # what the health model reports
        self._server = grpc.server(ThreadPoolExecutor(max_workers=16))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait(10)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(Recorded(request.model_name, {}, context.peer(), context.time_remaining()))
        if self.unready:
            context.abort(grpc.StatusCode.UNAVAILABLE, self.unready)
        return service_pb2.ModelInferResponse(model_name=request.model_name)

    def ModelStreamInfer(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        self.num_streams += 1
        for request in request_iterator:
            metadata = dict(context.invocation_metadata())
            recorded = Recorded(
                request.model_name, decode_inputs(request), context.peer(), context.time_remaining(), metadata
            )
            self.requests.append(recorded)
            context.add_callback(recorded.end)
            yield from self._answer(recorded, context)
            recorded.answered = True

    def _answer(self, recorded: Recorded, context: Any) -> Iterator[Any]:
        prompt = recorded.value("text_input", "")
        count = recorded.value("max_tokens", 16)
        stream = recorded.value("stream", False)
        if prompt.startswith("busy ") and len(self.requests) <= int(prompt.split()[1]):
            yield service_pb2.ModelStreamInferResponse(error_message="UNAVAILABLE: the queue is full")
        elif prompt.startswith("error "):
            yield service_pb2.ModelStreamInferResponse(error_message=prompt.removeprefix("error "))
        elif prompt.startswith("late error "):
            yield response(recorded, 0, 1, "")
            yield response(recorded, 1, 2, "")
            yield service_pb2.ModelStreamInferResponse(error_message=prompt.removeprefix("late error "))
        elif prompt.startswith("status "):
            context.abort(grpc.StatusCode[prompt.split()[1]], prompt.split(" ", 2)[2])
        elif prompt.startswith("endless"):
            index = 0
            while not recorded.ended.wait(0.005):
                if stream:
                    yield response(recorded, index, index + 1, "")
                index += 1
        elif prompt.startswith("silent"):
            yield final(service_pb2.ModelStreamInferResponse())
        elif stream:
            for index, number in product(range(count), range(recorded.value("n", 1))):
                yield response(recorded, index, index + 1, "length" if index + 1 == count else "", number)
            yield final(service_pb2.ModelStreamInferResponse())  # by itself, as the server may send it
        else:
            yield final(response(recorded, 0, count, "length"))


def decode_inputs(request: Any) -> dict[str, tuple[str, list[int], list[Any]]]:
    """Every input's datatype, shape and values, from the bytes that were sent."""
    tensors = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            values, rest = [], raw
            while rest:
                (length,) = struct.unpack("<I", rest[:4])
                values.append(rest[4 : 4 + length].decode())
                rest = rest[4 + length :]
        else:
            values = np.frombuffer(raw, DTYPES[tensor.datatype]).tolist()
        tensors[tensor.name] = (tensor.datatype, list(tensor.shape), values)
    return tensors


def response(recorded: Recorded, start: int, end: int, finish_reason: str, number: int = 0) -> Any:
    """The words from start to end, as the ensemble would send them."""
    indices = range(start, end)
    log_probs = [-0.5 for _ in indices] if recorded.value("return_log_probs", False) else []
    likeliest = [(index + rank, -0.5 - rank) for index in indices for rank in range(recorded.value("top_logprobs", 0))]
    infer_response = service_pb2.ModelInferResponse(model_name=recorded.model)

    def add(name: str, datatype: str, size: int, content: bytes) -> None:
        infer_response.outputs.add(name=name, datatype=datatype, shape=[size])
        infer_response.raw_output_contents.append(content)

    for name, text in (
        ("text_output", "".join(WORDS[index % len(WORDS)] for index in indices)),
        ("finish_reason", finish_reason),
    ):
        add(name, "BYTES", 1, struct.pack("<I", len(text.encode())) + text.encode())
    add("num_input_tokens", "INT32", 1, struct.pack("<i", 7))
    add("num_cached_tokens", "INT32", 1, struct.pack("<i", 2))
    add("num_output_tokens", "INT32", 1, struct.pack("<i", len(indices)))
    add("output_ids", "INT32", len(indices), np.array(indices, np.int32).tobytes())
    add("output_log_probs", "FP32", len(log_probs), np.array(log_probs, np.float32).tobytes())
    add("top_token_ids", "INT32", len(likeliest), np.array([one for one, _ in likeliest], np.int32).tobytes())
    add("top_log_probs", "FP32", len(likeliest), np.array([one for _, one in likeliest], np.float32).tobytes())
    add("cumulative_logprob", "FP32", 1, struct.pack("<f", -0.5 * end if log_probs else 0))
    add("sequence_index", "INT32", 1, struct.pack("<i", number))
    return service_pb2.ModelStreamInferResponse(infer_response=infer_response)


def final(message: Any) -> Any:
    """Mark a request's last response, as Triton server does."""
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer()
    server.start()
    yield server
    server.stop()
