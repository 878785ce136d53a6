# SPDX-License-Identifier: Apache-2.0
"""Makes the small tokenizers in this folder: `python tests/data/make_tokenizers.py`.

byte_level/ is byte-level BPE as in BLOOM. llama/ has the two files of LLaMA: a sentencepiece model with byte fallback,
and the tokenizer.json that says the same.
"""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCABULARY_SIZE = 512
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the dog sleeps in the sun until the evening.",
    "A server takes requests, puts them in a queue and answers them one after the other, token by token.",
    "When the text ends, the stream ends; where the stream ends, the client reads the last of the words.",
    "Größe, façade, naïve, señor, Ångström: some words have letters with marks above or below them.",
    "def answer(question):\n    return question.strip() + '\\n'\n\nprint(answer('What is 6 times 7?'))",
    "你好，世界。这是一个很短的句子。今天天气很好。",
    "Быстрая лиса прыгает через ленивую собаку и бежит дальше по лесу.",
]


def make_byte_level(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)


def make_sentencepiece() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def llama_tokenizer_json(model: bytes) -> Tokenizer:
    """What Hugging Face makes of LLaMA's sentencepiece model; its merges are in the order of the pieces' scores."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {pieces.id_to_piece(token_id): token_id for token_id in range(pieces.get_piece_size())}
    merges = [
        (-pieces.get_score(token_id), ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, token_id in ids.items()
        if not (pieces.is_byte(token_id) or pieces.is_control(token_id) or pieces.is_unknown(token_id))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    bpe = models.BPE(
        vocab=ids, merges=[merge[3:] for merge in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def make_llama(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    model = make_sentencepiece()
    (directory / "tokenizer.model").write_bytes(model)
    llama_tokenizer_json(model).save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    here = Path(__file__).parent
    make_byte_level(here / "byte_level")
    make_llama(here / "llama")
