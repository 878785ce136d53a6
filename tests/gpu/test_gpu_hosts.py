# SPDX-License-Identifier: Apache-2.0
"""An engine on two hosts over NCCL: two GPUs of one machine that NCCL takes for two hosts, over the loopback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lightllm_backend.request import SamplingParams
from tests.free_ports import free_ports
from tests.runner.engine_harness import save_random_llama, transformers_greedy
from tests.worker.process_harness import TIMEOUT, configuration, further_host, kill_all, started

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

TOKENIZER = Path(__file__).parents[1] / "data" / "llama" / "tokenizer.json"
PROMPTS = [[5], [17, 3, 98, 42, 7], list(range(20, 61))]
GREEDY = SamplingParams(max_tokens=12)


def test_two_hosts_compute_over_nccl_and_meet_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, log = tmp_path / "model", tmp_path / "log"
    save_random_llama(model, num_attention_heads=4, hidden_size=64, vocab_size=517, max_position_embeddings=8192)
    shutil.copy(TOKENIZER, model)
    expected = transformers_greedy(model, PROMPTS, GREEDY.max_tokens)
    [port] = free_ports(1)
    group = {"nnodes": 2, "master_addr": "127.0.0.1", "master_port": port}
    config = configuration(model, 2, device="cuda", mem_fraction=0.3, max_total_token_num=8192, **group)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("NCCL_HOSTID", "host-0")
    other = {"CUDA_VISIBLE_DEVICES": "1", "NCCL_HOSTID": "host-1"}
    host = further_host(config, log, **other)
    try:
        with started(config) as engine:
            assert [answer.tokens for answer in engine.answer(PROMPTS, GREEDY)] == expected
            pending = engine.submit(PROMPTS[0], SamplingParams(max_tokens=8000, ignore_eos=True))
            assert pending.started.wait(TIMEOUT)
            kill_all(host)
            assert pending.ended.wait(TIMEOUT)
            assert pending.chunks[-1].finish_reason is not None
            host = further_host(config, log, **other)
            engine.client.wait_ready(TIMEOUT)
            assert [answer.tokens for answer in engine.answer(PROMPTS, GREEDY)] == expected
    finally:
        if host.poll() is None:
            kill_all(host)
