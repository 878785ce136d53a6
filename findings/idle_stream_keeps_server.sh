#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0: a server that is told to stop does not end while a client holds a gRPC stream open, even if no
# request is on it and the exit timeout is over.
#
# By its help, --exit-timeout-secs is how long an exiting server waits for inferences in flight; "after the timeout
# expires the server exits even if inferences are still in flight". The stream below has none: its client has opened it
# and asks nothing, as clients do that keep a stream for their next request. The server unloads its models and stays for
# as long as the client does; once the client closes the stream, the server ends at once.
#
# Users meet it when they restart a server: a client somewhere that rests, such as one after start_stream(), decides how
# long that takes, and whoever supervises the server has to kill it.
#
# Seen:
#   no stream: ended within 45 s of SIGTERM
#   an idle stream: runs on 45 s after SIGTERM
#   the stream is closed: ended within 45 s
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4 'tritonclient[grpc]==2.73.0'
mkdir models # no model is needed

cat >try.py <<'PYTHON'
import os
import signal
import sys
import time

import tritonclient.grpc

SECONDS = 45  # more than the exit timeout, which is 30


def runs(pid, seconds):
    """Whether the process is still there after so many seconds. The shell reaps it once it has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and os.path.exists(f"/proc/{pid}"):
        time.sleep(0.2)
    return os.path.exists(f"/proc/{pid}")


port, pid, holds_stream = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "stream"
client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port}")
assert client.is_server_ready()
if holds_stream:
    client.start_stream(lambda result, error: None)
    time.sleep(1)
else:
    client.close()
os.kill(pid, signal.SIGTERM)
is_there = runs(pid, SECONDS)
if not holds_stream:
    print("no stream:", f"ended within {SECONDS} s of SIGTERM" if not is_there else "runs on")
    assert not is_there, "changed: without a stream the server does not end either"
    sys.exit()
print("an idle stream:", f"runs on {SECONDS} s after SIGTERM" if is_there else "ended")
assert is_there, "changed: an idle stream no longer keeps the server"
client.stop_stream()
client.close()
is_there = runs(pid, SECONDS)
print("the stream is closed:", "runs on" if is_there else f"ended within {SECONDS} s")
assert not is_there, "changed: the server stays after the stream is closed"
PYTHON
for what in none stream; do
    start_triton_server venv models
    venv/bin/python try.py "$GRPC_PORT" "$TRITON_PID" "$what"
    stop_triton_server
done
