#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0: a gRPC client that is paused for 20 seconds in a stream is disconnected; an HTTP client is not.
#
# By its help, the server sends keepalive pings every two hours (--grpc-keepalive-time) and closes a connection whose
# ping is not acknowledged within 20 seconds (--grpc-keepalive-timeout). So a client seems to have two hours. But gRPC
# makes the same timeout the TCP_USER_TIMEOUT of each connection (gRPC proposal A18): once the sockets' buffers are
# full, Linux ends a connection whose other end has read nothing for 20 seconds, ping or no ping. With
# --grpc-keepalive-timeout=60000 the stream goes on after 30 seconds. HTTP connections have no such limit.
#
# Whether the buffers get full depends on the client's HTTP/2 window, which gRPC adapts to the speed of the connection.
# The client below asks for a large one; with a small one the rest of the stream waits in the server, and nothing ends.
#
# Users meet it with long streams when a client stops in a debugger, is suspended with Ctrl-Z, or runs in a container
# that is paused: its stream survives a few seconds and not half a minute, and the error names no timeout.
#
# Seen:
#   gRPC, paused for 5 s: complete
#   HTTP, paused for 30 s: complete
#   gRPC, paused for 30 s: failed: [StatusCode.UNAVAILABLE] Stream removed (recvmsg:Connection reset by peer (104))
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4 'tritonclient[grpc]==2.73.0'

mkdir -p models/stream/1
cat >models/stream/config.pbtxt <<'CONFIG'
backend: "python"
model_transaction_policy { decoupled: true }
input [{ name: "COUNT" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "CHUNK" data_type: TYPE_STRING dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >models/stream/1/model.py <<'PYTHON'
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Send as many responses of 100 KB as asked for: together more than the buffers of a connection."""

    def execute(self, requests):
        chunk = pb_utils.Tensor("CHUNK", np.array(["x" * 100_000], dtype=object))
        for request in requests:
            sender = request.get_response_sender()
            for _ in range(pb_utils.get_input_tensor_by_name(request, "COUNT").as_numpy().item()):
                sender.send(pb_utils.InferenceResponse([chunk]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
PYTHON
start_triton_server venv models

cat >grpc_client.py <<'PYTHON'
import queue
import sys

import numpy as np
import tritonclient.grpc

COUNT = 300
# A large HTTP/2 window from the start; else gRPC would measure the connection first.
window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 << 20)]
client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}", channel_args=window)
answers = queue.Queue()
client.start_stream(lambda result, error: answers.put(error))
count = tritonclient.grpc.InferInput("COUNT", [1], "INT32")
count.set_data_from_numpy(np.array([COUNT], dtype=np.int32))
client.async_stream_infer("stream", [count])
for number in range(1, COUNT + 1):
    error = answers.get(timeout=120)
    if error is not None:
        print(f"failed: {error}")
        break
    if number == 50:
        print("reads", flush=True)
else:
    print("complete")
client.stop_stream(cancel_requests=True)
PYTHON
cat >http_client.py <<'PYTHON'
import json
import sys
import urllib.request

COUNT = 300
url = f"http://127.0.0.1:{sys.argv[1]}/v2/models/stream/generate_stream"
number = 0
with urllib.request.urlopen(url, json.dumps({"COUNT": COUNT}).encode(), timeout=120) as response:
    for line in response:
        number += line.startswith(b"data:")
        if number == 50 and line.startswith(b"data:"):
            print("reads", flush=True)
print("complete" if number == COUNT else f"failed: {number} responses")
PYTHON
venv/bin/python - "$HTTP_PORT" "$GRPC_PORT" <<'PYTHON'
import signal
import subprocess
import sys
import time

http_port, grpc_port = sys.argv[1:]
clients = []


def pause(script, port):
    """Start a client, stop its process once it reads the stream, and return the process and the time."""
    client = subprocess.Popen([sys.executable, script, port], stdout=subprocess.PIPE, text=True)
    clients.append(client)
    assert client.stdout.readline() == "reads\n", f"{script} cannot read the stream"
    client.send_signal(signal.SIGSTOP)
    return client, time.monotonic()


def outcome(name, client, since, seconds):
    """Let the client go on after so many seconds, and return how its stream ended."""
    time.sleep(max(0, since + seconds - time.monotonic()))
    client.send_signal(signal.SIGCONT)
    text = client.communicate(timeout=30)[0].strip()
    print(f"{name}, paused for {seconds} s: {text}")
    return text


try:
    long = pause("grpc_client.py", grpc_port)
    http = pause("http_client.py", http_port)
    short = pause("grpc_client.py", grpc_port)
    assert outcome("gRPC", *short, 5) == "complete", "changed: a short pause ends the stream"
    assert outcome("HTTP", *http, 30) == "complete", "changed: a pause ends the HTTP stream"
    assert outcome("gRPC", *long, 30).startswith("failed"), "changed: the gRPC stream survives the pause"
finally:
    for client in clients:
        client.kill()
PYTHON
