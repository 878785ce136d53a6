#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0): a loaded model may have no end-of-sequence token, though its config has one.
#
# generate() stops at generation_config.eos_token_id, which is not made from model.config. Two LLaMA folders show it:
# - config.json without eos_token_id, and no generation_config.json: model.config.eos_token_id is 2, LlamaConfig's
#   default, and so is the generation config of LlamaForCausalLM(config); but from_pretrained makes the generation
#   config from the raw JSON, which has no such key.
# - config.json with eos_token_id 5, and a generation_config.json that says only how to sample: that file counts alone,
#   and the explicit token is ignored.
# generate() then runs to the maximum length, without a warning.
#
# Users meet it with converted and hand-written checkpoints: a server that reads the token from the config stops there,
# and transformers, the reference that its output is compared with, does not.
#
# Seen (a model that always answers with the end-of-sequence token of its config, at most 20 tokens):
#   neither file names it:           config 2, generation config None, 20 new tokens
#   generation_config.json is there: config 5, generation config None, 20 new tokens
#   config.json alone:               config 5, generation config 5, 1 new tokens
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0

TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def load(title, answer, eos=None, generation_config=None):
    state = LlamaForCausalLM(LlamaConfig(**sizes)).state_dict()
    weights = {name: torch.zeros_like(weight) for name, weight in state.items()}
    weights["model.embed_tokens.weight"].fill_(1)
    weights["model.norm.weight"].fill_(1)
    weights["lm_head.weight"][answer] = 1  # only this token's logit is above zero
    checkpoint = Path(tempfile.mkdtemp(dir="."))
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
    (checkpoint / "config.json").write_text(json.dumps(config if eos is None else {**config, "eos_token_id": eos}))
    if generation_config is not None:
        (checkpoint / "generation_config.json").write_text(json.dumps(generation_config))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = torch.tensor([[1]])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    new = output[0, 1:].tolist()
    assert set(new) == {answer}, new
    seen = model.config.eos_token_id, model.generation_config.eos_token_id, len(new)
    print(f"{title + ':':32} config {seen[0]}, generation config {seen[1]}, {seen[2]} new tokens")
    return seen


neither = load("neither file names it", answer=2)
hidden = load("generation_config.json is there", answer=5, eos=5, generation_config={"do_sample": False})
named = load("config.json alone", answer=5, eos=5)
assert LlamaForCausalLM(LlamaConfig(**sizes)).generation_config.eos_token_id == 2, "changed: not the config's default"
assert neither == (2, None, 20), "changed: the default of LlamaConfig ends the sequence"
assert hidden == (5, None, 20), "changed: eos_token_id of config.json ends the sequence"
assert named == (5, 5, 1), "changed: eos_token_id of config.json does not end the sequence"
PYTHON
