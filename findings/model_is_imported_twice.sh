#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tritonserver 2.51.0: a Python model is imported twice, though its configuration is complete.
#
# Triton server completes configurations by itself: it asks a model's auto_complete_config for what config.pbtxt leaves
# out. If a model has no such function and its config.pbtxt leaves nothing out, one would expect that nothing is asked.
# But the server starts a stub process, which imports model.py and all that it imports, finds no function, and ends;
# only then does the server start the process that serves. So everything outside of the class runs twice, and once with
# --disable-auto-complete-config. (NVIDIA's release notes say that completing may take time as the server starts. They
# do not say that it imports the model, nor that it does so where nothing is missing.)
#
# Users meet it as a start that takes longer by a whole import of torch and transformers, or when a model.py claims a
# port, a file or a GPU as it is imported.
#
# Seen (how many processes import the model and initialize it):
#   by default:                     imported by 2, initialized by 1
#   --disable-auto-complete-config: imported by 1, initialized by 1
set -euo pipefail

# shellcheck source=SCRIPTDIR/common/triton_server.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/triton_server.sh"
work=$(mktemp -d)
trap 'stop_triton_server; rm -rf "$work"' EXIT
cd "$work"
triton_server_from_pip venv numpy==1.26.4

mkdir -p models/complete/1
cat >models/complete/config.pbtxt <<'CONFIG'
name: "complete"
backend: "python"
max_batch_size: 0
version_policy { latest { num_versions: 1 } }
input [{ name: "X" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "Y" data_type: TYPE_INT32 dims: [1] }]
instance_group [{ name: "complete" kind: KIND_CPU count: 1 }]
default_model_filename: "model.py"
CONFIG
cat >models/complete/1/model.py <<'PYTHON'
import os


def note(event):
    with open(os.environ["EVENTS"], "a") as events:
        print(os.getpid(), event, file=events)


note("imported")


class TritonPythonModel:
    def initialize(self, args):
        note("initialized")

    def execute(self, requests):
        return [None for _ in requests]
PYTHON

EVENTS=$work/default start_triton_server venv models
stop_triton_server
EVENTS=$work/disabled start_triton_server venv models --disable-auto-complete-config
stop_triton_server

# count FILE EVENT: how many processes have noted this event.
count() {
    grep " $2\$" "$1" | sort --unique | wc -l
}

default="imported by $(count default imported), initialized by $(count default initialized)"
disabled="imported by $(count disabled imported), initialized by $(count disabled initialized)"
echo "by default:                     $default"
echo "--disable-auto-complete-config: $disabled"
[ "$disabled" = "imported by 1, initialized by 1" ] || { echo "changed: more than one process" >&2; exit 1; }
[ "$default" = "imported by 2, initialized by 1" ] || { echo "changed: the model is imported once" >&2; exit 1; }
