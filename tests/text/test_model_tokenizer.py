# SPDX-License-Identifier: Apache-2.0
"""A model directory's tokenizer may have more tokens than the model, or fewer."""

import json
import shutil
from pathlib import Path

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.registry import ARCHITECTURES
from lightllm_backend.options import ParsedRequest
from lightllm_backend.request import RequestError, RequestOptions
from lightllm_backend.text.model_tokenizer import load_tokenizer, warning_of_tokens_past_model
from lightllm_backend.text.prompt import encode_prompt
from lightllm_backend.text.tokenizer_settings import TokenizerError

DATA = Path(__file__).parents[1] / "data"
LIMITS = LengthLimits(100, "max_req_input_len", 101, "max_req_total_len")
MODEL = {
    "architectures": ["BloomForCausalLM"],
    "hidden_size": 16,
    "n_layer": 1,
    "n_head": 2,
    "layer_norm_epsilon": 1e-5,
}


@pytest.fixture(params=["byte_level", "llama"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """With a tokenizer of 512 ids, and no model yet."""
    return Path(shutil.copytree(DATA / request.param, tmp_path / "model"))


def write_model(directory: Path, vocab_size: int) -> None:
    (directory / "config.json").write_text(json.dumps({**MODEL, "vocab_size": vocab_size}))


@pytest.mark.parametrize("vocab_size", [512, 576])
def test_a_vocabulary_may_be_padded(directory: Path, vocab_size: int) -> None:
    write_model(directory, vocab_size)
    assert load_tokenizer(directory, EngineConfig()).vocab_size == 512


def test_foreign_code_is_warned_of(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(directory, 512)
    load_tokenizer(directory, EngineConfig())
    assert not caplog.records
    load_tokenizer(directory, EngineConfig(trust_remote_code=True))
    assert f"trust_remote_code is true: code from {directory} may run" in caplog.text


@pytest.mark.parametrize("token_id", ["-1", "4194305", "1000000000000", "many"])
def test_an_added_token_s_id_is_one_of_a_vocabulary(directory: Path, token_id: str) -> None:
    """A greater one would make a table of that size."""
    write_model(directory, 512)
    added = {token_id: {"content": "<a>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(TokenizerError, match=f"the added tokens of {directory} are malformed: .*{token_id}"):
        load_tokenizer(directory, EngineConfig())


@pytest.mark.parametrize("auto_map", [5, True, {"AutoConfig": "a.B"}, []])
def test_a_map_of_classes_without_a_tokenizer_means_nothing(directory: Path, auto_map: object) -> None:
    write_model(directory, 512)
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert load_tokenizer(directory, EngineConfig()).vocab_size == 512


def with_pad(directory: Path) -> None:
    """As of a fine-tuned LLaMA-2, whose embedding was not resized for the token that its training filled up with."""
    settings = directory / "tokenizer_config.json"
    old = json.loads(settings.read_text()) if settings.exists() else {}
    added = {"512": {"content": "<pad2>", "special": True, "normalized": False}}
    settings.write_text(json.dumps({**old, "added_tokens_decoder": added, "pad_token": "<pad2>"}))


@pytest.mark.parametrize("mode", ["auto", "slow"])
def test_a_token_past_the_vocabulary_loads_with_a_warning(directory: Path, mode: str) -> None:
    write_model(directory, 512)
    with_pad(directory)
    tokenizer = load_tokenizer(directory, EngineConfig(tokenizer_mode=mode))
    assert tokenizer.tokens_past_model == {512: "<pad2>"}
    assert warning_of_tokens_past_model(tokenizer) == (
        "the tokenizer has ids past the model's vocab_size of 512: 512 (<pad2>); prompts that hold one are refused"
    )
    write_model(directory, 513)
    assert warning_of_tokens_past_model(load_tokenizer(directory, EngineConfig())) is None


def test_a_warning_names_ten_tokens_at_most(directory: Path) -> None:
    write_model(directory, 500)
    warning = warning_of_tokens_past_model(load_tokenizer(directory, EngineConfig()))
    assert warning is not None
    assert warning.count("(") == 10
    assert "509 (" in warning
    assert ") and 2 more; prompts" in warning


@pytest.mark.parametrize("mode", ["auto", "slow"])
def test_a_prompt_with_a_token_past_the_vocabulary_is_refused(directory: Path, mode: str) -> None:
    write_model(directory, 512)
    with_pad(directory)
    tokenizer = load_tokenizer(directory, EngineConfig(tokenizer_mode=mode))

    def encode(text: str, **options: bool) -> list[int]:
        return encode_prompt(ParsedRequest(text, None, RequestOptions(**options)), tokenizer, LIMITS).token_ids

    with pytest.raises(RequestError) as caught:
        encode("a dog<pad2>")
    assert str(caught.value) == (
        "INVALID_ARG: text_input: '<pad2>' is the token 512, which the model does not have; "
        "allowed: text whose tokens have ids below 512"
    )
    assert encode("a dog")
    assert max(encode("a dog<pad2>", parse_special=False)) < 512


def test_a_tokenizer_of_its_own_code_needs_trust(tmp_path: Path) -> None:
    write_model(tmp_path, 512)
    own = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    for mode in ("auto", "slow"):
        with pytest.raises(TokenizerError, match="code of its own .* and trust_remote_code is false; set it to true"):
            load_tokenizer(tmp_path, EngineConfig(tokenizer_mode=mode))


def test_a_model_that_is_not_known_comes_first(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"architectures": ["OPTForCausalLM"]}))
    known = ", ".join(sorted(ARCHITECTURES))
    with pytest.raises(ModelError, match=f"'OPTForCausalLM' is not known; known: {known}$"):
        load_tokenizer(directory, EngineConfig())
