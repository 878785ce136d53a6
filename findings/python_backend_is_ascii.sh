#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0: Python models run with ASCII as the file system encoding, whatever the environment says.
#
# Since Python 3.7 an interpreter uses UTF-8 for file names, environment variables and the standard streams, even in the
# C locale (PEP 538 and 540). The stub process of the Python backend embeds an interpreter that does not: with
# LC_ALL=C.UTF-8, and with PYTHONUTF8=1 too, the encoding in a model is ASCII. An environment variable with other
# characters arrives as surrogates, and opening a file whose name has other characters raises UnicodeEncodeError.
#
# Users meet it when a checkpoint lies in a folder with a name like "Modèles", or when a model prints a prompt: the same
# code works with the same python3 in the same environment, and fails in the server.
#
# Seen (with LC_ALL=C.UTF-8 PYTHONUTF8=1 FOLDER=Modèles):
#   python3: {'encoding': 'utf-8', 'stdout': 'utf-8', 'FOLDER': "'Mod\\xe8les'", 'open': 'works'}
#   model:   {'encoding': 'ascii', 'stdout': 'ascii', 'FOLDER': "'Mod\\udcc3\\udca8les'", 'open': 'UnicodeEncodeError'}
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4
export LC_ALL=C.UTF-8 PYTHONUTF8=1 FOLDER=Modèles

mkdir -p models/encodings/1
cat >models/encodings/config.pbtxt <<'CONFIG'
backend: "python"
input [{ name: "DIRECTORY" data_type: TYPE_STRING dims: [1] }]
output [{ name: "ENCODINGS" data_type: TYPE_STRING dims: [1] }]
instance_group [{ kind: KIND_CPU }]
CONFIG
cat >models/encodings/1/encodings_here.py <<'PYTHON'
import os
import sys


def encodings_here(directory):
    try:
        with open(f"{directory}/Mod\u00e8les", "w"):
            opened = "works"
    except UnicodeEncodeError as error:
        opened = type(error).__name__
    return {
        "encoding": sys.getfilesystemencoding(),
        "stdout": sys.stdout.encoding,
        "FOLDER": ascii(os.environ["FOLDER"]),
        "open": opened,
    }
PYTHON
cat >models/encodings/1/model.py <<'PYTHON'
import json
import os
import sys

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.append(os.path.dirname(__file__))
from encodings_here import encodings_here


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            directory = pb_utils.get_input_tensor_by_name(request, "DIRECTORY").as_numpy().item().decode()
            text = json.dumps(encodings_here(directory))
            output = pb_utils.Tensor("ENCODINGS", np.array([text], dtype=object))
            responses.append(pb_utils.InferenceResponse([output]))
        return responses
PYTHON
start_triton_server venv models

PYTHONPATH=models/encodings/1 venv/bin/python - "http://127.0.0.1:$HTTP_PORT/v2/models/encodings/generate" <<'PYTHON'
import json
import os
import sys
import urllib.request

from encodings_here import encodings_here

here = encodings_here(os.getcwd())
print(f"python3: {here}")
request = urllib.request.Request(sys.argv[1], json.dumps({"DIRECTORY": os.getcwd()}).encode())
with urllib.request.urlopen(request, timeout=10) as response:
    model = json.loads(json.load(response)["ENCODINGS"])
print(f"model:   {model}")
expected = {"encoding": "utf-8", "stdout": "utf-8", "FOLDER": "'Mod\\xe8les'", "open": "works"}
assert here == expected, "python3 itself does not use UTF-8 here"
expected = {"encoding": "ascii", "stdout": "ascii", "FOLDER": "'Mod\\udcc3\\udca8les'", "open": "UnicodeEncodeError"}
assert model == expected, "changed: the encodings in a Python model are other ones"
PYTHON
