#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# aiperf 0.13.0: with HF_HUB_OFFLINE set, --tokenizer no longer takes a directory.
#
# --tokenizer takes "HuggingFace tokenizer identifier, local path, or builtin". With HF_HUB_OFFLINE or
# TRANSFORMERS_OFFLINE in the environment, aiperf passes whatever it was given to huggingface_hub's snapshot_download,
# which looks a repository up in the cache and refuses a path for its form. Any value counts as set, also 0, which for
# huggingface_hub and transformers means online. transformers itself loads the same directory offline.
#
# Users meet it on machines without access to the internet, where the model lies in a directory and HF_HUB_OFFLINE=1
# keeps other programs from waiting for the hub: `aiperf profile --tokenizer /models/llama` first says that the
# tokenizer is fine, starts its services, and then fails with "Repo id must be in the form 'repo_name' or
# 'namespace/repo_name'".
#
# Seen:
#   unset:            [1, 1]
#   HF_HUB_OFFLINE=1: HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name'
#   HF_HUB_OFFLINE=0: HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name'
#   transformers, HF_HUB_OFFLINE=1: [1, 1]
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet aiperf==0.13.0 transformers==5.23.0 tokenizers==0.23.3
unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE

venv/bin/python - "$work/tokenizer" <<'PYTHON' 2>/dev/null
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(sys.argv[1])
PYTHON

cat >load.py <<'PYTHON'
import sys

from aiperf.common.exceptions import TokenizerError
from aiperf.common.tokenizer import Tokenizer

try:
    print(Tokenizer.from_pretrained(sys.argv[1]).encode("a a"))
except TokenizerError as error:
    print(str(error).partition(": ")[2].partition(": '")[0])
PYTHON

online=$(venv/bin/python load.py "$work/tokenizer" 2>/dev/null)
offline=$(HF_HUB_OFFLINE=1 venv/bin/python load.py "$work/tokenizer" 2>/dev/null)
zero=$(HF_HUB_OFFLINE=0 venv/bin/python load.py "$work/tokenizer" 2>/dev/null)
theirs=$(HF_HUB_OFFLINE=1 venv/bin/python -c 'import sys, transformers
print(transformers.AutoTokenizer.from_pretrained(sys.argv[1]).encode("a a"))' "$work/tokenizer" 2>/dev/null)
echo "unset:            $online"
echo "HF_HUB_OFFLINE=1: $offline"
echo "HF_HUB_OFFLINE=0: $zero"
echo "transformers, HF_HUB_OFFLINE=1: $theirs"
[ "$online" = "[1, 1]" ] && [ "$theirs" = "[1, 1]" ] || { echo "changed: the directory is not read at all"; exit 1; }
case $offline in *HFValidationError*) ;; *) echo "changed: HF_HUB_OFFLINE=1 reads a directory"; exit 1 ;; esac
case $zero in *HFValidationError*) ;; *) echo "changed: HF_HUB_OFFLINE=0 reads a directory"; exit 1 ;; esac
