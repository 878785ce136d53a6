# SPDX-License-Identifier: Apache-2.0
"""An engine that is ready has compiled and loaded all that requests can ask for."""

import random
import statistics
import time
from pathlib import Path

import pytest
import torch

from lightllm_backend.request import SamplingParams
from tests.runner.engine_harness import load, run, save_random_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

VOCAB = 8003
KINDS = [
    {}, {"do_sample": True}, {"do_sample": True, "top_k": 20, "top_p": 0.8}, {"frequency_penalty": 0.3},
    {"min_tokens": 3}, {"return_log_probs": True}, {"do_sample": True, "top_p": 0.9, "return_log_probs": True},
]  # fmt: skip


def save(directory: Path, kv_heads: int) -> Path:
    return save_random_llama(
        directory, vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=64, max_position_embeddings=2048,
        initializer_range=0.08,
    )  # fmt: skip


def prompt(source: random.Random, length: int) -> list[int]:
    return [source.randrange(3, VOCAB) for _ in range(length)]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_nothing_is_compiled_while_serving(tmp_path, monkeypatch, kv_heads, kv_dtype) -> None:
    import triton

    compiled: list[str] = []
    engine = load(save(tmp_path, kv_heads), dtype="bfloat16", kv_dtype=kv_dtype, max_total_token_num=40000)
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what["repr"]) or False
    )
    source = random.Random(kv_heads)
    prompts = [prompt(source, min(1500, int(source.expovariate(1 / 200)) + 1)) for _ in range(150)]
    sampling = [SamplingParams(max_tokens=source.randint(1, 30), **source.choice(KINDS)) for _ in prompts]
    for batch_max_tokens in (None, 1000):
        run(engine, prompts, sampling, [source.randrange(80) for _ in prompts], batch_max_tokens)
        run(engine, prompts[:50], SamplingParams(max_tokens=20), [source.randrange(40) for _ in prompts[:50]])
    assert compiled == []
    assert _compiles_something_new(compiled), "the hook is not called"


def _compiles_something_new(compiled: list[str]) -> bool:
    from lightllm_backend.kernels import launchers
    from lightllm_backend.kernels.activation import silu_and_mul

    silu_and_mul.silu_and_mul_kernel.device_caches.clear()
    launchers.silu_and_mul(torch.zeros(3, 2 * 77, device="cuda", dtype=torch.float16))
    return len(compiled) == 1


def test_the_first_request_is_as_fast_as_the_hundredth(tmp_path) -> None:
    engine = load(save(tmp_path, 2), dtype="bfloat16", max_total_token_num=40000)
    source = random.Random(1)
    for length in (7, 100, 1900):
        for kind in KINDS:
            seconds = []
            for _ in range(30):
                tokens = prompt(source, length)
                started = time.perf_counter()
                run(engine, [tokens], SamplingParams(max_tokens=4, ignore_eos=True, **kind))
                seconds.append(time.perf_counter() - started)
            # To load a kernel takes several milliseconds, to compile one hundreds.
            assert seconds[0] < 2 * statistics.median(seconds) + 0.005, (length, kind)
