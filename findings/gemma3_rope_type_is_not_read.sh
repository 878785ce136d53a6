#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0): Gemma 3 ignores a rope_scaling whose kind is named by "type".
#
# Older files name the kind of RoPE scaling by "type", newer ones by "rope_type". LLaMA takes either. Gemma 3 in the
# style of transformers 4, with rope_theta and rope_scaling at the top level, takes "rope_type" alone: with "type" its
# layers with full attention keep their frequencies, as if the object were not there. What is said is a warning of an
# unrecognized key, the factor, for the type 'default'.
#
# Users meet it when a tool has written or edited config.json in the older style: the model loads, and long prompts get
# worse answers.
#
# Seen, the first frequency of layers with full attention (a factor of 8 makes it 0.125):
#   llama, rope_type: 0.125
#   llama, type:      0.125
#   gemma3, rope_type: 0.125
#   gemma3, type:      1.0
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0

TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "rope_theta": 1000000.0,
}
GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 8, "rope_local_base_freq": 10000.0}


def first_frequency(model, key):
    scaling = {key: "linear", "factor": 8.0}
    Path("config.json").write_text(json.dumps(SIZES | model | {"rope_scaling": scaling}))
    rotary = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(".")).model.rotary_emb
    frequencies = dict(rotary.named_buffers())
    return float(frequencies.get("full_attention_inv_freq", frequencies.get("inv_freq"))[0])


seen = {
    (name, key): first_frequency(model, key)
    for name, model in {"llama": {"model_type": "llama"}, "gemma3": GEMMA3}.items()
    for key in ("rope_type", "type")
}
for (name, key), frequency in seen.items():
    print(f"{name}, {key + ':':10} {frequency}")
assert seen["llama", "type"] == seen["llama", "rope_type"] == seen["gemma3", "rope_type"] == 0.125, "changed"
assert seen["gemma3", "type"] == 1.0, "changed: Gemma 3 reads type"
PYTHON
