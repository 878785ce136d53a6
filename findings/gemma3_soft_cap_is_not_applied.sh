#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0): Gemma 3 takes attn_logit_softcapping and does not apply it.
#
# Gemma 3's config class documents the key as "Scaling factor when applying tanh softcapping on the attention scores",
# each attention layer keeps its value, and the attention function has a parameter for it. Nothing connects the two, so
# that the key changes no logit with any attention implementation, and nothing warns. In Gemma 2 it counts, and
# final_logit_softcapping beside it counts in both.
#
# Users meet it with checkpoints of their own: Google's files of Gemma 3 have null there, but a model trained elsewhere
# with a cap of its scores loads, and answers as another model.
#
# Seen, whether the key changes the logits:
#   gemma2, attn_logit_softcapping:       yes
#   gemma2, final_logit_softcapping:      yes
#   gemma3_text, attn_logit_softcapping:  no
#   gemma3_text, final_logit_softcapping: yes
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
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def logits(model_type, **caps):
    config = SIZES | {"model_type": model_type} | dict.fromkeys(CAPS) | caps
    Path("config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(".")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.arange(20).unsqueeze(0)).logits


for model_type in ("gemma2", "gemma3_text"):
    for key in CAPS:
        seen = "no" if torch.equal(logits(model_type), logits(model_type, **{key: 3.0})) else "yes"
        print(f"{f'{model_type}, {key}:':37} {seen}")
        expected = "no" if (model_type, key) == ("gemma3_text", "attn_logit_softcapping") else "yes"
        assert seen == expected, f"changed: {key} of {model_type}"
PYTHON
