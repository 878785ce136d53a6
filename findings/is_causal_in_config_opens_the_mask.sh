#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0): "is_causal": false in config.json lets a decoder see the tokens to come.
#
# No causal language model documents the key, and their config classes do not have it; from_pretrained keeps what it
# does not know. The code that makes attention masks asks the config for is_causal, so false gives LLaMA,
# Mistral, Qwen2 and others a mask in both directions. Nothing warns. generate goes on working, with other
# logits for a prompt than the same model has elsewhere.
#
# Users meet it where a decoder was made into an embedding model and keeps its name in architectures: its config.json
# may have the key, and a server that does not know it serves another model than transformers does.
#
# Seen, whether the logits of a token depend on a later one:
#   no key: no
#   true:   no
#   false:  yes
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

SIZES = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4,
}
EXPECTED = {"no key": "no", "true": "no", "false": "yes"}


def looks_ahead(**more):
    Path("config.json").write_text(json.dumps(SIZES | more))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(".")).eval()
    prompt = torch.arange(20).unsqueeze(0)
    other = prompt.clone()
    other[0, 15] = 63
    with torch.no_grad():
        return not torch.equal(model(prompt).logits[0, 3], model(other).logits[0, 3])


for name, expected in EXPECTED.items():
    seen = "yes" if looks_ahead(**({} if name == "no key" else {"is_causal": json.loads(name)})) else "no"
    print(f"{name + ':':7} {seen}")
    assert seen == expected, f"changed: with {name} it is {seen}"
PYTHON
