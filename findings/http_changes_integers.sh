#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0: HTTP requests with integers out of range succeed with other numbers.
#
# The HTTP endpoints (infer and generate) read a JSON integer as 64 bits and keep the low bits that the tensor's type
# has: 4294967299 for an INT32 input arrives as 3, and 300 for an INT8 input as 44, with status 200. A request parameter
# is a signed integer of 64 bits if it fits, and a double otherwise: 2**64 - 1 arrives as 1.8446744073709552e+19. A
# number of another kind is refused (3.9 for an INT32), so a client may think that all wrong numbers are.
#
# Users meet it with limits and seeds: a "no limit" of 2**32 tokens becomes a limit of 0, and an unsigned 64-bit seed
# becomes another seed. The model sees only the changed number of a tensor, so it cannot refuse the request.
#
# Seen:
#   INT32 4294967299: 200 arrived as 3
#   INT8 300: 200 arrived as 44
#   INT32 3.9: 500 Unable to parse 'data': attempt to access JSON non-signed-integer as signed-integer
#   seed 9223372036854775807: 200 arrived as 9223372036854775807
#   seed 18446744073709551615: 200 arrived as 1.8446744073709552e+19
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4

mkdir -p models/echo/1
cat >models/echo/config.pbtxt <<'CONFIG'
backend: "python"
input [
  { name: "INT32" data_type: TYPE_INT32 dims: [1] optional: true },
  { name: "INT8" data_type: TYPE_INT8 dims: [1] optional: true }
]
output [{ name: "ARRIVED" data_type: TYPE_STRING dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >models/echo/1/model.py <<'PYTHON'
import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            arrived = json.loads(request.parameters() or "{}")
            for name in ("INT32", "INT8"):
                tensor = pb_utils.get_input_tensor_by_name(request, name)
                if tensor is not None:
                    arrived[name] = tensor.as_numpy().item()
            output = pb_utils.Tensor("ARRIVED", np.array([json.dumps(arrived)], dtype=object))
            responses.append(pb_utils.InferenceResponse([output]))
        return responses
PYTHON
start_triton_server venv models

venv/bin/python - "http://127.0.0.1:$HTTP_PORT/v2/models/echo" <<'PYTHON'
import json
import sys
import urllib.error
import urllib.request


def post(path, body):
    request = urllib.request.Request(f"{sys.argv[1]}/{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def generate(name, number, **also):
    status, body = post("generate", {name: number, **also})
    if status == 200:
        value = json.loads(body["ARRIVED"])[name]
        print(f"{name} {number}: {status} arrived as {value!r}")
        return status, value
    print(f"{name} {number}: {status} {body['error']}")
    return status, None


assert generate("INT32", 4294967299) == (200, 3), "changed: the generate endpoint no longer cuts an INT32 input"
assert generate("INT8", 300) == (200, 44), "changed: the generate endpoint no longer cuts an INT8 input"
assert generate("INT32", 3.9) == (500, None), "changed: a fraction is no longer refused"
tensor = {"name": "INT32", "datatype": "INT32", "shape": [1], "data": [4294967299]}
status, body = post("infer", {"inputs": [tensor]})
assert status == 200 and json.loads(body["outputs"][0]["data"][0]) == {"INT32": 3}, "changed: infer no longer cuts"

assert generate("seed", 2**63 - 1, INT32=1) == (200, 2**63 - 1), "changed for 2**63 - 1"
status, seed = generate("seed", 2**64 - 1, INT32=1)
assert (status, type(seed)) == (200, float), "changed: a parameter above 2**63 - 1 no longer becomes a double"
assert int(seed) != 2**64 - 1, "changed: the value is kept"
PYTHON
