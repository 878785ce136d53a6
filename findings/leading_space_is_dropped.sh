#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# transformers 5.23.0, sentencepiece 0.2.3: LlamaTokenizer drops one leading space, SentencePiece does not.
#
# A LLaMA tokenizer.model puts a space before every text (add_dummy_prefix). SentencePiece therefore reads " a" as two
# spaces and a letter. LlamaTokenizer, made from the same file, adds the space only to a text that does not begin with
# one: "a" and " a" have the same token ids, and decoding the ids of " a" returns "a". Two leading spaces and more keep
# one too few in the same way. legacy=True, the old behaviour by name, changes nothing.
#
# Users meet it when prompts begin with a space or with indented code: a server that tokenizes with SentencePiece and
# one that tokenizes with transformers give the same model other token ids, and an indented text comes back with one
# space too few.
#
# Seen:
#   'a'    sentencepiece ['▁a'] -> 'a', transformers ['▁a'] -> 'a'
#   ' a'   sentencepiece ['▁', '▁a'] -> ' a', transformers ['▁a'] -> 'a'
#   '  a'  sentencepiece ['▁▁', '▁a'] -> '  a', transformers ['▁', '▁a'] -> ' a'
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet transformers==5.23.0 sentencepiece==0.2.3 protobuf==7.36.2

PYTHONIOENCODING=utf-8 TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'PYTHON'
import sentencepiece
from transformers import LlamaTokenizer

with open("tokenizer.model", "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a a  a   a", "   a  a a"] * 20), model_writer=file, vocab_size=8, model_type="bpe",
        add_dummy_prefix=True, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        normalization_rule_name="identity", minloglevel=2,
    )
processor = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")
tokenizers = [LlamaTokenizer.from_pretrained(".", legacy=legacy) for legacy in (False, True)]
for text in ("a", " a", "  a"):
    ids = processor.encode(text)
    seen = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in tokenizers]
    decoded = tokenizers[0].decode(seen[0])
    print(
        f"{text!r:6} sentencepiece {processor.id_to_piece(ids)} -> {processor.decode(ids)!r},"
        f" transformers {tokenizers[0].convert_ids_to_tokens(seen[0])} -> {decoded!r}"
    )
    assert processor.decode(ids) == text, "changed: sentencepiece does not return the text"
    assert seen[0] == seen[1], "changed: legacy makes a difference"
    if text.startswith(" "):
        assert seen[0] == processor.encode(text[1:]) != ids, "changed: transformers keeps the leading space"
        assert decoded == text[1:], "changed: transformers decodes to another text"
    else:
        assert seen[0] == ids, "changed: a text without a leading space differs"
PYTHON
