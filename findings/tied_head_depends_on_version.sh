#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 4.57.6 and 5.23.0 (torch 2.13.0): the same checkpoint has another output head in each.
#
# config.json says tie_word_embeddings: true, and model.safetensors has an lm_head.weight that differs from the
# embedding. transformers 4.57 does as config.json says: the head is the embedding, and the file's lm_head.weight is
# dropped without a word. transformers 5.23 does as the file says, with a warning: it leaves the two untied and uses the
# file's lm_head.weight, while model.config.tie_word_embeddings stays true.
#
# Users meet it with fine-tuned checkpoints that were saved untied beside the base model's config.json: an upgrade of
# transformers changes the logits of every token, and a server that goes by config.json agrees with one version only.
#
# Seen:
#   transformers 4.57.6: config says tied: True, the head is: the embedding
#   transformers 5.23.0: config says tied: True, the head is: lm_head.weight
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==4.57.6

cat >check.py <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

torch.manual_seed(0)
sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
untied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
checkpoint = Path("checkpoint")
checkpoint.mkdir(exist_ok=True)
save_file(untied.state_dict(), checkpoint / "model.safetensors", metadata={"format": "pt"})
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes, "tie_word_embeddings": True}
(checkpoint / "config.json").write_text(json.dumps(config))

weights = load_file(checkpoint / "model.safetensors")
model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
names = {"model.embed_tokens.weight": "the embedding", "lm_head.weight": "lm_head.weight"}
head = next(title for name, title in names.items() if torch.equal(model.lm_head.weight, weights[name]))
tied = model.config.tie_word_embeddings
print(f"transformers {transformers.__version__}: config says tied: {tied}, the head is: {head}")
assert (tied, head) == (True, sys.argv[1]), f"changed: the head was expected to be {sys.argv[1]}"
PYTHON
export TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
venv/bin/python check.py "the embedding"
venv/bin/python -m pip install --quiet transformers==5.23.0
venv/bin/python check.py "lm_head.weight"
