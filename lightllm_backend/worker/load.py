# SPDX-License-Identifier: Apache-2.0
"""load_engine: makes a ModelRunner from the settings: device, dtype, model, weights, warm-up, KV pool."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from lightllm_backend import kernels
from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.kv_pool.layer_groups import LayerGroups
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_backend.lengths import LengthLimits
from lightllm_backend.messages.engine_messages import EngineInfo
from lightllm_backend.models.causal_lm import CausalLM, model_class
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import dummy_weights, load_weights
from lightllm_backend.parallel import TensorParallel
from lightllm_backend.runner.buckets import graph_tokens, step_buckets
from lightllm_backend.runner.device_tables import DeviceTables
from lightllm_backend.runner.model_runner import ModelRunner
from lightllm_backend.runner.step_arrays import Bucket
from lightllm_backend.runner.warm_up import (
    bytes_left,
    compile_kernels,
    compile_on_a_cpu,
    tokens_that_fit,
    warm_up,
    workspace_bytes,
    worst_batches,
)

CPU_POOL_TOKENS = 16384
CPU_BATCH_MAX_TOKENS = 512
GPU_BATCH_MAX_TOKENS = 8192

# Width of the request tables with which the workspace is measured: longer ones get no more splits in decode attention.
_MEASURED_LENGTH = 4096

# Waits for the other ranks, with the model's directory and this rank's device, and returns what they meet through: a
# store of torch.distributed, or the name of a file for one.
Meet = Callable[[str, torch.device], Store | str]

log = logging.getLogger("lightllm.load")


@dataclass(frozen=True)
class LoadedEngine:
    """One rank's part of the engine, ready to run."""

    runner: ModelRunner
    info: EngineInfo
    batch_max_tokens: int
    prefixes_are_alike: bool  # K and V of a prefix do not depend on what follows it
    recompute_at: int | None  # tokens beyond which all K of a sequence turns otherwise (longrope)
    storage: KVStorage
    groups: LayerGroups

    @property
    def longest(self) -> int:
        """The tokens that the KV pool can hold of one sequence."""
        return self.groups.longest(self.info.pool_tokens * self.groups.count, self.batch_max_tokens)


def load_engine(config: EngineConfig, rank: int = 0, meet: Meet | None = None) -> LoadedEngine:
    """Load this rank's part of the engine; several ranks meet by `meet`.

    Raises ConfigError or ModelError, with the reason, for what cannot be served.
    """
    device = choose_device(config, rank)
    on_gpu = device.type == "cuda"
    directory = str(config.model_dir or embedded_model_directory())
    # float32 is what a CPU is asked for where its answers are compared with those of others.
    is_exact = config.dtype == "float32"
    shape = _read_shape(config, directory, has_grids=not on_gpu and not is_exact)
    store = meet(directory, device) if meet else ""
    parallel = TensorParallel.connect(rank, config.tp, device, store, one_host=config.nnodes == 1)
    dtype = choose_dtype(config, shape, device, parallel)
    parallel = parallel.with_symmetric_memory(config.running_max_req_size, shape.hidden_size, dtype, device)
    limits = LengthLimits.of(config, shape.max_sequence_length)
    eos_ids = _eos_ids(config, shape)
    batch_max_tokens = config.batch_max_tokens or (GPU_BATCH_MAX_TOKENS if on_gpu else CPU_BATCH_MAX_TOKENS)
    kv_dtype = torch.int8 if config.kv_dtype == "int8" else dtype
    chosen_kernels = kernels.select(device, compiled=not is_exact)

    started = time.monotonic()
    model = model_class(shape.architecture)(shape, chosen_kernels, parallel, dtype, device, limits.max_total)
    if model.exceeds_float16 and dtype == torch.float16:
        log.warning("activations of this model overflow in float16, which fails requests: --dtype bfloat16 or float32")
    if not on_gpu and shape.quantization.has_fp8:
        log.warning(
            "on a CPU, fp8 weights are dequantised for each product, which is slow; with float32, int8 and int4 are too"
        )
    if config.load_format == "dummy":
        dummy_weights(model, seed=0)
    else:
        load_weights(model, directory, progress=rank == 0)
    quantised = f", quantised ({shape.quantization.method})" if shape.quantization.rules else ""
    seconds = time.monotonic() - started
    log.info("weights of %s loaded as %s%s on %s in %.1f s", directory, dtype, quantised, device, seconds)

    # What is given back cannot be shared.
    windows = [0] * shape.num_layers if config.prefix_cache else model.windows
    groups = LayerGroups.of(windows, limits.max_total)
    parts = _Parts(config, shape, model, chosen_kernels, kv_dtype, eos_ids, batch_max_tokens, device, groups)
    memory = {"weights": sum(slot.nbytes for slot in model.weight_map().values())}
    pool_tokens = config.max_total_token_num or CPU_POOL_TOKENS
    if on_gpu:
        num_weights = sum(slot.num_weights for slot in model.weight_map().values())
        in_8_bits = shape.quantization.rounds_activations
        max_graph_tokens = graph_tokens(shape.num_layers, num_weights // config.tp, in_8_bits)
        buckets = step_buckets(config.running_max_req_size, batch_max_tokens, max_graph_tokens)
        peak, pool_tokens = _size_pool(parts, parallel, limits, buckets)
        memory["workspace"] = peak - memory["weights"]
    limits = LengthLimits.of(config, shape.max_sequence_length, pool_tokens, parts.longest(pool_tokens))
    for warning in limits.warnings(config):
        log.warning("%s", warning)
    runner, storage = parts.runner_with(pool_tokens, limits.max_total)
    memory |= {"request tables": runner.table_bytes, "KV pool": storage.num_bytes}
    started = time.monotonic()
    if on_gpu:
        runner.capture_graphs(buckets)
        warm_up(runner, config.running_max_req_size, limits.max_input, batch_max_tokens)
        log.info("%d CUDA graphs and warm in %.1f s", len(buckets), time.monotonic() - started)
    elif not is_exact:
        compile_on_a_cpu(runner)
        log.info("kernels compiled in %.1f s", time.monotonic() - started)
    log.info("a KV pool of %d tokens; a request has %s", pool_tokens, limits)
    if groups.num_windowed:
        log.info("layers with a window of %d keep no more than it: %s", groups.window, groups)
    log.info("memory: %s", ", ".join(f"{part} {size >> 20} MiB" for part, size in memory.items()))
    info = parts.info(directory, dtype, limits, pool_tokens, memory)
    changing = [rope for rope in set(shape.ropes) if rope.depends_on_length(limits.max_total)]
    prefixes_are_alike = all(rope.rope_type == "longrope" for rope in changing)
    recompute_at = changing[0].original_max_positions if changing and prefixes_are_alike else None
    return LoadedEngine(runner, info, batch_max_tokens, prefixes_are_alike, recompute_at, storage, groups)


@dataclass(frozen=True)
class _Parts:
    """The parts of every runner of a start: the one that serves and, on a GPU, those before it that only measure."""

    config: EngineConfig
    shape: ModelConfig
    model: CausalLM
    kernels: Kernels
    kv_dtype: torch.dtype
    eos_ids: tuple[int, ...]
    batch_max_tokens: int
    device: torch.device
    groups: LayerGroups

    @property
    def _kv_shape(self) -> tuple[int, int, torch.dtype]:
        return self.model.num_kv_heads, self.model.head_dim, self.kv_dtype

    @property
    def token_bytes(self) -> int:
        """The bytes of a token's slots in all layer groups."""
        return self.groups.count * KVStorage.slot_bytes(self.groups.layers_per_slot, *self._kv_shape)

    def longest(self, pool_tokens: int) -> int:
        """The tokens that a pool of this size can hold of one sequence."""
        return self.groups.longest(pool_tokens * self.groups.count, self.batch_max_tokens)

    def table_bytes(self, max_length: int) -> int:
        return DeviceTables.num_bytes(self.config.running_max_req_size, max_length, self.groups.count)

    def runner_with(self, pool_tokens: int, max_length: int) -> tuple[ModelRunner, KVStorage]:
        num_slots = pool_tokens * self.groups.count
        try:
            storage = KVStorage(self.groups.layers_per_slot, num_slots, *self._kv_shape, self.device)
        except RuntimeError:
            if self.device.type != "cpu":
                raise
            raise ConfigError(
                f"max_total_token_num is {pool_tokens}; allowed: at most what this machine has memory for"
            ) from None
        num_rows = self.config.running_max_req_size
        sizes = num_rows, max_length, self.eos_ids, self.shape.vocab_size
        runner = ModelRunner(self.model, storage, self.kernels, *sizes, self.device, self.groups, self.config.tp == 1)
        return runner, storage

    def info(
        self, directory: str, dtype: torch.dtype, limits: LengthLimits, pool_tokens: int, memory: dict[str, int]
    ) -> EngineInfo:
        return EngineInfo(
            model=os.fsencode(directory).decode(errors="replace"),
            dtype=_name(dtype),
            device=self.device.type,
            vocab_size=self.shape.vocab_size,
            eos_ids=self.eos_ids,
            lengths=limits,
            pool_tokens=pool_tokens,
            memory=memory,
            weight_dtype=_weight_dtype(self.config, self.shape, dtype),
            kv_dtype=_name(self.kv_dtype),
            tp=self.config.tp,
        )


def _read_shape(config: EngineConfig, directory: str, has_grids: bool) -> ModelConfig:
    """The model's configuration with the types of weights that the settings ask for; logs its warnings."""
    shape = ModelConfig.from_directory(directory)
    shape.check_ranks(config.tp)
    shape = shape.with_weight_dtype(config.weight_dtype, config.head_dtype, config.tp)
    if has_grids:
        shape = shape.with_grids()
    for warning in shape.warnings:
        log.warning(warning)
    return shape


def _eos_ids(config: EngineConfig, shape: ModelConfig) -> tuple[int, ...]:
    if config.eos_id is None:
        return shape.eos_ids
    if max(config.eos_id) >= shape.vocab_size:
        raise ConfigError(
            f"eos_id is {max(config.eos_id)}; allowed: ids of the model's vocabulary, < {shape.vocab_size}"
        )
    return config.eos_id


def _size_pool(parts: _Parts, parallel: TensorParallel, limits: LengthLimits, buckets: list[Bucket]) -> tuple[int, int]:
    """Compile the kernels and measure the workspace. Returns the bytes of weights and workspace, and the pool's tokens.

    `limits` does not depend on the pool yet. The pool shares the memory that is left with the request tables, which are
    as wide as the longest sequence that the pool holds.
    """
    config, num_rows = parts.config, parts.config.running_max_req_size
    max_length = min(limits.max_total, max(_MEASURED_LENGTH, parts.batch_max_tokens + 1))
    started = time.monotonic()
    compile_kernels(parts.runner_with(1, max_length)[0], limits.max_input, parts.batch_max_tokens, buckets)
    log.info("kernels compiled in %.1f s", time.monotonic() - started)
    batches = worst_batches(num_rows, limits.max_input, parts.batch_max_tokens)
    peak = workspace_bytes(parts.runner_with(1, max_length)[0], batches, buckets, parts.device)
    peak -= parts.table_bytes(max_length)
    room = bytes_left(config.mem_fraction, peak, parts.device, log.info)
    fitting = tokens_that_fit(room, parts.token_bytes, parts.table_bytes, limits.max_total, parts.longest)
    return peak, _pool_tokens(config, parallel.minimum(fitting, parts.device))


def choose_device(config: EngineConfig, rank: int) -> torch.device:
    """The rank's GPU, which becomes the current one, or the CPU, on which each rank gets its share of the cores."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but PyTorch finds no GPU; allowed here: auto | cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // len(config.host_ranks)))
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if len(config.host_ranks) > num_devices:
        on_hosts = f" on this host, times {config.nnodes} hosts" * (config.nnodes > 1)
        raise ConfigError(
            f"tp is {config.tp}; allowed: at most {num_devices * config.nnodes},"
            f" the number of GPUs that PyTorch finds{on_hosts}"
        )
    index = rank - config.host_ranks[0]
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_dtype(
    config: EngineConfig, shape: ModelConfig, device: torch.device, parallel: TensorParallel
) -> torch.dtype:
    """The setting; by default the model's own on a GPU (float16 if that has no bfloat16), on a CPU the fastest."""
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
    """Whichever of float32 and bfloat16 multiplies matrices of the model's size faster on rank 0.

    They take turns, and the least of several times counts: a busy machine may hold up any of them.
    """
    dtypes = (torch.float32, torch.bfloat16)
    weights = [torch.randn(columns, rows).to(dtype) for dtype in dtypes]
    inputs = [[torch.randn(tokens, rows).to(dtype) for tokens in (1, 16, 64)] for dtype in dtypes]
    seconds = torch.full((10, len(dtypes)), torch.inf)
    for times in seconds:
        for index, weight in enumerate(weights):
            started = time.perf_counter()
            for tokens in inputs[index]:
                torch.nn.functional.linear(tokens, weight)
            times[index] = time.perf_counter() - started
    return dtypes[int(parallel.broadcast(seconds.amin(0)).argmin())]


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


def _weight_dtype(config: EngineConfig, shape: ModelConfig, dtype: torch.dtype) -> str:
    return config.weight_dtype if config.weight_dtype != "auto" else shape.quantization.method or _name(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
