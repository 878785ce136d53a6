# SPDX-License-Identifier: Apache-2.0
"""Each family of models, and several ranks, through tritonserver: the tokens are those of transformers."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lightllm_client import LightLLMClient
from tests.e2e.server import TritonServer
from tests.models.random_models import save_random_model
from tests.polling import poll
from tests.runner.engine_harness import transformers_greedy

pytestmark = pytest.mark.e2e

TOKENIZER = Path(__file__).parents[1] / "data" / "llama"
VOCAB = 512  # of that tokenizer
PROMPTS = [random.Random(seed).choices(range(3, VOCAB), k=1 + 6 * seed) for seed in range(6)]
MAX_TOKENS = 10


@pytest.mark.parametrize(
    ("family", "tp"),
    [("bloom_6_heads", 2), ("qwen2", 1)],
)
def test_a_family_is_served(family: str, tp: int, tmp_path: Path) -> None:
    directory = save_random_model(family, tmp_path / "model", VOCAB)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, directory)
    expected = transformers_greedy(directory, PROMPTS, MAX_TOKENS)
    server = TritonServer(tmp_path / "log", model_dir=directory, tp=tp)
    try:
        server.wait_ready()
        processes = server.processes()
        assert sum("lightllm_backend.worker.main" in process.cmdline() for process in processes) == tp
        with LightLLMClient(server.grpc_url, timeout=120) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: client.generate(prompt, max_tokens=MAX_TOKENS), PROMPTS))
    except BaseException:
        print(server.log())
        raise
    finally:
        server.stop()
    assert [list(answer.token_ids) for answer in answers] == expected
    assert poll(lambda: not any(psutil.pid_exists(process.pid) for process in processes)), "the guard is the last"
