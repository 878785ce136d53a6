# SPDX-License-Identifier: Apache-2.0
"""Which variants of the kernels serving would compile after the start, one line for each engine:
`python -m tests.runner.kernel_variants 2:bfloat16:330 8:int8:3072`, its KV heads, type of K and V, and tokens of the
longest sequence.

An engine on the CPU launches the Triton-lang kernels, but instead of being compiled and run, each launch is noted with
all that it would be compiled for. Prints the variants that were there when the engine was ready, and which more a
random workload asks for. The tokens mean nothing. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from lightllm_backend import kernels
from lightllm_backend.kernels import launchers
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.causal_lm import model_class
from lightllm_backend.models.model_config import ModelConfig
from lightllm_backend.models.weights import dummy_weights
from lightllm_backend.parallel import TensorParallel
from lightllm_backend.request import Request, SamplingParams
from lightllm_backend.router.batch import Batch
from lightllm_backend.router.router import Router
from lightllm_backend.runner.buckets import BucketChoice, step_buckets
from lightllm_backend.runner.model_runner import ModelRunner
from lightllm_backend.runner.step import ForwardOutput, Step
from lightllm_backend.runner.step_arrays import EMPTY_BATCH
from lightllm_backend.runner.warm_up import warm_up

CPU = torch.device("cpu")
NUM_ROWS, MAX_INPUT, BATCH_MAX_TOKENS = 70, 300, 450
MAX_GRAPH_TOKENS = 256
VOCAB = 192

VARIANTS: set[tuple[str, ...]] = set()


def note_launch(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    specialized = [_specialization(parameter, values.pop(parameter.name)) for parameter in kernel.params]
    VARIANTS.add((kernel.fn.__name__, *specialized, str(values)))
    if kernel.fn.__name__ in ("sample_kernel", "choose_greedily_kernel"):
        arguments[kernel.arg_names.index("tokens")].zero_()


def _specialization(parameter: Any, value: Any) -> str:
    """What of an argument the compiled code depends on."""
    name = parameter.name
    if parameter.is_constexpr:
        return f"{name}={value}"
    if isinstance(value, torch.Tensor):
        fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        return f"{name}:{value.dtype}" + ("" if fixed else f",aligned={value.data_ptr() % 16 == 0}")
    if isinstance(value, float):
        return f"{name}:float"
    if value is None:
        return f"{name}=None"
    kind = f"{name}:{'int32' if value < 2**31 else 'int64'}"
    return kind if parameter.do_not_specialize else f"{kind},one={value == 1},by16={value % 16 == 0}"


class Graphs:
    """What CudaGraphs is to a runner, and launches the same."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._choose = BucketChoice(step_buckets(NUM_ROWS, BATCH_MAX_TOKENS, MAX_GRAPH_TOKENS))
        for bucket in self._choose.buckets:
            step.launch(step.upload(EMPTY_BATCH, bucket), bucket)

    def run(self, batch: Batch) -> ForwardOutput | None:
        bucket = self._choose(batch)
        return self._step.launch(self._step.upload(batch, bucket), bucket) if bucket else None


def make_runner(kv_heads: int, kv_dtype: torch.dtype, max_total: int) -> ModelRunner:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 128,
        "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(config))
        shape = ModelConfig.from_directory(directory)
    place = (launchers, TensorParallel(), torch.bfloat16, CPU, max_total)
    model = model_class(shape.architecture)(shape, *place)
    dummy_weights(model, seed=0)
    storage = KVStorage(shape.num_layers, 20000, kv_heads, shape.head_dim, kv_dtype, CPU)
    return ModelRunner(model, storage, launchers, NUM_ROWS, max_total, shape.eos_ids, VOCAB, CPU)


def serve(runner: ModelRunner, num_requests: int) -> None:
    source = random.Random(0)
    router = Router(20000, NUM_ROWS, BATCH_MAX_TOKENS, num_requests, frozenset([2]))
    kinds = [
        {}, {}, {"do_sample": True}, {"do_sample": True, "top_k": 5, "top_p": 0.5}, {"min_tokens": 2},
        {"min_tokens": 2, "stop_token_ids": (4, 5, 6)}, {"presence_penalty": 0.5}, {"logit_bias": ((3, 1.0),)},
        {"return_log_probs": True}, {"allowed_token_ids": (3, 4)}, {"allowed_token_ids": (3, 4), "do_sample": True},
    ]  # fmt: skip
    submitted = 0
    while submitted < num_requests or router.has_work:
        for _ in range(min(source.choice([0, 0, 0, 1, 2, 40]), num_requests - submitted)):
            prompt = (3,) * min(MAX_INPUT, int(source.expovariate(1 / 60)) + 1)
            only_greedy = submitted < num_requests // 2
            sampling = SamplingParams(max_tokens=source.randint(1, 30), **({} if only_greedy else source.choice(kinds)))
            router.submit(Request(str(submitted), prompt, sampling))
            submitted += 1
        batch = router.next_batch()
        if batch is not None:
            router.apply(batch, runner.launch(batch).result())


def main() -> None:
    for found in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(found.name)
        # As many multiprocessors as an H100's, so that contexts are split.
        if hasattr(module, "multiprocessor_count"):
            module.multiprocessor_count = lambda _: 132
    JITFunction.run = note_launch
    for engine in sys.argv[1:]:
        kv_heads, kv_dtype, max_total = engine.split(":")
        tell_variants(int(kv_heads), getattr(torch, kv_dtype), int(max_total))


def tell_variants(kv_heads: int, kv_dtype: torch.dtype, max_total: int) -> None:
    VARIANTS.clear()
    runner = make_runner(kv_heads, kv_dtype, max_total)
    with torch.inference_mode():
        runner.graphs = Graphs(runner._step)  # type: ignore[assignment]
    warm_up(runner, NUM_ROWS, MAX_INPUT, BATCH_MAX_TOKENS)
    ready = set(VARIANTS)
    serve(runner, num_requests=150)
    told = {"ready": ready, "late": VARIANTS - ready}
    print(json.dumps({name: [" ".join(variant) for variant in sorted(variants)] for name, variants in told.items()}))


if __name__ == "__main__":
    main()
