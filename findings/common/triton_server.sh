# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Sourced by the scripts that need NVIDIA Triton Inference Server; do not run it.
#
# The server is the one that the package nvidia-pytriton 0.7.0 carries (tritonserver 2.51.0 with the Python backend).
# Its stub is linked to libpython, so python3 must have been built with a shared library.

# triton_server_from_pip VENV REQUIREMENT...: make the virtual environment VENV and install the server into it.
triton_server_from_pip() {
    local venv=$1
    shift
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet nvidia-pytriton==0.7.0 "$@"
}

# start_triton_server VENV REPOSITORY [OPTION...]: start the server with these options on free ports of 127.0.0.1 and
# wait until it is ready. Sets TRITON_PID, HTTP_PORT and GRPC_PORT. The log is REPOSITORY.log, the backend directory
# REPOSITORY.backends.
start_triton_server() {
    local venv repository=$2 packages server version libraries
    venv=$(realpath "$1")
    shift 2
    local backends=$repository.backends log=$repository.log
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    libraries=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
    server=$packages/pytriton/tritonserver

    # The package keeps the backend and the stubs (one for each Python) apart; the server wants them in one folder.
    mkdir -p "$backends/python"
    ln -sf "$server"/backends/python/* "$server/python_backend_stubs/$version/triton_python_backend_stub" \
        "$backends/python/"

    read -r HTTP_PORT GRPC_PORT < <("$venv/bin/python" -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))')
    PATH=$venv/bin:$PATH LD_LIBRARY_PATH=$packages/nvidia_pytriton.libs:$libraries \
        "$server/bin/tritonserver" --model-repository="$repository" --backend-directory="$backends" \
        --http-address=127.0.0.1 --http-port="$HTTP_PORT" --grpc-address=127.0.0.1 --grpc-port="$GRPC_PORT" \
        --allow-metrics=false "$@" >"$log" 2>&1 &
    TRITON_PID=$!
    local deadline=$((SECONDS + 60))
    until "$venv/bin/python" -c '
import sys, urllib.request
urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/v2/health/ready", timeout=5)' "$HTTP_PORT" 2>/dev/null; do
        if ! kill -0 "$TRITON_PID" 2>/dev/null || ((SECONDS > deadline)); then
            tail -n 20 "$log" >&2
            echo "tritonserver did not become ready" >&2
            return 1
        fi
        sleep 0.2
    done
}

# stop_triton_server: stop the server that start_triton_server started, if any; by force if it does not end by itself.
stop_triton_server() {
    if [ -n "${TRITON_PID:-}" ]; then
        kill "$TRITON_PID" 2>/dev/null || true
        local deadline=$((SECONDS + 40))
        while kill -0 "$TRITON_PID" 2>/dev/null && ((SECONDS < deadline)); do
            sleep 0.2
        done
        kill -KILL "$TRITON_PID" 2>/dev/null || true
        wait "$TRITON_PID" 2>/dev/null || true
        TRITON_PID=
    fi
}
