#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0: the generate endpoint hands priority and timeout to the model instead of obeying them.
#
# The schedule policy extension gives two request parameters a meaning for a model with a dynamic batcher: priority (1
# is the first to leave the queue) and timeout (the longest wait in the queue, in microseconds). The parameters
# extension calls both reserved, not for a model's own use and not visible to it. With the infer endpoint they are. With
# the generate endpoint they are ordinary parameters: the model sees them, the queue does not. The request keeps its
# place and never times out, with status 200. Values that infer refuses, a priority of -1 for example, arrive too.
#
# Users meet it when they move a client from infer to generate for its simpler JSON: deadlines and priorities stop
# working without an error. The other way round, a model that reads a parameter named priority works with generate and
# never gets one with infer.
#
# Seen (the model holds the first request until all are queued; each answer has its turn and the parameters it saw):
#   infer    {}               200 turn 1, saw {}
#   infer    {}               200 turn 3, saw {}
#   infer    {}               200 turn 4, saw {}
#   infer    {'priority': 1}  200 turn 2, saw {}
#   infer    {'timeout': 1}   503 Request timeout expired
#   infer    {'priority': -1} 500 Unable to parse 'priority': attempt to access JSON non-unsigned-integer as [...]
#   generate {}               200 turn 5, saw {}
#   generate {}               200 turn 6, saw {}
#   generate {}               200 turn 7, saw {}
#   generate {'priority': 1}  200 turn 8, saw {'priority': 1}
#   generate {'timeout': 1}   200 turn 9, saw {'timeout': 1}
#   generate {'priority': -1} 200 turn 10, saw {'priority': -1}
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4

mkdir -p models/queue/1
cat >models/queue/config.pbtxt <<'CONFIG'
backend: "python"
max_batch_size: 1
dynamic_batching {
  priority_levels: 2
  default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 60000000 allow_timeout_override: true }
}
input [{ name: "HOLD" data_type: TYPE_STRING dims: [1] }]
output [{ name: "SEEN" data_type: TYPE_STRING dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >models/queue/1/model.py <<'PYTHON'
import json
import os
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Answer a request, once the file that it names is gone, with its turn and the parameters that it came with."""

    def initialize(self, args):
        self.turn = 0

    def execute(self, requests):
        responses = []
        for request in requests:
            hold = pb_utils.get_input_tensor_by_name(request, "HOLD").as_numpy().item().decode()
            while os.path.exists(hold):
                time.sleep(0.01)
            self.turn += 1
            seen = json.dumps([self.turn, json.loads(request.parameters() or "{}")])
            output = pb_utils.Tensor("SEEN", np.array([[seen]], dtype=object))
            responses.append(pb_utils.InferenceResponse([output]))
        return responses
PYTHON
start_triton_server venv models

venv/bin/python - "http://127.0.0.1:$HTTP_PORT/v2/models/queue" <<'PYTHON'
import json
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

hold = Path("hold").resolve()


def post(endpoint, parameters):
    if endpoint == "infer":
        tensor = {"name": "HOLD", "datatype": "BYTES", "shape": [1, 1], "data": [str(hold)]}
        body = {"inputs": [tensor], "parameters": parameters}
    else:
        body = {"HOLD": str(hold), **parameters}
    request = urllib.request.Request(f"{sys.argv[1]}/{endpoint}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]
    return 200, json.loads(answer["outputs"][0]["data"][0] if endpoint == "infer" else answer["SEEN"])


def queue(endpoint):
    """Send requests in this order while the model holds the first, and return the answers."""
    sent = [{}, {}, {}, {"priority": 1}, {"timeout": 1}, {"priority": -1}]
    hold.touch()
    with ThreadPoolExecutor(len(sent)) as pool:
        futures = []
        for parameters in sent:
            futures.append(pool.submit(post, endpoint, parameters))
            time.sleep(0.3)  # nothing tells a client that its request is in the queue
        hold.unlink()
        answers = [future.result() for future in futures]
    for parameters, (status, answer) in zip(sent, answers):
        text = f"turn {answer[0]}, saw {answer[1]}" if status == 200 else answer
        print(f"{endpoint:8} {parameters!s:16} {status} {text}")
    return answers


*plain, first, late, negative = queue("infer")
assert first[0] == 200 and first[1][0] < plain[-1][1][0], "changed: infer does not obey priority"
assert first[1][1] == {}, "changed: infer shows priority to the model"
assert late[0] != 200, "changed: infer does not obey timeout"
assert negative[0] != 200, "changed: infer takes a negative priority"

*plain, first, late, negative = queue("generate")
assert [status for status, _ in (first, late, negative)] == [200] * 3, "changed: generate refuses a parameter"
assert first[1][0] > plain[-1][1][0], "changed: generate obeys priority"
seen = [answer[1] for _, answer in (first, late, negative)]
assert seen == [{"priority": 1}, {"timeout": 1}, {"priority": -1}], "changed: the model sees other parameters"
PYTHON
