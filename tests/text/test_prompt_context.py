# SPDX-License-Identifier: Apache-2.0
"""The text of an answer is the text of prompt and answer together after that of the prompt, as in transformers 5.23.

Compared with tokenizers 0.23.3, which is what transformers decodes with.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgpack
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import AutoTokenizer

from lightllm_backend.lengths import LengthLimits
from lightllm_backend.options import ParsedRequest
from lightllm_backend.request import FinishReason, RequestOptions, SamplingParams, TokenChunk
from lightllm_backend.text.incremental_decoding import WindowDecoder
from lightllm_backend.text.prompt import encode_prompt
from lightllm_backend.text.response import DecodeState, ResponseDecoder
from lightllm_backend.text.text_stream import TextStream
from lightllm_backend.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
LIBRARY = tokenizers.Tokenizer.from_file(str(DATA / "llama/tokenizer.json"))
BYTE_LEVEL_LIBRARY = tokenizers.Tokenizer.from_file(str(DATA / "byte_level/tokenizer.json"))
FAST, SLOW = Tokenizer.load(DATA / "llama"), Tokenizer.load(DATA / "llama", mode="slow")
BYTE_LEVEL = Tokenizer.load(DATA / "byte_level")
BOS, EOS, FIRST_BYTE = 1, 2, 3
LIMITS = LengthLimits(1000, "max_req_input_len", 1001, "max_req_total_len")
THE, FOX = (LIBRARY.encode(word, add_special_tokens=False).ids for word in ("the", "fox"))


def metaspace_tokenizer(directory: Path) -> Tokenizer:
    """One without a spelling in bytes, so that a window decodes it; <s> and </s> are special."""
    vocabulary = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁fox", "es", "▁▁", ".", "é"]
    library = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, "<unk>"))
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(directory / "tokenizer.json"))
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return metaspace_tokenizer(tmp_path_factory.mktemp("metaspace"))


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool) -> str:
    """Token by token, each by a decoder of its own that goes on from the state of the one before, as it travels."""
    decoder = tokenizer.incremental_decoder(skip, prompt)
    text = ""
    for token_id in output:
        state = msgpack.packb(decoder.state())
        decoder = tokenizer.incremental_decoder(skip)
        decoder.restore(msgpack.unpackb(state))
        text += decoder.push([token_id])
    return text + decoder.flush()


# Words, bytes and special tokens at any place.
llama_ids = st.lists(st.sampled_from([BOS, EOS, *THE, *FOX, 430]) | st.integers(0, 515), max_size=12)
byte_ids = st.lists(st.integers(FIRST_BYTE, FIRST_BYTE + 255) | st.sampled_from([BOS, *THE]), max_size=12)


@pytest.mark.parametrize("tokenizer", [FAST, SLOW], ids=["tokenizer.json", "tokenizer.model"])
@given(prompt=llama_ids | byte_ids, output=llama_ids | byte_ids, skip=st.booleans())
@example([BOS], THE, True)
@example([BOS, *THE], FOX, True)
@example([BOS, *THE, EOS], FOX, True)
@example([BOS, EOS], FOX, True)
@example([BOS], FOX, False)
@example([*THE, *(FIRST_BYTE + byte for byte in "🙂".encode()[:2])], THE, True)
def test_prompt_and_answer_together_are_the_text_of_all(tokenizer: Tokenizer, prompt, output, skip):
    text = tokenizer.decode_prompt(prompt, skip) + continuation(tokenizer, prompt, output, skip)
    assert text == tokenizer.decode([*prompt, *output], skip)


@given(prompt=st.lists(st.integers(0, 511), max_size=12), output=st.lists(st.integers(0, 511), max_size=12))
def test_the_same_of_byte_level_vocabularies(prompt, output):
    for skip in (True, False):
        text = BYTE_LEVEL.decode_prompt(prompt, skip) + continuation(BYTE_LEVEL, prompt, output, skip)
        assert text == BYTE_LEVEL_LIBRARY.decode([*prompt, *output], skip_special_tokens=skip)


@given(prompt=st.lists(st.integers(0, 9), max_size=40), output=st.lists(st.integers(0, 9), max_size=12))
@example([1] * 30 + [4] + [2] * 30, [5])
@example([1] * 30, [5])
def test_the_same_of_a_window(metaspace: Tokenizer, prompt, output):
    for skip in (True, False):
        text = metaspace.decode_prompt(prompt, skip) + continuation(metaspace, prompt, output, skip)
        assert text == metaspace.decode([*prompt, *output], skip)


@given(text=st.text(st.sampled_from("a 你😀🙂👨👩\u200dé"), max_size=12), cut=st.integers(0, 40))
@example("ab 🙂", BYTE_LEVEL.encode("ab 🙂").__len__() - 1)
@example("\u200d👨aé", 8)  # one token has the a and the first byte of the é
def test_a_window_gives_the_character_that_the_prompt_begins(text: str, cut: int):
    ids = BYTE_LEVEL.encode(text)
    decoder = WindowDecoder(BYTE_LEVEL_LIBRARY.decode)
    decoder.begin(ids[:cut])
    answer = "".join([decoder.push([token_id]) for token_id in ids[cut:]])
    assert BYTE_LEVEL.decode_prompt(ids[:cut]) + answer == text or cut >= len(ids)
    assert decoder.flush() == ""


@pytest.mark.parametrize("tokenizer", [FAST, SLOW], ids=["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The quick", " fox jumps"),
        ("The quick", "er fox"),
        ("a dog</s>", " sleeps"),
        ("", "fox"),
        ("[INST] hi [/INST]", " Yes"),
    ],
)
def test_the_answer_is_what_transformers_has_after_the_prompt(tokenizer, skip, prompt, answer):
    theirs = AutoTokenizer.from_pretrained(DATA / "llama")
    prompt_ids = theirs(prompt).input_ids
    output = theirs("x" + answer, add_special_tokens=False).input_ids[1:]
    whole = theirs.decode([*prompt_ids, *output], skip_special_tokens=skip)
    before = theirs.decode(prompt_ids, skip_special_tokens=skip)
    assert whole.startswith(before)
    assert continuation(tokenizer, prompt_ids, output, skip) == whole[len(before) :]


def test_a_prompt_of_special_tokens_alone_has_no_text_so_the_first_space_goes():
    for tokenizer in (FAST, SLOW):
        assert continuation(tokenizer, [BOS], [*THE, *FOX], True) == "the fox"
        assert continuation(tokenizer, [BOS], [*THE, *FOX], False) == " the fox"
        assert continuation(tokenizer, [BOS, *THE, EOS], FOX, True) == " fox"


def test_a_character_that_the_prompt_begins_is_the_answer_s():
    smile = [FIRST_BYTE + byte for byte in "🙂".encode()]
    for tokenizer in (FAST, SLOW):
        assert tokenizer.decode_prompt([*THE, *smile[:2]]) == "the"
        assert continuation(tokenizer, [*THE, *smile[:2]], [*smile[2:], *FOX], True) == "🙂 fox"
        assert continuation(tokenizer, [*THE, *smile[:2]], FOX, True) == "\ufffd\ufffd fox"


def test_a_long_prompt_is_not_decoded_and_leaves_a_short_state(metaspace: Tokenizer):
    for tokenizer, word in ((FAST, THE), (SLOW, THE), (BYTE_LEVEL, THE), (metaspace, [4])):
        decoder = tokenizer.incremental_decoder(prompt_ids=word * 200_000)
        assert len(msgpack.packb(decoder.state())) < 100
    lengths = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return "x" * len(ids)

    decoder = WindowDecoder(decode)
    decoder.begin(range(1_000_000))
    assert sum(lengths) < 100


# The same through a request


STOPS: list[tuple[tuple[str, ...], str]] = [((), " fox the"), ((" fox",), ""), ((" the",), " fox"), (("fox",), " ")]


@pytest.mark.parametrize("tokenizer", [FAST, SLOW], ids=["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("by_text", [True, False], ids=["text_input", "input_ids"])
@pytest.mark.parametrize("echo", [True, False], ids=["echo", "answer"])
@pytest.mark.parametrize(("stop_words", "expected"), STOPS)
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "unary"])
def test_a_request_s_first_word_keeps_its_space(tokenizer, by_text, echo, stop_words, expected, streamed):
    options = RequestOptions(SamplingParams(stop_words=stop_words), exclude_input_in_output=not echo)
    prompt_ids = FAST.encode("the")
    parsed = ParsedRequest("the" if by_text else None, None if by_text else tuple(prompt_ids), options)
    prompt = encode_prompt(parsed, tokenizer, LIMITS)
    assert prompt.token_ids == prompt_ids
    engine_side = TextStream.of(tokenizer, options, prompt.token_ids)
    decoder = ResponseDecoder(tokenizer, DecodeState.of(options, (EOS,), prompt.echo, engine_side))
    output = [*FOX, *THE]
    chunks = [[token_id] for token_id in output] if streamed else [output]
    text = ""
    for token_ids in chunks:
        if engine_side.stopped:
            break
        before = engine_side.num_tokens
        engine_side.push(token_ids)
        kept = token_ids[: engine_side.num_tokens - before]
        reason = FinishReason.STOP if engine_side.stopped else None
        response = decoder.decode(TokenChunk("u", kept, [], reason))
        text += response.text_output if response else ""
        packed = decoder.state().pack()
        decoder = ResponseDecoder(tokenizer, DecodeState.unpack(packed))
    assert engine_side.stopped == bool(stop_words)
    assert text == ("the" if echo else "") + expected


@pytest.mark.parametrize("prompt_of", [lambda ids: ids, lambda ids: [*ids, EOS]], ids=["words", "special"])
def test_the_echo_of_ids_is_the_text_before_the_answer(prompt_of: Callable[[list[int]], list[int]]):
    prompt_ids = prompt_of([BOS, *THE])
    for skip in (True, False):
        options = RequestOptions(skip_special_tokens=skip, exclude_input_in_output=False)
        prompt = encode_prompt(ParsedRequest(None, tuple(prompt_ids), options), FAST, LIMITS)
        assert prompt.echo == LIBRARY.decode(prompt_ids, skip_special_tokens=skip)
        text = prompt.echo + continuation(FAST, prompt_ids, FOX, skip)
        assert text == LIBRARY.decode([*prompt_ids, *FOX], skip_special_tokens=skip)
