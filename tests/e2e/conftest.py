# SPDX-License-Identifier: Apache-2.0
"""The servers, which are started once for all tests, and what their answers are compared with."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

from lightllm_backend.config import EngineConfig
from lightllm_backend.launch.closed_apis import closing_options
from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_backend.launch.trace_options import trace_options
from lightllm_client import LightLLMClient
from perf.sleeping_engine import STEP_MS, write_python
from tests.e2e.collector import Collector
from tests.e2e.front import FrontProcess
from tests.e2e.server import TritonServer

DATA = Path(__file__).parents[1] / "data"
# Four of the embedded model's 30 layers, which are four times as quick and still never repeat themselves.
SHORT_MODEL_LAYERS = (0, 1, 11, 27)
SHORT_MODEL_SAYS = " comprom"  # after "The capital of Japan is"
SLEEPING_STEP_MS = 50  # a stream of thousands of tokens outlasts everything that a test waits for


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, TritonServer):
                report.sections.append((f"log of {name}", "\n".join(value.log().splitlines()[-15:])))
    return report


class EndOfSharedServers:
    """Stops the servers that tests share with the first test elsewhere: idle ones take processor time from the others.

    tests/conftest.py sorts the tests, so none of those here comes later.
    """

    def __init__(self) -> None:
        self.running: list[TritonServer | FrontProcess] = []

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.nodeid.startswith("tests/e2e/"):
            return
        for server in self.running:
            server.process.terminate()
        while self.running:
            self.running.pop().stop()


SHARED = EndOfSharedServers()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SHARED)


def _running(server: TritonServer) -> Iterator[TritonServer]:
    SHARED.running.append(server)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with SHORT_MODEL_LAYERS alone: wild words, but greedy decoding has no ties."""
    embedded, directory = embedded_model_directory(), tmp_path_factory.mktemp("short_model")
    for path in embedded.glob("*.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((embedded / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(SHORT_MODEL_LAYERS)}))
    kept = {}
    for name, weight in safetensors.torch.load_file(embedded / "model.safetensors").items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None:
            kept[name] = weight
        elif int(layer[1]) in SHORT_MODEL_LAYERS:
            kept[name.replace(layer[0], f"model.layers.{SHORT_MODEL_LAYERS.index(int(layer[1]))}.")] = weight
    safetensors.torch.save_file(kept, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Gets the spans of `server`."""
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="session")
def server(short_model: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Has the short model; its administration APIs are closed, as the launch command closes them.

    Each request is a line of JSON in its log, and those with a traceparent are traced.
    """
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = [*closing_options(()), *trace_options(EngineConfig(trace_url=collector.url))]
    settings = {"log_format": "json", "log_requests": "all", "trace_url": collector.url}
    yield from _running(TritonServer(log, arguments, model_dir=short_model, **settings))


@pytest.fixture(scope="session")
def full_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Has the whole embedded model, for tests of what it says."""
    yield from _running(TritonServer(tmp_path_factory.mktemp("full_server") / "log"))


@pytest.fixture(scope="session")
def sleeping_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The setting worker_python of servers whose engine only tells the time, which leaves the processor to others."""
    return write_python(tmp_path_factory.mktemp("sleeping_engine") / "python", **{STEP_MS: SLEEPING_STEP_MS})


@pytest.fixture(scope="session")
def small_server(sleeping_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Runs 4 requests at once and lets 8 more wait; its engine only tells the time, its models are loaded by hand."""
    arguments = ["--model-control-mode=explicit", "--load-model=lightllm", "--load-model=lightllm_unary"]
    log = tmp_path_factory.mktemp("small_server") / "log"
    settings = {
        "worker_python": sleeping_python, "running_max_req_size": 4, "max_queue_size": 8, "batch_max_tokens": 32,
        "max_req_total_len": 8192,
    }  # fmt: skip
    yield from _running(TritonServer(log, arguments, **settings))


@pytest.fixture(scope="session")
def client(server: TritonServer) -> Iterator[LightLLMClient]:
    with LightLLMClient(server.grpc_url, timeout=120, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a front beside `server`."""
    front = FrontProcess(server, tmp_path_factory.mktemp("front") / "log")
    SHARED.running.append(front)
    try:
        with httpx.Client(base_url=front.wait_ready().url, timeout=120, trust_env=False) as client:
            yield client
    finally:
        front.stop()


@pytest.fixture(scope="session")
def full_client(full_server: TritonServer) -> Iterator[LightLLMClient]:
    with LightLLMClient(full_server.grpc_url, timeout=120, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def small_client(small_server: TritonServer) -> Iterator[LightLLMClient]:
    with LightLLMClient(small_server.grpc_url, timeout=120, max_retries=0) as client:
        yield client


class Reference:
    """The embedded model in transformers, in float32, and its tokenizer."""

    def __init__(self) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(embedded_model_directory() / "tokenizer.json"))
        self.eos_id = 2

    @cached_property
    def model(self) -> transformers.LlamaForCausalLM:
        directory = embedded_model_directory()
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

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
