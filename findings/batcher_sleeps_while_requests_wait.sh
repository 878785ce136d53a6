#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0: a queue limit makes a burst of requests take 30 times as long.
#
# A queue policy, as the limit of a model's queue, can only be given inside dynamic_batching. For a model that does not
# batch (max_batch_size: 0) one would expect that nothing else changes. But its requests now go through the dynamic
# batcher, which puts itself to sleep for up to half a second whenever its one model instance is busy, and is not always
# woken when that is free again. So the more requests come at once, the more half seconds the queue stands still, though
# the instance has nothing to do. Requests that come one after the other are as quick as before.
#
# Users meet it when they bound a queue against overload: the limit refuses at once, as it should, and the requests that
# it lets in wait for most of a minute.
#
# Seen (two cores; a model that returns at once, 300 requests sent together):
#   without a limit: one after the other 1.5 ms each, 300 together 0.2 s, longest pause 0.01 s
#   with a limit:    one after the other 1.6 ms each, 300 together 8.0 s, longest pause 0.50 s
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4 'tritonclient[grpc]==2.73.0'

for name in free limited; do
    mkdir -p "models/$name/1"
    cat >"models/$name/config.pbtxt" <<'CONFIG'
backend: "python"
max_batch_size: 0
input [{ name: "X" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "Y" data_type: TYPE_INT32 dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
    cat >"models/$name/1/model.py" <<'PYTHON'
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Give back what comes."""

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "X").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", values)]) for values in inputs]
PYTHON
done
echo 'dynamic_batching { default_queue_policy { max_queue_size: 1000 } }' >>models/limited/config.pbtxt
start_triton_server venv models

venv/bin/python - "127.0.0.1:$GRPC_PORT" <<'PYTHON'
import sys
import threading
import time

import numpy as np
import tritonclient.grpc as grpcclient

REQUESTS = 300
client = grpcclient.InferenceServerClient(sys.argv[1], channel_args=[("grpc.enable_http_proxy", 0)])
tensor = grpcclient.InferInput("X", [1], "INT32")
tensor.set_data_from_numpy(np.array([1], np.int32))


def alone(model):
    """Seconds of a request when one follows the other."""
    begun = time.monotonic()
    for _ in range(20):
        client.infer(model, [tensor])
    return (time.monotonic() - begun) / 20


def together(model):
    """Seconds until all answers are there, and the longest pause between two."""
    times, all_there = [time.monotonic()], threading.Event()

    def answered(result, error):
        assert error is None, error
        times.append(time.monotonic())
        if len(times) > REQUESTS:
            all_there.set()

    for _ in range(REQUESTS):
        client.async_infer(model, [tensor], answered)
    assert all_there.wait(300), "not all requests were answered"
    return times[-1] - times[0], float(np.diff(times).max())


seconds = {}
for model, text in (("free", "without a limit:"), ("limited", "with a limit:   ")):
    together(model)  # the first burst warms connections up
    one, (seconds[model], pause) = alone(model), together(model)
    print(f"{text} one after the other {1e3 * one:.1f} ms each, {REQUESTS} together {seconds[model]:.1f} s, "
          f"longest pause {pause:.2f} s")
assert seconds["limited"] > 5 * seconds["free"], "changed: the batcher is quick"
PYTHON
