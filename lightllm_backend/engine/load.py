# SPDX-License-Identifier: Apache-2.0
"""From settings to a ModelRunner that is ready: device, dtype, model, weights, warm-up, KV pool."""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import dataclass

import torch

from lightllm_backend import kernels
from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.embedded_model import embedded_model_directory
from lightllm_backend.engine.channel import EngineInfo
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.registry import model_class
from lightllm_backend.models.weights import dummy_weights, load_weights
from lightllm_backend.parallel import TensorParallel
from lightllm_backend.runner.buckets import graph_tokens, step_buckets
from lightllm_backend.runner.model_runner import ModelRunner
from lightllm_backend.runner.warm_up import compile_kernels, tokens_that_fit, warm_up, workspace_bytes, worst_batches

CPU_POOL_TOKENS = 16384
CPU_BATCH_MAX_TOKENS = 512
GPU_BATCH_MAX_TOKENS = 8192

log = logging.getLogger("lightllm.load")


@dataclass(frozen=True)
class LoadedEngine:
    runner: ModelRunner
    info: EngineInfo
    batch_max_tokens: int
    prefixes_are_alike: bool  # K and V of a beginning do not depend on what follows it


def load_engine(config: EngineConfig, rank: int = 0, store: str = "") -> LoadedEngine:
    """This rank's part of the engine; the ranks meet through the file `store`.

    Raises ConfigError or ModelError for what cannot be served, with the reason.
    """
    device = choose_device(config, rank)
    directory = config.model_dir or str(embedded_model_directory())
    shape = ModelConfig.from_directory(directory)
    for warning in shape.warnings:
        log.warning(warning)
    parallel = TensorParallel.connect(rank, config.tp, device, store)
    dtype = choose_dtype(config, shape, device, parallel)
    parallel = parallel.with_symmetric_memory(config.running_max_req_size, shape.hidden_size, dtype, device)
    max_total = _clamp("max_req_total_len", config.max_req_total_len, shape.max_sequence_length)
    max_input = _clamp("max_req_input_len", config.max_req_input_len, max_total - 1)
    eos_ids = shape.eos_ids if config.eos_id is None else config.eos_id
    default_batch = GPU_BATCH_MAX_TOKENS if device.type == "cuda" else CPU_BATCH_MAX_TOKENS
    batch_max_tokens = config.batch_max_tokens or default_batch
    kv_dtype = torch.int8 if config.kv_dtype == "int8" else dtype
    chosen_kernels = kernels.select(device)

    started = time.monotonic()
    model = model_class(shape.architecture)(shape, chosen_kernels, parallel, dtype, device, max_total)
    if config.load_format == "dummy":
        dummy_weights(model, seed=0)
    else:
        load_weights(model, directory, progress=rank == 0)
    log.info("weights of %s loaded as %s on %s in %.1f s", directory, dtype, device, time.monotonic() - started)

    def runner_with(num_slots: int) -> tuple[ModelRunner, KVStorage]:
        storage = KVStorage(shape.num_layers, num_slots, model.num_kv_heads, model.head_dim, kv_dtype, device)
        num_rows = config.running_max_req_size
        return ModelRunner(model, storage, chosen_kernels, num_rows, max_total, eos_ids, device), storage

    pool_tokens = config.max_total_token_num or CPU_POOL_TOKENS
    if device.type == "cuda":
        slot_bytes = KVStorage.slot_bytes(shape.num_layers, model.num_kv_heads, model.head_dim, kv_dtype)
        batches = worst_batches(config.running_max_req_size, max_input, batch_max_tokens)
        num_weights = sum(math.prod(slot.full_shape) for slot in model.weight_map().values())
        most_tokens = graph_tokens(shape.num_layers, num_weights // config.tp)
        buckets = step_buckets(config.running_max_req_size, batch_max_tokens, most_tokens)
        started = time.monotonic()
        compile_kernels(runner_with(1)[0], max_input, batch_max_tokens, buckets)
        log.info("kernels compiled in %.1f s", time.monotonic() - started)
        peak = workspace_bytes(runner_with(1)[0], batches, buckets, device)
        fitting = tokens_that_fit(slot_bytes, config.mem_fraction, peak, device, log.info)
        pool_tokens = _pool_tokens(config, parallel.minimum(fitting, device))
    runner, storage = runner_with(pool_tokens)
    if device.type == "cuda":
        started = time.monotonic()
        runner.capture_graphs(buckets)
        warm_up(runner, config.running_max_req_size, max_input, batch_max_tokens)
        log.info("%d CUDA graphs and warm in %.1f s", len(buckets), time.monotonic() - started)
    info = EngineInfo(
        model=directory, dtype=_name(dtype), device=device.type, vocab_size=shape.vocab_size, eos_ids=eos_ids,
        max_req_input_len=max_input, max_req_total_len=max_total, pool_tokens=pool_tokens, pool_bytes=storage.num_bytes,
    )  # fmt: skip
    prefixes_are_alike = shape.rope_scaling.rope_type != "dynamic"
    return LoadedEngine(runner, info, batch_max_tokens, prefixes_are_alike)


def choose_device(config: EngineConfig, rank: int) -> torch.device:
    """The rank's GPU, which becomes the current one, or the CPU, of which each rank uses its share of the cores."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but PyTorch finds no GPU; allowed here: auto | cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.tp))
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if config.tp > num_devices:
        raise ConfigError(f"tp is {config.tp}; allowed: at most {num_devices}, the number of GPUs that PyTorch finds")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def choose_dtype(
    config: EngineConfig, shape: ModelConfig, device: torch.device, parallel: TensorParallel
) -> torch.dtype:
    """The setting; else the model's own on a GPU (float16 where there is no bfloat16), and on a CPU the fastest."""
    if config.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    if device.type == "cpu":
        return _fastest_cpu_dtype(shape.hidden_size, shape.intermediate_size, parallel)
    own: torch.dtype = getattr(torch, shape.torch_dtype or "float16")
    if own == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        log.warning("this GPU has no bfloat16; float16 is used")
        return torch.float16
    return own


@torch.inference_mode()
def _fastest_cpu_dtype(rows: int, columns: int, parallel: TensorParallel) -> torch.dtype:
    """Which of float32 and bfloat16 multiplies matrices of the model's size sooner on rank 0."""
    dtypes = (torch.float32, torch.bfloat16)
    seconds = []
    for dtype in dtypes:
        weight = torch.randn(columns, rows).to(dtype)
        inputs = [torch.randn(tokens, rows).to(dtype) for tokens in (1, 16, 64)]
        for repeat in range(6):
            if repeat == 1:  # the first round warms up
                started = time.perf_counter()
            for tokens in inputs:
                torch.nn.functional.linear(tokens, weight)
        seconds.append(time.perf_counter() - started)
    return dtypes[int(parallel.broadcast(torch.tensor(seconds)).argmin())]


def _pool_tokens(config: EngineConfig, fitting: int) -> int:
    asked = config.max_total_token_num
    if asked is not None and asked > fitting:
        raise ConfigError(
            f"max_total_token_num is {asked}; allowed: at most {max(fitting, 0)}, which fit in mem_fraction"
        )
    if fitting < 1:
        raise ConfigError(
            f"mem_fraction is {config.mem_fraction}; allowed: enough for weights, workspace and a KV pool"
        )
    return asked or fitting


def _clamp(name: str, value: int, limit: int) -> int:
    if value > limit:
        log.warning("%s is %d; the model allows %d, which is used", name, value, limit)
    return min(value, limit)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
