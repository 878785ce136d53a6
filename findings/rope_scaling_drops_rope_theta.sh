#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0: a rope_scaling entry discards the rope_theta inside rope_parameters.
#
# transformers 5 writes the RoPE settings of a model as one rope_parameters dictionary, base included. Older checkpoints
# have rope_theta at the top level and rope_scaling beside it. A config.json with both dictionaries is neither merged
# nor refused: rope_scaling replaces rope_parameters as a whole. A base of 500000 becomes LlamaConfig's default of
# 10000, without a warning. The same base at the top level survives.
#
# Users meet it when they extend the context of a checkpoint that transformers 5 saved by adding the rope_scaling entry
# that the model's card or a serving guide names. The model loads, and its answers get worse.
#
# Seen:
#   rope_parameters alone:                     {'rope_theta': 500000.0, 'rope_type': 'default'}
#   rope_theta and rope_scaling:               {'factor': 4.0, 'rope_theta': 500000.0, 'rope_type': 'linear'}
#   rope_parameters and rope_scaling:          {'factor': 4.0, 'rope_theta': 10000.0, 'rope_type': 'linear'}
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet transformers==5.23.0

TRANSFORMERS_VERBOSITY=warning venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

from transformers import AutoConfig


def rope_parameters(title, **entries):
    Path("config.json").write_text(json.dumps({"model_type": "llama", **entries}))
    parameters = dict(sorted(AutoConfig.from_pretrained(".").rope_parameters.items()))
    print(f"{title + ':':42} {parameters}")
    return parameters


saved = {"rope_type": "default", "rope_theta": 500000.0}
scaling = {"rope_type": "linear", "factor": 4.0}
alone = rope_parameters("rope_parameters alone", rope_parameters=saved)
old = rope_parameters("rope_theta and rope_scaling", rope_theta=500000.0, rope_scaling=scaling)
both = rope_parameters("rope_parameters and rope_scaling", rope_parameters=saved, rope_scaling=scaling)
assert alone["rope_theta"] == old["rope_theta"] == 500000.0, "changed: the base is read differently without both keys"
assert both["rope_type"] == "linear", "changed: rope_scaling no longer wins over rope_parameters"
assert both["rope_theta"] == 10000.0, "changed: the base of rope_parameters is no longer lost"
PYTHON
