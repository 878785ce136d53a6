# SPDX-License-Identifier: Apache-2.0
"""docs/clients.md: its scripts and commands, run by the packages that it names, against a real server and front.

A script runs in one process with what the page says behind it: most packages take seconds to import.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import np_to_triton_dtype

from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_client import LightLLMClient
from lightllm_client.chat import ChatTemplate
from tests.clients.page import blocks, programs_of, run
from tests.e2e.calls import NO_PROXY, generate
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

SCRIPTS = Path(__file__).parents[1] / "clients"
PROMPT = "The capital of Japan is"
QUESTION = "What is the capital of Japan?"


@pytest.fixture(scope="module")
def programs() -> Path:
    return programs_of("clients")


@pytest.fixture(scope="module")
def addresses(http: httpx.Client, server: TritonServer) -> dict[str, str]:
    """The addresses of the page and those of this test's servers."""
    return {
        "http://127.0.0.1:9000": str(http.base_url).rstrip("/"),
        "http://127.0.0.1:8000": f"http://{server.http_url}",
    }


def chat(client: LightLLMClient, max_tokens: int) -> str:
    template = ChatTemplate.load(embedded_model_directory())
    return client.generate(template.render([{"role": "user", "content": QUESTION}]), max_tokens=max_tokens).text


def test_curl(addresses: dict[str, str], client: LightLLMClient) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    [command] = blocks("curl", "console", addresses)
    answer = json.loads(run(["bash", "-c", command.removeprefix("$ ")]))
    assert answer["choices"][0]["text"] == client.generate(PROMPT, max_tokens=16).text


@pytest.fixture(scope="module")
def printed_by_openai(programs: Path, http: httpx.Client, addresses: dict[str, str]) -> list[str]:
    """The lines of the page's two scripts, each with what is run behind it."""
    [model] = [one["id"] for one in http.get("/v1/models").json()["data"]]
    behind = [SCRIPTS / name for name in ("openai_client.py", "openai_structured.py")]
    scripts = zip(blocks("openai", "python", addresses), behind, strict=True)
    script = "".join(block + file.read_text(encoding="utf-8") for block, file in scripts)
    return run([programs / "python", "-c", script, f"{http.base_url}/v1", model]).removesuffix("\n").split("\n")


def test_openai(printed_by_openai: list[str], client: LightLLMClient) -> None:
    first, rest = chat(client, 16).split("\n"), printed_by_openai
    assert rest[: len(first)] == first
    found = json.loads(rest[len(first)])
    text = chat(client, 8)
    assert found["models"] == [embedded_model_directory().name]
    assert (found["stream"], found["stream_usage"]) == (text, 8)
    until_stop = text.partition(text[-3:])[0]
    assert found["events"] == [until_stop, until_stop, "stop"]
    assert set(found["top_logprobs"]) == {2}
    assert found["async"] == [text, text]
    prompts = (PROMPT, "Water is")
    assert found["completions"] == [prompt + client.generate(prompt, max_tokens=4).text for prompt in prompts]
    assert found["errors"] == [
        ["NotFoundError", "model_not_found", "model"],
        ["BadRequestError", None, "temperature"],
        ["BadRequestError", "context_length_exceeded", "messages"],
        ["BadRequestError", None, "best_of"],
    ]


def test_structured_output_of_openai(printed_by_openai: list[str]) -> None:
    *_, city, last = printed_by_openai
    assert re.fullmatch("name='(Kyoto|Tokyo)' is_capital=(True|False)", city)
    found = json.loads(last)
    cities = [found["parsed"], found["call"].pop(), found["streamed"][1], json.loads(found["streamed"][0])]
    for city in cities:
        assert city["name"] in ("Kyoto", "Tokyo")
        assert isinstance(city["is_capital"], bool)
    assert found["call"] == ["tool_calls", "remember"]
    assert found["after_the_result"] in ("stop", "length")


def test_langchain(programs: Path, addresses: dict[str, str], client: LightLLMClient) -> None:
    [script] = blocks("langchain-openai", "python", addresses)
    texts = 2 * (chat(client, 16) + "\n")
    found = run([programs / "python", "-c", script + (SCRIPTS / "langchain_structured.py").read_text()])
    assert found.startswith(texts)
    cities = json.loads(found[len(texts) :])
    assert [city["name"] in ("Kyoto", "Tokyo") for city in cities] == [True, True]


def test_litellm(programs: Path, addresses: dict[str, str], client: LightLLMClient) -> None:
    scripts = blocks("litellm", "python", addresses)
    assert len(scripts) == 2
    completion = client.generate(PROMPT, max_tokens=16).text
    expected = [chat(client, 16), completion, completion]
    assert run([programs / "python", "-c", "".join(scripts)]) == "".join(text + "\n" for text in expected)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("backend", ["vllm", "tensorrtllm"])
def test_what_triton_servers_openai_frontend_sends(
    server: TritonServer, client: LightLLMClient, backend: str, stream: bool
) -> None:
    """The tensors of openai_frontend/engine/utils/triton.py, and what it needs to find in the responses.

    With `--backend vllm` it calls `lightllm`, without it `ensemble`, whose tensors have a further dimension.
    """
    asked: dict[str, Any] = {"text_input": np.array([PROMPT], object), "stream": np.array([stream])}
    asked |= {f"return_num_{kind}_tokens": np.array([True]) for kind in ("input", "output")}
    asked["exclude_input_in_output"] = np.array([True])
    if backend == "vllm":
        options = {"max_tokens": 4, "temperature": 0, "top_p": 1.0, "n": 1, "seed": 1, "stop": ["x y z"]}
        options |= {"frequency_penalty": 0.0, "presence_penalty": 0.0}
        asked |= {"return_logprobs": np.array([False]), "sampling_parameters": np.array([json.dumps(options)], object)}
    else:
        asked |= {"max_tokens": np.array([4], np.int32), "seed": np.array([1], np.uint64)}
        asked["stop_words"] = np.array(["x y z"], object)
        numbers = {"temperature": 0, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}
        asked |= {name: np.array([value], np.float32) for name, value in numbers.items()}
        asked = {name: array[np.newaxis] for name, array in asked.items()}
    inputs = []
    for name, array in asked.items():
        inputs.append(tritonclient.grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    responses: list[Any] = []
    with tritonclient.grpc.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as triton:
        triton.start_stream(callback=lambda result, error: responses.append(error or result))
        model = "lightllm" if backend == "vllm" else "ensemble"
        triton.async_stream_infer(model, inputs, enable_empty_final_response=True)
        triton.stop_stream()
    finals = [one.get_response().parameters["triton_final_response"].bool_param for one in responses]
    assert finals == [False] * (len(responses) - 1) + [True]
    full = [one for one in responses if one.as_numpy("text_output") is not None]
    assert len(responses) - len(full) <= 1
    assert 1 < len(full) <= 4 if stream else len(full) == 1  # tokens come together if the client is slow
    texts = [one.as_numpy("text_output") for one in full]
    assert all(text.size == 1 for text in texts)
    assert "".join(text.item().decode() for text in texts) == client.generate(PROMPT, max_tokens=4).text
    counts = [[one.as_numpy(f"num_{kind}_tokens") for one in full] for kind in ("input", "output")]
    assert {(count.dtype, count.size) for count in counts[0] + counts[1]} == {(np.dtype(np.int32), 1)}
    assert sum(count.item() for count in counts[1]) == 4


def test_a_tool_that_triton_servers_openai_frontend_has_to_call(server: TritonServer) -> None:
    """It sends the schema of the tool's parameters in vLLM's StructuredOutputsParams, as JSON in JSON in JSON."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Kyoto", "Tokyo"]}}, "required": ["city"]}
    unset = dict.fromkeys(("regex", "choice", "grammar", "json_object", "whitespace_pattern", "structural_tag"))
    off = dict.fromkeys(("disable_fallback", "disable_any_whitespace", "disable_additional_properties"), False)
    form = {"json": json.dumps(schema | {"additionalProperties": False}), **unset, **off}
    options = {"max_tokens": 100, "temperature": 0, "structured_outputs": json.dumps(form)}
    status, answer = generate(server, {"text_input": PROMPT, "sampling_parameters": json.dumps(options)})
    assert status == 200, answer
    assert json.loads(answer["text_output"])["city"] in ("Kyoto", "Tokyo")
