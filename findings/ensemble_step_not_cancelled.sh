#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0, tritonclient 2.73.0: a running step of an ensemble never learns that its request was cancelled.
#
# A decoupled Python model sends a response every 0.1 seconds and asks is_cancelled() before each. When a gRPC client
# cancels its stream after the first response, is_cancelled() becomes true at once if the client called the model
# itself. If the client called an ensemble with that model as its only step, it stays false, and the model runs to its
# end.
#
# Users meet it since an LLM server is an ensemble by custom (tokenizer, generation, detokenizer): the generation of a
# client that has left goes on to its last token, and holds its share of the GPU for that time.
#
# Seen:
#   counter:  cancelled after 1 of 30 responses
#   ensemble: not cancelled, 30 of 30 responses
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4 tritonclient==2.73.0

mkdir -p models/counter/1 models/ensemble/1
cat >models/counter/config.pbtxt <<'CONFIG'
backend: "python"
model_transaction_policy { decoupled: true }
input [{ name: "REPORT" data_type: TYPE_STRING dims: [1] }]
output [{ name: "COUNT" data_type: TYPE_INT32 dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >models/ensemble/config.pbtxt <<'CONFIG'
platform: "ensemble"
input [{ name: "REPORT" data_type: TYPE_STRING dims: [1] }]
output [{ name: "COUNT" data_type: TYPE_INT32 dims: [1] }]
ensemble_scheduling {
  step [{
    model_name: "counter"
    model_version: -1
    input_map { key: "REPORT" value: "REPORT" }
    output_map { key: "COUNT" value: "COUNT" }
  }]
}
CONFIG
cat >models/counter/1/model.py <<'PYTHON'
import os
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Send up to 30 responses, then write how many were sent to the file that the request names."""

    def execute(self, requests):
        for request in requests:
            report = pb_utils.get_input_tensor_by_name(request, "REPORT").as_numpy().item().decode()
            sender = request.get_response_sender()
            sent = 0
            while sent < 30 and not (request.is_cancelled() or sender.is_cancelled()):
                count = pb_utils.Tensor("COUNT", np.array([sent], dtype=np.int32))
                sender.send(pb_utils.InferenceResponse([count]))
                sent += 1
                time.sleep(0.1)
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            with open(report + ".new", "w") as file:
                file.write(str(sent))
            os.rename(report + ".new", report)
PYTHON
start_triton_server venv models

venv/bin/python - "127.0.0.1:$GRPC_PORT" <<'PYTHON'
import queue
import sys
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc


def responses_sent(model):
    report = Path(f"{model}.sent").resolve()
    report_input = tritonclient.grpc.InferInput("REPORT", [1], "BYTES")
    report_input.set_data_from_numpy(np.array([str(report)], dtype=object))
    client = tritonclient.grpc.InferenceServerClient(sys.argv[1])
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error))
    client.async_stream_infer(model, [report_input])
    error = answers.get(timeout=10)
    assert error is None, error
    client.stop_stream(cancel_requests=True)
    deadline = time.monotonic() + 30
    while not report.exists():
        assert time.monotonic() < deadline, f"{model}: no report"
        time.sleep(0.1)
    sent = int(report.read_text())
    print(f"{model + ':':9} {'cancelled after' if sent < 30 else 'not cancelled,'} {sent} of 30 responses")
    return sent


assert responses_sent("counter") < 30, "changed: the model called directly is not cancelled"
assert responses_sent("ensemble") == 30, "changed: the step of the ensemble is cancelled"
PYTHON
