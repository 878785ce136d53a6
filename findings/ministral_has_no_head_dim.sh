#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0): Ministral cannot be built from its own default configuration.
#
# The default of head_dim is None in Mistral's and in Ministral's config class. Mistral's makes hidden_size /
# num_attention_heads of it. Ministral's keeps it, RoPE takes the quotient in its place, and attention computes with
# None, so that a config.json without head_dim ends in a TypeError that names no key. The example in the docstring of
# MinistralConfig, a model of the default configuration, fails in the same way.
#
# Users meet it when they turn a config.json of Mistral into one of Ministral, for a window in some of the layers only:
# the key that has to be added is one that they could leave out before.
#
# Seen, the width of a head (64 / 4):
#   mistral, no head_dim:   16
#   ministral, head_dim 16: 16
#   ministral, no head_dim: TypeError: unsupported operand type(s) for ** or pow(): 'NoneType' and 'float'
#   the docstring's:        TypeError: unsupported operand type(s) for ** or pow(): 'NoneType' and 'float'
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0

TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, MinistralConfig

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def read(**more):
    Path("config.json").write_text(json.dumps(SIZES | more))
    return AutoConfig.from_pretrained(".")


def head_dim(config):
    try:
        with torch.device("meta"):
            return AutoModel.from_config(config).layers[0].self_attn.head_dim
    except TypeError as error:
        return f"TypeError: {error}"


seen = {
    "mistral, no head_dim": head_dim(read(model_type="mistral")),
    "ministral, head_dim 16": head_dim(read(model_type="ministral", head_dim=16)),
    "ministral, no head_dim": head_dim(read(model_type="ministral")),
    "the docstring's": head_dim(MinistralConfig()),
}
for name, result in seen.items():
    print(f"{name + ':':23} {result}")
assert seen["mistral, no head_dim"] == seen["ministral, head_dim 16"] == 16, "changed: heads have another width"
for name in ("ministral, no head_dim", "the docstring's"):
    assert str(seen[name]).startswith("TypeError: "), f"changed: {name} is built"
PYTHON
