#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0: the Python backend unpacks environments in /tmp, whatever TMPDIR says.
#
# A Python model may bring its packages as an archive (EXECUTION_ENV_PATH in config.pbtxt). The server unpacks it into a
# temporary folder, for which it does not look at TMPDIR: the path begins with /tmp/python_env_ in any case. Python code
# in the model does follow TMPDIR. The server makes such a folder even if no model has an archive, and needs it to start
# ("Failed to create temporary directory for Python environments"). The documentation names neither the folder nor a
# setting for it; python_backend's open pull request 380 would add one.
#
# Users meet it in containers with a read-only root, or with a small /tmp that archives of several GB fill: a TMPDIR on
# a large, writable volume helps all other programs and changes nothing here.
#
# Seen:
#   TMPDIR:               /tmp/tmp.bCuWJbKkGz/tmpdir
#   tempfile in a model:  /tmp/tmp.bCuWJbKkGz/tmpdir
#   archive unpacked in:  /tmp/python_env_1O8bi2/0
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4

# The smallest archive that the server takes: it sources bin/activate before it starts the model's process.
mkdir -p tmpdir environment/bin environment/lib models/folders/1
# shellcheck disable=SC2016  # expands when the server sources the file
echo 'export UNPACKED_IN=$(dirname "$(dirname "${BASH_SOURCE[0]}")")' >environment/bin/activate
tar -C environment -czf models/folders/environment.tar.gz bin lib
cat >models/folders/config.pbtxt <<'CONFIG'
backend: "python"
input [{ name: "TEXT" data_type: TYPE_STRING dims: [1] }]
output [{ name: "FOLDERS" data_type: TYPE_STRING dims: [2] }]
instance_group [{ kind: KIND_CPU }]
parameters: {
  key: "EXECUTION_ENV_PATH"
  value: { string_value: "$$TRITON_MODEL_DIRECTORY/environment.tar.gz" }
}
CONFIG
cat >models/folders/1/model.py <<'PYTHON'
import os
import tempfile

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        folders = np.array([tempfile.gettempdir(), os.environ["UNPACKED_IN"]], dtype=object)
        output = pb_utils.Tensor("FOLDERS", folders)
        return [pb_utils.InferenceResponse([output]) for _ in requests]
PYTHON
export TMPDIR=$work/tmpdir
start_triton_server venv models

venv/bin/python - "http://127.0.0.1:$HTTP_PORT/v2/models/folders/generate" <<'PYTHON'
import json
import os
import sys
import urllib.request

request = urllib.request.Request(sys.argv[1], json.dumps({"TEXT": ""}).encode())
with urllib.request.urlopen(request, timeout=10) as response:
    in_model, unpacked = json.load(response)["FOLDERS"]
print(f"TMPDIR:               {os.environ['TMPDIR']}")
print(f"tempfile in a model:  {in_model}")
print(f"archive unpacked in:  {unpacked}")
assert in_model == os.environ["TMPDIR"], "changed: a model does not follow TMPDIR"
assert unpacked.startswith("/tmp/python_env_"), "changed: the archive is unpacked elsewhere"
assert os.path.isdir(unpacked) and not os.listdir(os.environ["TMPDIR"]), "changed: something is in TMPDIR"
PYTHON
