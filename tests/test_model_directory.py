# SPDX-License-Identifier: Apache-2.0
"""A model directory's tokenizer and model must agree."""

import json
import shutil
from pathlib import Path

import pytest

from lightllm_backend.config import EngineConfig
from lightllm_backend.model_directory import load_tokenizer
from lightllm_backend.models.errors import ModelError
from lightllm_backend.text import TokenizerError

DATA = Path(__file__).parent / "data"
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


@pytest.mark.parametrize("mode", ["auto", "slow"])
def test_an_id_past_the_vocabulary_is_refused(directory: Path, mode: str) -> None:
    write_model(directory, 511)
    with pytest.raises(ModelError, match=r"model: the tokenizer has ids up to 511, but .* vocab_size is 511; at most"):
        load_tokenizer(directory, EngineConfig(tokenizer_mode=mode))


def test_one_added_token_is_enough(directory: Path) -> None:
    write_model(directory, 512)
    added = {"512": {"content": "<pad2>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ModelError, match="ids up to 512"):
        load_tokenizer(directory, EngineConfig())


def test_a_tokenizer_of_its_own_code_needs_trust(tmp_path: Path) -> None:
    write_model(tmp_path, 512)
    own = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    for mode in ("auto", "slow"):
        with pytest.raises(TokenizerError, match="code of its own .* and trust_remote_code is false; set it to true"):
            load_tokenizer(tmp_path, EngineConfig(tokenizer_mode=mode))


def test_a_model_that_is_not_known_comes_first(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"architectures": ["OPTForCausalLM"]}))
    known = "BloomForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"
    with pytest.raises(ModelError, match=f"'OPTForCausalLM' is not known; known: {known}$"):
        load_tokenizer(directory, EngineConfig())
