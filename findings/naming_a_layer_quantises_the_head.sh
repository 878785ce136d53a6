#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.24.0 (bitsandbytes 0.50.2, torchao 0.18.0, torch 2.13.0): naming a layer to be left as it is quantises
# the head.
#
# Without a list of layers to leave out, transformers leaves out the head, which loses much by quantisation. Whoever
# names a sensitive layer in `llm_int8_skip_modules` or `modules_to_not_convert` expects it to be left out as well. The
# list replaces the default instead, so the head is quantised. AWQ's key of the same name adds to the default.
#
# Users meet it when a setting that should make a checkpoint better makes it worse, and when an engine that serves it
# does not expect a quantised head.
#
# Seen (the dtype of each layer's weight in the saved checkpoint; nothing left out, then the down_proj of layer 1):
#   bitsandbytes  None         lm_head bfloat16  down_proj uint8
#   bitsandbytes  [down_proj]  lm_head uint8     down_proj bfloat16
#   torchao       None         lm_head bfloat16  down_proj int8
#   torchao       [down_proj]  lm_head int8      down_proj bfloat16
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 bitsandbytes==0.50.2 \
    torchao==0.18.0

cat >head.py <<'PYTHON'
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from safetensors.torch import load_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

DOWN = "model.layers.1.mlp.down_proj"
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).to(torch.bfloat16).save_pretrained("dense")


def dtype(tensors, layer):
    """Of the layer's weight, whose name torchao changes."""
    (found,) = (value for name, value in tensors.items() if name in (f"{layer}.weight", f"{layer}._weight_qdata"))
    return str(found.dtype).removeprefix("torch.")


def saved(method, left_out):
    if method == "bitsandbytes":
        config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=left_out)
    else:
        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=left_out)
    model = AutoModelForCausalLM.from_pretrained(
        "dense", quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained("quantised")
    tensors = load_file("quantised/model.safetensors")
    found = {layer: dtype(tensors, layer) for layer in ("lm_head", DOWN)}
    named = "[down_proj]" if left_out else "None"
    print(f"{method:13} {named:12} lm_head {found['lm_head']:9} down_proj {found[DOWN]}")
    return found


for method in ("bitsandbytes", "torchao"):
    usual, named = saved(method, None), saved(method, [DOWN])
    assert usual["lm_head"] == "bfloat16" != usual[DOWN], f"changed: {method} leaves something else out by default"
    assert named[DOWN] == "bfloat16", f"changed: {method} does not leave out what is named"
    assert named["lm_head"] != "bfloat16", f"changed: {method} leaves out the head beside what is named"
PYTHON
venv/bin/python head.py 2>errors || { cat errors; exit 1; }
