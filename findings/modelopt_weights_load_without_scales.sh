#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.14.1 (nvidia-modelopt 0.47.0, torch 2.13.0): a checkpoint of a quantisation that it does not know
# loads, as noise.
#
# ModelOpt writes Hugging Face directories: fp8 weights, their scales beside them, and "quant_method": "modelopt" in
# config.json. transformers does not know the method. One expects an error, as for an unknown model type. It warns that
# it skips the quantisation and reports the scales as unexpected tensors, then takes the fp8 numbers for the weights,
# which are too large by 1 / scale, here 5,000 times. The model generates noise.
#
# Users meet it when they compare an engine with transformers on the same directory, or check a checkpoint there before
# they serve it.
#
# Seen (the largest weight of a layer, of the model and as transformers loads its export):
#   {'quant_method': 'modelopt', 'quant_algo': 'FP8'}
#   model        0.0859
#   transformers 448
#   Unknown quantization type, got modelopt
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
# requests: ModelOpt imports it and does not require it.
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.14.1 accelerate==1.15.0 nvidia-modelopt==0.47.0 \
    requests==2.32.5

cat >export.py <<'PYTHON'
import json
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LAYER = "model.layers.0.self_attn.q_proj"
torch.manual_seed(0)
sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).to(torch.bfloat16).save_pretrained("dense")
model = AutoModelForCausalLM.from_pretrained("dense", dtype=torch.bfloat16)
expected = float(model.get_submodule(LAYER).weight.abs().max())
mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(torch.arange(64)[None]))
export_hf_checkpoint(model, export_dir="fp8")
with open("fp8/config.json") as file:
    config = json.load(file)["quantization_config"]
print({key: config.get(key) for key in ("quant_method", "quant_algo")})

found = float(AutoModelForCausalLM.from_pretrained("fp8").get_submodule(LAYER).weight.float().abs().max())
print(f"model        {expected:.3g}")
print(f"transformers {found:.3g}")
assert config["quant_method"] == "modelopt", "changed: the checkpoint has another method"
assert found > 100 * expected, "changed: transformers reads the same weights"
PYTHON
venv/bin/python export.py 2>errors || { cat errors; exit 1; }
grep -o "Unknown quantization type, got modelopt" errors
