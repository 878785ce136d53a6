#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.20.2 (torch 2.13.0): by default, Gemma 2's attention leaves out the soft cap of its scores.
#
# Gemma 2 bounds the scores of attention by attn_logit_softcapping, c * tanh(score / c), and was trained so.
# transformers 5.20 loads it with the attention implementation "sdpa" unless told otherwise, and that ignores the cap,
# without a warning: the logits are those of a config.json with null there. With attn_implementation="eager" it counts.
# transformers 5.23 loads Gemma 2 with "eager", and refuses "sdpa".
#
# Users meet it when they compare the answers of a server with those of transformers on Python 3.10, for which 5.20.2 is
# the newest: the server looks wrong, and the same comparison on Python 3.11 is right. With the default cap of 50 the
# logits of this model differ by 0.07.
#
# Seen, the largest difference of logits that reach 12:
#   transformers 5.20.2, default sdpa:  from eager 5.776, from no cap 0.000
#   transformers 5.23.0, default eager: from eager 0.000, from no cap 5.776
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 transformers==5.20.2

cat >check.py <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "model_type": "gemma2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16,
    "max_position_embeddings": 64, "initializer_range": 0.4,
}


def run(soft_cap, **options):
    Path("config.json").write_text(json.dumps(SIZES | {"attn_logit_softcapping": soft_cap}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("."), **options).eval()
    with torch.no_grad():
        return model(torch.arange(20).unsqueeze(0)).logits, model.config._attn_implementation


default, implementation = run(3.0)
eager, _ = run(3.0, attn_implementation="eager")
uncapped, _ = run(None, attn_implementation="eager")
from_eager, from_uncapped = (float((default - other).abs().max()) for other in (eager, uncapped))
print(
    f"transformers {transformers.__version__}, default {implementation + ':':6} "
    f"from eager {from_eager:.3f}, from no cap {from_uncapped:.3f}"
)
expected = sys.argv[1]
near, far = (from_uncapped, from_eager) if expected == "uncapped" else (from_eager, from_uncapped)
assert near < 1e-3 and far > 1, f"changed: by default the scores were expected to be {expected}"
PYTHON
export TRANSFORMERS_VERBOSITY=error
venv/bin/python check.py uncapped
venv/bin/python -m pip install --quiet --upgrade transformers==5.23.0
venv/bin/python check.py capped
