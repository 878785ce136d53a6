# SPDX-License-Identifier: Apache-2.0
"""The ways in which clients call the server, as plain functions; tests stream over gRPC through LightLLMClient."""

from __future__ import annotations

import http.client
import json
import queue
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from lightllm_backend.triton_server.tensors import PROMPT_OUTPUTS, PUBLIC_INPUTS, TOP_LOG_PROBS
from tests.e2e.server import TritonServer

LIMIT_SECONDS = 120.0
NO_PROXY = [("grpc.enable_http_proxy", 0)]
NUMPY_TYPES: dict[str, Any] = {
    "BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32,
    "UINT8": np.uint8,
}  # fmt: skip
BETWEEN_STEPS = {"ensemble": "UINT8", "sealed_chunk": "UINT8"}
LISTS = {
    "input_ids", "output_ids", "output_log_probs", *TOP_LOG_PROBS, *PROMPT_OUTPUTS, *BETWEEN_STEPS,
}  # fmt: skip
DATATYPES = {name: datatype.replace("STRING", "BYTES") for name, (datatype, _) in PUBLIC_INPUTS.items()} | BETWEEN_STEPS


def generate(
    server: TritonServer, body: Mapping[str, Any] | bytes, model: str = "lightllm"
) -> tuple[int, dict[str, Any]]:
    """HTTP generate: the status and the answer's JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=LIMIT_SECONDS)
    try:
        connection.request("POST", f"/v2/models/{model}/generate", _body(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read().decode(errors="replace"))
    finally:
        connection.close()


class GenerateStream:
    """HTTP generate_stream: an iterator of the events' JSON. `drop` hangs up in the middle."""

    def __init__(self, server: TritonServer, body: Mapping[str, Any] | bytes) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=LIMIT_SECONDS)
        self._connection.request("POST", "/v2/models/lightllm/generate_stream", _body(body))
        self._response = self._connection.getresponse()
        self.status = self._response.status

    def __iter__(self) -> GenerateStream:
        return self

    def __next__(self) -> dict[str, Any]:
        while line := self._response.readline():
            if line.strip():
                event: dict[str, Any] = json.loads(line.decode(errors="replace").removeprefix("data: "))
                return event
        self._connection.close()
        raise StopIteration

    def drop(self) -> None:
        if self._connection.sock:
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._response.close()
        self._connection.close()


def _body(body: Mapping[str, Any] | bytes) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def tensors(module: Any, values: Mapping[str, Any], **data: bool) -> list[Any]:
    """Input tensors for tritonclient.http or tritonclient.grpc. data: options of the http tensors' data."""
    inputs = []
    for name, value in values.items():
        datatype = DATATYPES.get(name, "BYTES")
        items = list(value) if isinstance(value, (list, tuple)) or datatype == "UINT8" else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        tensor = module.InferInput(name, [len(items)], datatype)
        tensor.set_data_from_numpy(np.array(items, dtype=NUMPY_TYPES[datatype]), **data)
        inputs.append(tensor)
    return inputs


def infer_http(
    server: TritonServer, values: Mapping[str, Any], model: str = "lightllm_unary", binary: bool = True, **options: Any
) -> Any:
    """A unary call over HTTP; the outputs by name. binary: whether the inputs are, or else JSON."""
    with tritonclient.http.InferenceServerClient(server.http_url, network_timeout=LIMIT_SECONDS) as client:
        result = client.infer(model, tensors(tritonclient.http, values, binary_data=binary), **options)
        return outputs(result, [output["name"] for output in result.get_response()["outputs"]])


def infer_grpc(server: TritonServer, values: Mapping[str, Any], model: str = "lightllm_unary", **options: Any) -> Any:
    """A unary call over gRPC; the outputs by name."""
    with tritonclient.grpc.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as client:
        result = client.infer(model, tensors(tritonclient.grpc, values), **options)
        return outputs(result, [output.name for output in result.get_response().outputs])


def stream_grpc(server: TritonServer, values: Mapping[str, Any], model: str = "lightllm", **options: Any) -> list[Any]:
    """A stream through tritonclient's own client: the outputs of each response; raises the error that it ends with."""
    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    collected = []
    with tritonclient.grpc.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as client:
        client.start_stream(callback=lambda result, error: responses.put((result, error)))
        client.async_stream_infer(
            model, tensors(tritonclient.grpc, values), enable_empty_final_response=True, **options
        )
        while True:
            result, error = responses.get(timeout=LIMIT_SECONDS)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                collected.append(outputs(result, [output.name for output in response.outputs]))
            if response.parameters["triton_final_response"].bool_param:
                return collected


def outputs(result: Any, names: Sequence[str]) -> dict[str, Any]:
    """Outputs as plain values: those of one item as that item, the others as lists."""
    values = {}
    for name in names:
        items = [item.decode() if isinstance(item, bytes) else item for item in result.as_numpy(name).tolist()]
        values[name] = items if name in LISTS or len(items) > 1 else items[0]
    return values


def in_parallel(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of calls that run at once, each in a thread of its own, in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(LIMIT_SECONDS) for future in [pool.submit(call) for call in calls]]
