#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0, tritonclient 2.73.0: the code of a model's error is lost on the endpoints that LLMs use.
#
# A Python model answers with TritonError("busy", TritonError.UNAVAILABLE). The infer endpoint makes that the HTTP
# status 503, and a unary gRPC call the status UNAVAILABLE. The generate and generate_stream endpoints answer 400 for
# the same error, and an error in a gRPC stream has the message alone: its status() is None.
#
# Users meet it when an overloaded server asks its clients to try again. LLM clients use generate, generate_stream and
# gRPC streams, where retries and load balancers that go by the code take "busy" for a mistake of the client.
#
# Seen:
#   infer:           503
#   generate:        400
#   generate_stream: 400
#   gRPC call:       StatusCode.UNAVAILABLE busy
#   gRPC stream:     None busy
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4 tritonclient==2.73.0

mkdir -p models/busy/1
cat >models/busy/config.pbtxt <<'CONFIG'
backend: "python"
input [{ name: "IN" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "OUT" data_type: TYPE_INT32 dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >models/busy/1/model.py <<'PYTHON'
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        error = pb_utils.TritonError("busy", pb_utils.TritonError.UNAVAILABLE)
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
PYTHON
start_triton_server venv models

venv/bin/python - "$HTTP_PORT" "$GRPC_PORT" <<'PYTHON'
import json
import queue
import sys
import urllib.error
import urllib.request

import grpc
import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

http_port, grpc_port = sys.argv[1:]


def http_status(path, body):
    request = urllib.request.Request(f"http://127.0.0.1:{http_port}/v2/models/busy/{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            status = response.status
    except urllib.error.HTTPError as error:
        status = error.code
    print(f"{path + ':':16} {status}")
    return status


tensor = {"name": "IN", "datatype": "INT32", "shape": [1], "data": [1]}
assert http_status("infer", {"inputs": [tensor]}) == 503, "changed: infer answers another status"
assert http_status("generate", {"IN": 1}) == 400, "changed: generate answers another status"
assert http_status("generate_stream", {"IN": 1}) == 400, "changed: generate_stream answers another status"

client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}")
grpc_input = tritonclient.grpc.InferInput("IN", [1], "INT32")
grpc_input.set_data_from_numpy(np.array([1], dtype=np.int32))
try:
    client.infer("busy", [grpc_input])
    raise AssertionError("changed: the gRPC call succeeds")
except InferenceServerException as error:
    print(f"gRPC call:       {error.status()} {error.message()}")
    assert error.status() == str(grpc.StatusCode.UNAVAILABLE), "changed: the gRPC call has another status"

answers = queue.Queue()
client.start_stream(lambda result, error: answers.put(error))
client.async_stream_infer("busy", [grpc_input])
error = answers.get(timeout=10)
client.stop_stream()
print(f"gRPC stream:     {error.status()} {error.message()}")
assert (error.status(), error.message()) == (None, "busy"), "changed: the error of a gRPC stream has a status"
PYTHON
