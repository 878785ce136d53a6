# SPDX-License-Identifier: Apache-2.0
"""The ensemble and the unary entry, served from a GPU: transformers' tokens, streaming, and an idle pool after."""

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lightllm_client import LightLLMClient
from tests.e2e.server import TritonServer
from tests.polling import poll
from tests.runner.engine_harness import save_random_llama, transformers_greedy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

TOKENIZER = Path(__file__).parents[1] / "data" / "llama"
VOCAB = 512  # of that tokenizer
PROMPTS = [random.Random(seed).choices(range(3, VOCAB), k=3 + 5 * seed) for seed in range(24)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_random_llama(
        tmp_path_factory.mktemp("llama"), vocab_size=VOCAB, hidden_size=512, intermediate_size=1376,
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        initializer_range=0.08,
    )  # fmt: skip
    for file in TOKENIZER.iterdir():
        shutil.copy(file, path)
    return path


def test_the_ensemble_serves_from_the_gpu(directory: Path, tmp_path: Path) -> None:
    expected = transformers_greedy(directory, PROMPTS, 20, "cuda")
    server = TritonServer(tmp_path / "log", model_dir=directory, device="cuda", dtype="float32", mem_fraction=0.3)
    try:
        server.wait_ready()
        with LightLLMClient(server.grpc_url) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: client.generate(prompt, max_tokens=20), PROMPTS))
            assert [list(answer.token_ids) for answer in answers] == expected
            chunks = list(client.stream(PROMPTS[0], max_tokens=20))
            assert "".join(chunk.text for chunk in chunks) == answers[0].text
            assert len(chunks) > 1
            with client.stream(PROMPTS[1], max_tokens=900, ignore_eos=True) as abandoned:
                next(abandoned)
            assert poll(server.is_idle, 1.0)
            with LightLLMClient(server.grpc_url, model="lightllm_unary") as unary:
                assert list(unary.generate(PROMPTS[2], max_tokens=20).token_ids) == expected[2]
    except BaseException:
        print(server.log())
        raise
    finally:
        server.stop()
