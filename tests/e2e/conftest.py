# SPDX-License-Identifier: Apache-2.0
"""The servers, which are started once for all tests, and what their answers are compared with."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from lightllm_backend.launch.closed_apis import closing_options
from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_client import LightLLMClient
from tests.e2e.server import TritonServer

DATA = Path(__file__).parents[1] / "data"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, TritonServer):
                report.sections.append((f"log of {name}", "\n".join(value.log().splitlines()[-15:])))
    return report


def _running(server: TritonServer) -> Iterator[TritonServer]:
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Its administration APIs are closed, as the launch command closes them."""
    yield from _running(TritonServer(tmp_path_factory.mktemp("server") / "log", closing_options(())))


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Runs 4 requests at once and lets 8 more wait; its models are loaded by hand."""
    arguments = ["--model-control-mode=explicit", "--load-model=lightllm", "--load-model=lightllm_unary"]
    log = tmp_path_factory.mktemp("small_server") / "log"
    yield from _running(TritonServer(log, arguments, running_max_req_size=4, max_queue_size=8))


@pytest.fixture(scope="session")
def client(server: TritonServer) -> Iterator[LightLLMClient]:
    with LightLLMClient(server.grpc_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def small_client(small_server: TritonServer) -> Iterator[LightLLMClient]:
    with LightLLMClient(small_server.grpc_url, timeout=120) as client:
        yield client


class Reference:
    """The embedded model in transformers, in float32, and its tokenizer."""

    def __init__(self) -> None:
        directory = embedded_model_directory()
        self.tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.eos_id = 2

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    @torch.no_grad()
    def logits(self, prompt_ids: list[int], output_ids: list[int]) -> torch.Tensor:
        """[len(output_ids), vocabulary]: from what each of the output's tokens was chosen."""
        ids = torch.tensor([[*prompt_ids, *output_ids]])
        logits: torch.Tensor = self.model(ids).logits[0]
        return logits[len(prompt_ids) - 1 : -1]

    def greedy_matches(self, prompt_ids: list[int], output_ids: list[int]) -> bool:
        """Whether greedy decoding of the prompt gives this output: each token is the likeliest after those before."""
        return self.logits(prompt_ids, output_ids).argmax(-1).tolist() == output_ids


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with a vocabulary of 512, which loads in no time."""
    directory = tmp_path_factory.mktemp("tiny_model")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((DATA / "byte_level" / "tokenizer.json").read_bytes())
    return directory
