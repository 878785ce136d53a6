# SPDX-License-Identifier: Apache-2.0
"""Loading and encoding, against transformers and against sentencepiece itself."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from lightllm_backend.text.tokenizer import Tokenizer
from lightllm_backend.text.tokenizer_settings import TokenizerError

DATA = Path(__file__).parents[1] / "data"
TEXTS = [
    "",
    "Hello world",
    " a leading space",
    "two  spaces,\ttabs\n\nand lines\n",
    "numbers 1234567 and 3.14",
    "你好，世界 🙂 👨‍👩‍👧 e\u0301 ﷽",
    "Größe façade Быстрая",
    "a <s> in the middle</s> and <unk> and <pad>",
    "<s>at the start",
]


@pytest.fixture
def model_dir(tmp_path: Path):
    """A writable copy of one of the small tokenizers, with changed settings."""

    def make(name: str, remove: tuple[str, ...] = (), **settings: object) -> Path:
        directory = tmp_path / name
        shutil.copytree(DATA / name, directory)
        for file in remove:
            (directory / file).unlink()
        config = directory / "tokenizer_config.json"
        old = json.loads(config.read_text()) if config.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(old | settings))
        return directory

    return make


def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(DATA / "llama/tokenizer.model"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"add_bos_token": False, "add_eos_token": True}),  # tokenizer.json has the last word
        ("byte_level", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}),
        ("byte_level", {"eos_token": {"content": "</s>", "__type": "AddedToken"}}),
    ],
)
def test_encoding_and_decoding_is_that_of_transformers(model_dir, text: str, name: str, settings: dict):
    directory = model_dir(name, **settings)
    theirs, ours = AutoTokenizer.from_pretrained(directory), Tokenizer.load(directory)
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.encode(text, parse_special=False) == theirs(text, split_special_tokens=True).input_ids
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_encoding_of_the_embedded_model_is_that_of_transformers():
    directory = Path(os.environ.get("LIGHTLLM_CACHE") or "~/.cache/lightllm").expanduser() / "SmolLM2-135M-Instruct"
    if not (directory / "tokenizer.json").exists():
        pytest.skip(f"{directory} has not been made")
    theirs, ours = AutoTokenizer.from_pretrained(directory), Tokenizer.load(directory)
    for text in [*TEXTS, "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"]:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.encode(text, parse_special=False) == theirs(text, split_special_tokens=True).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_tokens_only_if_they_may_be():
    tokenizer = Tokenizer.load(DATA / "byte_level")
    assert tokenizer.encode("</s>") == [2]
    as_text = tokenizer.encode("</s>", parse_special=False)
    assert 2 not in as_text
    assert tokenizer.decode(as_text) == "</s>"
    assert tokenizer.decode([2]) == ""
    assert tokenizer.decode([2], skip_special_tokens=False) == "</s>"


@pytest.mark.parametrize("mode", ["auto", "slow"])
@pytest.mark.parametrize("text", ["Hello world", "<s>at the start", "a long text " * 100])
def test_special_tokens_around_a_text_can_be_left_out(mode: str, text: str):
    tokenizer = Tokenizer.load(DATA / "llama", mode)
    bos, *rest = tokenizer.encode(text)
    assert tokenizer.is_special(bos)
    assert not tokenizer.is_special(rest[-1])
    assert tokenizer.encode(text, add_special_tokens=False) == rest


@pytest.mark.parametrize("text", [text for text in TEXTS if "<" not in text])
def test_sentencepiece_alone_encodes_as_sentencepiece(model_dir, text: str):
    tokenizer = Tokenizer.load(model_dir("llama", remove=("tokenizer.json",)))
    ids = tokenizer.encode(text)
    assert ids == [1, *pieces().encode(text)]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_both_files_of_llama_say_the_same_without_special_tokens(text: str):
    fast, slow = Tokenizer.load(DATA / "llama"), Tokenizer.load(DATA / "llama", mode="slow")
    ids = slow.encode(text, parse_special=False)
    assert type(fast) is not type(slow)
    assert ids == fast.encode(text, parse_special=False)
    assert slow.decode(ids) == fast.decode(ids) == text


def test_sentencepiece_splits_off_special_tokens(model_dir):
    slow = Tokenizer.load(DATA / "llama", mode="slow")
    head, tail = pieces().encode("a dog "), pieces().encode("sleeps")
    tail_without_prefix = slow.encode("<s>sleeps", parse_special=True)[2:]
    assert slow.encode("a dog </s>sleeps") == [1, *head, 2, *tail_without_prefix]
    assert slow.decode(tail_without_prefix) == "sleeps"
    assert tail_without_prefix != tail  # which has the space that sentencepiece puts before a text
    legacy = Tokenizer.load(model_dir("llama", remove=("tokenizer.json",), legacy=True))
    assert legacy.encode("a dog </s>sleeps") == [1, *head, 2, *tail]


def test_sentencepiece_takes_added_tokens_from_the_files_beside_it(model_dir):
    added = {"513": {"content": "<|turn|>", "special": True, "lstrip": True, "rstrip": True}}
    directory = model_dir("llama", remove=("tokenizer.json",), added_tokens_decoder=added)
    (directory / "added_tokens.json").write_text('{"<tool>": 512}')
    tokenizer = Tokenizer.load(directory)
    dog = pieces().encode("dog")
    assert tokenizer.vocab_size == 514
    assert tokenizer.encode("dog  <|turn|> \n <tool>") == [1, *dog, 513, 512]
    assert tokenizer.decode([*dog, 513, 512]) == "dog<tool>"
    assert tokenizer.decode([*dog, 513, 512], skip_special_tokens=False) == "dog<|turn|><tool>"
    plain = tokenizer.encode("dog<|turn|><tool>", parse_special=False)
    assert 513 not in plain
    assert plain[-1] == 512
    assert tokenizer.decode([600, *dog, 600]) == "dog"


@pytest.mark.parametrize(
    ("settings", "head", "tail"), [({}, [1], []), ({"add_bos_token": False, "add_eos_token": True}, [], [2])]
)
def test_sentencepiece_adds_bos_unless_told_otherwise(model_dir, settings: dict, head: list, tail: list):
    directory = model_dir("llama", remove=("tokenizer.json", "tokenizer_config.json"), **settings)
    assert Tokenizer.load(directory).encode("dog") == [*head, *pieces().encode("dog"), *tail]


def test_sentencepiece_splits_off_the_longest_added_token(model_dir):
    directory = model_dir("llama", remove=("tokenizer.json",), extra_special_tokens=["<tool>"])
    (directory / "added_tokens.json").write_text('{"<tool>": 512, "<tool><tool>": 513}')
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode([512, 513]) == "<tool><tool>"  # only 512 was named as special
    # Where both are looked for in the same pass; special ones that are not normalized come first.
    assert tokenizer.encode("<tool><tool><tool>") == [1, 512, 512, 512]
    (directory / "added_tokens.json").write_text('{"<turn>": 512, "<turn><turn>": 513}')
    assert Tokenizer.load(directory).encode("<turn><turn><turn>") == [1, 513, 512]


def add_token(directory: Path, token_id: int, content: str, **flags: bool) -> None:
    """Add a token to a directory's tokenizer.json."""
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"].append({"id": token_id, "content": content, **plain, **flags})
    file.write_text(json.dumps(tokenizer))


def test_a_token_that_the_settings_name_as_special_is_special(model_dir):
    directory = model_dir("byte_level", additional_special_tokens=["<call>", "<turn>"], pad_token="<no such token>")
    add_token(directory, 512, "<call>")
    add_token(directory, 513, "<turn>", special=True, rstrip=True)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.vocab_size == 514
    assert tokenizer.encode("<call>") == [512]
    assert 512 not in tokenizer.encode("<call>", parse_special=False)
    assert tokenizer.decode([512]) == ""
    assert tokenizer.encode("<turn> \n<call>") == [513, 512]  # it keeps what the file says of it


def test_a_token_that_only_the_settings_have_is_added(model_dir):
    directory = model_dir("byte_level", added_tokens_decoder={"512": {"content": "<call>", "special": True}})
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("<call>") == [512]
    assert tokenizer.decode([512], skip_special_tokens=False) == "<call>"
    assert tokenizer.decode([512]) == ""


def test_added_tokens_of_a_byte_level_vocabulary_are_spelled_as_in_the_library(model_dir):
    directory = model_dir("byte_level")
    contents = ["<a b>", "<｜turn｜>", "<é>", "🙂", "\u2581"]
    for number, content in enumerate(contents):
        add_token(directory, 512 + number, content)
    ours, library = Tokenizer.load(directory), tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for token_id in range(512, 512 + len(contents)):
        assert ours.decode([token_id, 100]) == library.decode([token_id, 100])
    assert ours.decode([512, 513, 515, 516]) == "<a b><｜turn｜>🙂\u2581"


def test_a_decoder_that_strips_nothing_keeps_the_first_space(model_dir):
    directory = model_dir("llama", remove=("tokenizer.model",))
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    assert content["decoder"]["decoders"].pop()["type"] == "Strip"
    file.write_text(json.dumps(content))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.encode("the dog")) == " the dog"
    assert tokenizer.decode(tokenizer.encode("the dog")) == AutoTokenizer.from_pretrained(directory).decode(
        tokenizer.encode("the dog"), skip_special_tokens=True
    )


def test_limits_saved_with_a_tokenizer_do_not_cut_or_fill_a_prompt(model_dir):
    directory = model_dir("byte_level")
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 32},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    file.write_text(json.dumps(content))
    expected = Tokenizer.load(DATA / "byte_level").encode("the quick brown fox jumps")
    assert len(expected) > 4
    assert Tokenizer.load(directory).encode("the quick brown fox jumps") == expected


def test_mode_slow_loads_other_kinds_through_transformers(model_dir, tmp_path: Path):
    content = json.loads((DATA / "byte_level/tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in content["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    names = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(TokenizerError, match="tokenizer_mode slow"):
        Tokenizer.load(tmp_path)
    tokenizer, same = Tokenizer.load(tmp_path, mode="slow"), Tokenizer.load(DATA / "byte_level")
    text = "The fox 🙂 sleeps.</s>你好"
    ids = tokenizer.encode(text)
    assert ids == same.encode(text)
    assert tokenizer.encode(text, parse_special=False) == same.encode(text, parse_special=False)
    assert tokenizer.vocab_size == same.vocab_size
    assert tokenizer.decode(ids) == same.decode(ids) == text.replace("</s>", "")
    decoder = tokenizer.incremental_decoder()
    deltas = [decoder.push([token_id]) for token_id in ids]
    assert "".join(deltas) + decoder.flush() == text.replace("</s>", "")
    assert not any("\ufffd" in delta for delta in deltas)


def test_unloadable_directories_say_what_is_wrong(model_dir, tmp_path: Path):
    def error(directory: Path, **options: object) -> str:
        with pytest.raises(TokenizerError) as caught:
            Tokenizer.load(directory, **options)
        return str(caught.value)

    assert "nowhere is not a directory" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "tokenizer.json or tokenizer.model" in error(tmp_path / "empty")
    assert "empty has no tokenizer that transformers can load" in error(tmp_path / "empty", mode="slow")
    assert error(DATA / "llama", mode="fast") == "tokenizer_mode is 'fast'; allowed: auto or slow"
    directory = model_dir("llama")
    for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model"):
        file = directory / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert str(file) in error(directory, mode="slow" if name == "tokenizer.model" else "auto")
        file.write_bytes(whole)
    (directory / "added_tokens.json").write_text('{"<tool>": "first"}')
    assert "added tokens" in error(directory)
    for number in ("Infinity", "NaN", "1.5"):
        (directory / "added_tokens.json").write_text(f'{{"<tool>": {number}}}')
        assert "are malformed: ValueError('the id" in error(directory)
    (directory / "added_tokens.json").write_text("[]")
    assert "added_tokens.json holds an array; a JSON object is needed" in error(directory)


@pytest.mark.parametrize("mode", ["auto", "slow"])
def test_a_lone_surrogate_cannot_be_encoded(mode: str):
    with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
        Tokenizer.load(DATA / "llama", mode=mode).encode("ab\ud800c")


def test_no_torch_is_imported():
    program = (
        "import sys\n"
        "from lightllm_backend.text.text_stream import TextStream\n"
        "from lightllm_backend.text.tokenizer import Tokenizer\n"
        "for mode in ('auto', 'slow'):\n"
        f"    tokenizer = Tokenizer.load({str(DATA / 'llama')!r}, mode)\n"
        "    assert TextStream(tokenizer).push(tokenizer.encode('Hello')) == 'Hello'\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("mode", ["auto", "slow"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_a_long_text_leaves_other_threads_their_turns(mode: str, parse_special: bool):
    tokenizer = Tokenizer.load(DATA / "llama", mode=mode)
    text = "the quick brown fox</s> " * 25_000
    thread = threading.Thread(target=tokenizer.encode, args=(text, parse_special))
    turns = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20


@pytest.mark.parametrize("parse_special", [True, False])
def test_long_texts_are_encoded_as_short_ones(parse_special: bool):
    library, text = tokenizers.Tokenizer.from_file(str(DATA / "llama/tokenizer.json")), "the fox</s> é " * 200
    library.encode_special_tokens = not parse_special
    assert Tokenizer.load(DATA / "llama").encode(text, parse_special) == library.encode(text).ids
