# SPDX-License-Identifier: Apache-2.0
"""What a rank finds out of a model and its machine: device, warnings, and how long requests may be."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightllm_backend import kernels
from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.models.errors import ModelError
from lightllm_backend.models.model_config import UNLIMITED_POSITIONS, ModelConfig
from lightllm_backend.worker.load import CPU_POOL_TOKENS, choose_device, load_engine


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that says it has them; the list is what becomes the current one."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the number of threads is set to; the machine has six cores."""
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    return chosen


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_a_gpu_of_its_own(two_gpus, rank) -> None:
    assert choose_device(EngineConfig(tp=2), rank) == torch.device("cuda", rank)
    assert two_gpus == [rank]


def test_more_ranks_than_gpus_are_refused(two_gpus) -> None:
    with pytest.raises(ConfigError, match="tp is 3; allowed: at most 2, the number of GPUs that PyTorch finds"):
        choose_device(EngineConfig(tp=3), 0)
    assert two_gpus == []


@pytest.mark.parametrize(("tp", "expected"), [(1, 6), (2, 3), (4, 1), (8, 1)])
def test_ranks_share_the_cores(two_gpus, threads, tp, expected) -> None:
    assert choose_device(EngineConfig(tp=tp, device="cpu"), tp - 1) == torch.device("cpu")
    assert threads == [expected]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is 'cuda', but PyTorch finds no GPU"):
        choose_device(EngineConfig(device="cuda"), 0)


def dummy_model(directory: Path, **changes: object) -> EngineConfig:
    """Settings for a little model of random weights, on the CPU."""
    shape = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    (directory / "config.json").write_text(json.dumps({**shape, **changes}))
    return EngineConfig(model_dir=str(directory), load_format="dummy", device="cpu", dtype="float32")


@pytest.mark.parametrize("both", [True, False])
def test_a_rope_that_does_not_count_is_warned_of(tmp_path, caplog, both) -> None:
    parameters = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}} if both else {}
    load_engine(dummy_model(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}, **parameters))
    assert ("rope_scaling counts, and not rope_parameters beside it" in caplog.text) == both


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("model_type", "exceeds"), [("gemma2", True), ("gemma3_text", True), ("llama", False)])
def test_a_model_that_overflows_in_float16_is_warned_of(tmp_path, caplog, model_type, exceeds, dtype) -> None:
    changes = {"model_type": model_type, "head_dim": 8, "num_key_value_heads": 1}
    load_engine(replace(dummy_model(tmp_path, **changes), dtype=dtype))
    assert ("overflow in float16" in caplog.text) == (exceeds and dtype == "float16")


@pytest.mark.parametrize(("weight_dtype", "quantized"), [("fp8", {}), ("auto", {"quant_method": "fp8"}), ("int8", {})])
def test_fp8_on_a_cpu_is_warned_of(tmp_path, caplog, weight_dtype, quantized) -> None:
    changes = {"quantization_config": {"activation_scheme": "dynamic", **quantized}} if quantized else {}
    load_engine(replace(dummy_model(tmp_path, **changes), weight_dtype=weight_dtype))
    assert ("fp8 weights are dequantised" in caplog.text) == (weight_dtype != "int8")


def test_a_pool_beyond_the_memory_of_a_cpu_is_refused(tmp_path) -> None:
    config = replace(dummy_model(tmp_path), max_total_token_num=10**15)
    with pytest.raises(
        ConfigError, match="max_total_token_num is 1000000000000000; allowed: at most what this machine"
    ):
        load_engine(config)


def test_an_eos_id_beyond_the_vocabulary_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"eos_id is 1000000; allowed: ids of the model's vocabulary, < \d+$"):
        load_engine(replace(dummy_model(tmp_path), eos_id=(1, 1000000)))


def test_a_dtype_that_does_not_exist_is_refused_on_a_cpu_as_well(tmp_path) -> None:
    with pytest.raises(ModelError, match="torch_dtype is 'bfloat17'; allowed: bfloat16, float16, "):
        load_engine(dummy_model(tmp_path, torch_dtype="bfloat17"))


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
}  # fmt: skip
BLOOM = {
    "architectures": ["BloomForCausalLM"], "vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip


def info(directory: Path, model: dict[str, object], **settings: object) -> EngineInfo:
    (directory / "config.json").write_text(json.dumps(model))
    fixed = {"load_format": "dummy", "device": "cpu", "dtype": "float32", "running_max_req_size": 3}
    return load_engine(EngineConfig(model_dir=str(directory), **(fixed | settings))).info


@pytest.mark.parametrize(
    ("model", "pool_tokens", "longest", "source"),
    [
        (LLAMA, None, CPU_POOL_TOKENS + 1, "the KV pool of 16384 tokens"),
        (LLAMA, 131071, 131072, "the model's limit"),
        (LLAMA, 131070, 131071, "the KV pool of 131070 tokens"),
        (LLAMA | {"max_position_embeddings": 2048}, None, 2048, "the model's limit"),
        (LLAMA | {"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, None, 8192,
         "the model's limit"),
        (LLAMA | {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, None, 8192,
         "the model's limit"),
        (BLOOM, None, CPU_POOL_TOKENS + 1, "the KV pool of 16384 tokens"),
        (BLOOM, 2 * UNLIMITED_POSITIONS, UNLIMITED_POSITIONS, "the model's limit"),
        (BLOOM | {"seq_length": 2048}, None, 2048, "the model's limit"),
    ],
)  # fmt: skip
def test_requests_are_as_long_as_the_model_and_the_pool_allow(
    tmp_path, caplog, model, pool_tokens, longest, source
) -> None:
    loaded = info(tmp_path, model, max_total_token_num=pool_tokens)
    limits = loaded.lengths
    assert (limits.max_input, limits.max_total) == (longest - 1, longest)
    assert limits.max_input_source == limits.max_total_source == source
    # Both tables, with a row for padding.
    assert loaded.memory["request tables"] == 2 * 4 * 4 * -(-longest // 16) * 16
    assert loaded.memory["KV pool"] == loaded.pool_tokens * 2 * 32 * 4
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_log_says_how_long_requests_may_be_and_which_setting_asks_for_more(tmp_path, caplog) -> None:
    with caplog.at_level("INFO", "lightllm.load"):
        short = info(tmp_path, LLAMA | {"max_position_embeddings": 512}, max_req_total_len=3072, max_req_input_len=100)
    assert (short.lengths.max_input, short.lengths.max_total) == (100, 512)
    assert "max_req_total_len is 3072; 512 is used, by the model's limit" in caplog.messages
    assert f"a KV pool of 16384 tokens; a request has {short.lengths}" in caplog.messages


@pytest.mark.parametrize(("dtype", "is_fast"), [("auto", True), ("bfloat16", True), ("float32", False)])
def test_a_cpu_computes_exactly_only_if_float32_is_asked_for(tmp_path, monkeypatch, dtype, is_fast) -> None:
    asked = []
    select = kernels.select
    monkeypatch.setattr(kernels, "select", lambda device, compiled: asked.append(compiled) or select(device))
    monkeypatch.setattr(ModelConfig, "with_grids", lambda shape: asked.append("grids") or shape)
    load_engine(replace(dummy_model(tmp_path), dtype=dtype))
    assert asked == (["grids", True] if is_fast else [False])
