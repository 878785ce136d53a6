# SPDX-License-Identifier: Apache-2.0
"""A model that is no LLaMA, on two ranks, through tritonserver: the tokens are those of transformers."""

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


def test_two_ranks_serve_it_and_the_killed_server_leaves_nothing(tmp_path: Path) -> None:
    directory = save_random_model("bloom_6_heads", tmp_path / "model", VOCAB)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, directory)
    expected = transformers_greedy(directory, PROMPTS, MAX_TOKENS)
    server = TritonServer(tmp_path / "log", model_dir=directory, tp=2)
    try:
        server.wait_ready()
        processes = server.processes()
        workers = [one.cmdline() for one in processes if "lightllm_backend.worker.main" in one.cmdline()]
        assert len(workers) == 2
        [run_directory] = {Path(address).parent for *_, address, _ in workers}
        with LightLLMClient(server.grpc_url, timeout=120) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: client.generate(prompt, max_tokens=MAX_TOKENS), PROMPTS))
    except BaseException:
        print(server.log())
        raise
    finally:
        server.process.kill()
        server.process.wait()
    assert [list(answer.token_ids) for answer in answers] == expected
    assert poll(lambda: not any(psutil.pid_exists(process.pid) for process in processes)), "the guard is the last"
    assert not run_directory.exists()
