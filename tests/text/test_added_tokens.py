# SPDX-License-Identifier: Apache-2.0
"""Added tokens that only the settings beside a tokenizer's file name, against transformers 5.23 and tokenizers 0.23."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from lightllm_backend.text.added_tokens import AddedToken, AddedTokenSplitter
from lightllm_backend.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")
CONTENTS = ("tool", "<t>", "<t><t>", "a b")
# What may touch a single word or not: a superscript and a combining mark are told apart by few regular expressions.
PIECES = (*CONTENTS, " ", "  ", "\n", "x", ".", "_", "1", "é", "²", "\u0301", "\u200d", "你", "🙂", "</s>")

flags = st.tuples(*[st.booleans() for _ in FLAGS])
token_flags = st.lists(flags, min_size=len(CONTENTS), max_size=len(CONTENTS))
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def decoder_settings(all_flags: list[tuple[bool, ...]]) -> dict[str, dict[str, Any]]:
    """`added_tokens_decoder` with the tokens of CONTENTS."""
    return {
        str(512 + number): {"content": content, **dict(zip(FLAGS, token, strict=True))}
        for number, (content, token) in enumerate(zip(CONTENTS, all_flags, strict=True))
    }


@pytest.fixture(scope="module")
def fresh_directory(tmp_path_factory: pytest.TempPathFactory):
    numbers = itertools.count()

    def make(name: str, remove: tuple[str, ...] = (), files: dict[str, Any] | None = None, **settings: Any) -> Path:
        directory = tmp_path_factory.getbasetemp() / f"added-{next(numbers)}"
        shutil.copytree(DATA / name, directory)
        for file in remove:
            (directory / file).unlink()
        config = directory / "tokenizer_config.json"
        old = json.loads(config.read_text()) if config.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
        for file, content in {**(files or {}), "tokenizer_config.json": old | settings}.items():
            (directory / file).write_text(json.dumps(content))
        return directory

    return make


def assert_same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.encode(text, parse_special=False) == theirs(text, split_special_tokens=True).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte_level", "llama"])
@given(all_flags=token_flags, some=st.lists(texts, min_size=4, max_size=4))
@settings(max_examples=25, deadline=None)
@example([(False, False, True, False, False)] * 4, ["x tool.", "xtool", "tool²", "tool\u0301"])
def test_tokenizer_json_keeps_every_flag_as_transformers(fresh_directory, name, all_flags, some):
    if name == "llama":  # for a token that is both special and normalized see below
        all_flags = [(special, normalized and not special, *more) for special, normalized, *more in all_flags]
    directory = fresh_directory(name, added_tokens_decoder=decoder_settings(all_flags))
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in some:
        assert_same(ours, theirs, text)


def test_a_special_token_that_is_normalized_is_no_text_where_tokenizers_has_it_as_text(fresh_directory):
    """tokenizers 0.23.3 compares its spelling after LLaMA's normalizer, which puts a space before it, with its own."""
    token = {"content": "<turn>", "special": True, "normalized": True}
    directory = fresh_directory("llama", added_tokens_decoder={"512": token})
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.encode("<turn>") == theirs("<turn>").input_ids == [1, 512]
    assert theirs.decode([1, 512], skip_special_tokens=True) == "<turn>"
    assert ours.decode([1, 512]) == ""


def test_flags_of_the_configuration_win_over_those_of_tokenizer_json(fresh_directory):
    token = {"content": "<pad>", "special": False, "normalized": False, "lstrip": True}
    directory = fresh_directory("byte_level", added_tokens_decoder={"3": token})
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    assert_same(ours, theirs, "a <pad> b")
    assert ours.decode(ours.encode("a <pad> b")) == "a b"  # special as in tokenizer.json


def llama_tokenizer() -> Any:
    """What transformers 5.23 makes of tokenizer.model, without the reading of that file, which needs protobuf 7."""
    model = json.loads((DATA / "llama/tokenizer.json").read_text())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], add_bos_token=True)


@given(all_flags=token_flags, some=st.lists(texts, min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
@example([(False, False, True, False, False)] * 4, ["x tool.", "xtool", "tool²", "tool\u0301"])
@example([(False, True, False, False, False), *[(True, False, False, True, True)] * 3], ["a tool <t> b<t><t>"] * 4)
def test_sentencepiece_splits_as_transformers(fresh_directory, all_flags, some):
    added = decoder_settings(all_flags)
    ours = Tokenizer.load(fresh_directory("llama", remove=("tokenizer.json",), added_tokens_decoder=added))
    theirs = llama_tokenizer()
    theirs.add_tokens([tokenizers.AddedToken(**token) for token in added.values()])
    for text in some:
        assert_same(ours, theirs, text if text[:1].strip() else "x" + text)  # for leading white space see below


def test_leading_spaces_are_sentencepieces_where_transformers_has_one_less(fresh_directory):
    ours = Tokenizer.load(fresh_directory("llama", remove=("tokenizer.json",)))
    assert ours.decode(ours.encode("  dog")) == "  dog"
    assert llama_tokenizer().decode(llama_tokenizer()("  dog").input_ids, skip_special_tokens=True) == " dog"


@pytest.mark.parametrize("name", ["byte_level", "llama"])
@pytest.mark.parametrize("text", ["a <m> b", "a<m>b", "a <q> b", "a<q>b", "<m>"])
def test_the_older_files_are_read_as_in_transformers(fresh_directory, name: str, text: str):
    files = {
        "special_tokens_map.json": {"mask_token": {"content": "<m>", "lstrip": True, "single_word": True}},
        "added_tokens.json": {"<m>": 512, "<q>": 513},
    }
    directory = fresh_directory(name, files=files)
    assert_same(Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory), text)


def test_a_named_special_token_of_the_vocabulary_keeps_its_flags(fresh_directory):
    token = {"content": "Ġthe", "__type": "AddedToken", "lstrip": True, "rstrip": True, "normalized": False}
    directory = fresh_directory("byte_level", mask_token=token)
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in ("a Ġthe b", "a the b"):
        assert_same(ours, theirs, text)


def test_tokens_of_a_model_s_own_names_are_special(fresh_directory):
    added = {"512": {"content": "<image>", "special": False, "normalized": False}}
    directory = fresh_directory("byte_level", image_token="<image>", added_tokens_decoder=added)
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    assert_same(ours, theirs, "a<image>b")
    assert ours.decode(ours.encode("a<image>b")) == "ab"


def test_a_splitter_says_where_each_part_begins():
    splitter = AddedTokenSplitter({7: AddedToken("<t>", special=True, normalized=False, lstrip=True)})
    assert splitter.split("ab  <t>c", parse_special=True) == [("ab", 0), 7, ("c", 7)]
    assert splitter.split("ab  <t>c", parse_special=False) == [("ab  <t>c", 0)]
    assert splitter.split("", parse_special=True) == []


def test_a_named_special_token_that_is_not_in_the_vocabulary_is_ignored(fresh_directory):
    for name in ("byte_level", "llama"):
        directory = fresh_directory(name, pad_token="<none>", extra_special_tokens=["<nothing>"])
        ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
        assert theirs("<none>").input_ids[-1] == 512
        assert max(ours.encode("<none><nothing>")) < ours.vocab_size == 512


def test_an_older_file_beside_the_newer_one_adds_tokens(fresh_directory):
    files = {"added_tokens.json": {"<old>": 512}}
    directory = fresh_directory("byte_level", files=files, added_tokens_decoder={"513": {"content": "<new>"}})
    assert Tokenizer.load(directory).encode("<old><new>") == [512, 513]
    assert len(AutoTokenizer.from_pretrained(directory)("<old><new>").input_ids) > 2
