#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0): building a model changes the RoPE settings of its config.
#
# Llama 3's RoPE scaling has its own original_max_position_embeddings. A config.json may have the key at the top level
# too, as Phi-3's has. AutoConfig.from_pretrained keeps both as they are. As soon as a model is built from that config
# the top-level value overwrites the one inside, silently, and the rotary frequencies are computed from it. So the same
# config object says 64 before and 32 after, and the value that counts is not the one that the config shows when loaded.
#
# Users meet it when a program that reads config.json, such as a server, takes the nested value, as the format of Llama
# 3 has it: its frequencies differ from those of transformers.
#
# Seen:
#   the config as loaded: 64
#   a model is built:     32
#   frequencies:          those of 32
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
from transformers import AutoConfig, AutoModelForCausalLM

KEY = "original_max_position_embeddings"
sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def load(inside, **top_level):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, KEY: inside}
    entries = {"model_type": "llama", **sizes, "max_position_embeddings": 128, "rope_scaling": scaling, **top_level}
    Path("config.json").write_text(json.dumps(entries))
    return AutoConfig.from_pretrained(".")


def frequencies(config):
    return AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq


config = load(64, **{KEY: 32})
before = config.rope_parameters[KEY]
print(f"the config as loaded: {before}")
seen = frequencies(config)
after = config.rope_parameters[KEY]
print(f"a model is built:     {after}")
of_32, of_64 = frequencies(load(32)), frequencies(load(64))
assert not torch.equal(of_32, of_64), "the two values make no difference to these frequencies"
print(f"frequencies:          those of {32 if torch.equal(seen, of_32) else 64}")
assert before == 64, "changed: the config as loaded has another value"
assert after == 32, "changed: the config of the model has another value"
assert torch.equal(seen, of_32), "changed: the frequencies are not those of the top-level value"
PYTHON
