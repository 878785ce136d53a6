#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0 (torch 2.13.0, gguf 0.19.0): a LLaMA that is read from a GGUF file has lost its RoPE scaling.
#
# A GGUF file says how a model's rotary embeddings are scaled: kind and factor in the keys llama.rope.scaling.*, and
# Llama 3's kind as factors of the frequencies in a tensor, rope_freqs.weight, which the files of Llama 3.1, 3.2 and 3.3
# have. from_pretrained(gguf_file=...) knows the keys for gpt-oss alone and drops the tensor. The model it makes has the
# same weights and plain rotary embeddings, so that its logits are those of another model; nothing warns, and
# save_pretrained writes a config.json without scaling.
#
# Users meet it when they convert a GGUF file to a directory that a server takes: short prompts read well, as the
# fastest frequencies are scaled least, and long ones do not.
#
# Seen (kind of scaling, the largest difference of a logit from the model that was written, and what the config has):
#   none     0.0   default
#   linear  15.4   default
#   yarn    18.6   default
#   llama3   3.9   default
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 numpy

cat >scaling.py <<'PYTHON'
import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, get_tensor_name_map
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
HEADS, HEAD_DIM, LAYERS, CONTEXT, ORIGINAL = 4, 16, 2, 4096, 1024
IDS = torch.arange(40)[None]
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def make_model(scaling):
    torch.manual_seed(0)
    sizes = {"hidden_size": HEADS * HEAD_DIM, "intermediate_size": 96, "vocab_size": 64}
    counts = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT}
    config = LlamaConfig(**sizes, **counts, initializer_range=0.4, rms_norm_eps=1e-5, rope_scaling=scaling)
    return LlamaForCausalLM(config).eval()


def write(model, scaling, path):
    """As llama.cpp's converter does: its keys, its names of tensors, its order of rows in Q and K."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(config.vocab_size)
    kind = (scaling or {}).get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(ORIGINAL)
    if kind == "llama3":
        factors = make_model(None).model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = values.reshape(HEADS, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


seen = {}
for name, scaling in SCALINGS.items():
    model = make_model(scaling)
    write(model, scaling, f"{name}.gguf")
    found = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{name}.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        difference = float((model(IDS).logits - found(IDS).logits).abs().max())
    seen[name] = difference, found.config.rope_parameters["rope_type"]
    print(f"{name:6} {difference:5.1f}   {seen[name][1]}")
assert seen["none"][0] < 1e-4, "changed: without scaling the logits differ, too"
for name in ("linear", "yarn", "llama3"):
    assert seen[name][0] > 1, f"changed: {name} is kept"
    assert seen[name][1] == "default", f"changed: the config has {seen[name][1]}"
PYTHON
venv/bin/python scaling.py
