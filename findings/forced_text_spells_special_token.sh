#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# llguidance 1.9.1, tokenizers 0.23.3: where a grammar leaves one text only and the text spells a special token, the mask
# allows that token alone, and the matcher refuses it.
#
# Where a grammar forces a text, llguidance encodes it with the model's tokenizer and allows the first of the tokens. The
# tokenizer finds special tokens in any text, so "<s>" becomes the beginning of a sequence. For the matcher a special
# token is no text, so it does not fit the grammar: the next token that the mask offers, the only one, is an error. One
# would expect the mask to allow the tokens "<", "s" and ">", as it does for "<b>", and every token that a mask allows
# to be accepted.
#
# Users meet it with constants, enums or choices that hold "<s>", in HTML for example, and tokenizers of LLaMA's kind;
# or with names of roles such as "<|user|>". The request ends in an error whatever the model says.
#
# Seen:
#   "<b>": ['"', '<', 'b', '>', '"'], complete
#   "<s>": ['"', '<s>'], Parser Error: token "…[256]" doesn't satisfy the grammar; …
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet llguidance==1.9.1 tokenizers==0.23.3

venv/bin/python - <<'PYTHON'
import json

from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id("</s>")
guide = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=[end])


def follow(text):
    """Take what the masks allow, one token each time, until the text is complete or a token is refused."""
    matcher = LLMatcher(guide, LLMatcher.grammar_from_json_schema(json.dumps({"const": text})), log_level=0)
    tokens = []
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        [token] = [token for token in range(size) if mask[token // 8] >> token % 8 & 1]
        tokens.append(tokenizer.id_to_token(token))
        if not matcher.consume_token(token):
            return tokens, matcher.get_error().splitlines()[0]
    return tokens, "complete"


for text in ("<b>", "<s>"):
    tokens, outcome = follow(text)
    print(f'"{text}": {tokens}, {outcome}')
assert follow("<b>") == (['"', "<", "b", ">", '"'], "complete"), "changed: other tokens for a text without special ones"
assert follow("<s>")[0] == ['"', "<s>"], "changed: text that spells a special token is encoded as text"
assert "doesn't satisfy the grammar" in follow("<s>")[1], "changed: the special token is accepted"
PYTHON
