# SPDX-License-Identifier: Apache-2.0
"""OpenAI's API over a real server."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from lightllm_backend.launch.embedded_model import embedded_model_directory
from lightllm_client import LightLLMClient
from lightllm_client.chat import ChatTemplate
from tests.e2e.front import encode
from tests.e2e.server import TritonServer
from tests.polling import poll

pytestmark = pytest.mark.e2e

PROMPT = "The capital of Japan is"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_completions_are_the_engine_s(http: httpx.Client, client: LightLLMClient) -> None:
    expected = client.generate(PROMPT, max_tokens=8, return_log_probs=True)
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    answer = post(http, "/v1/completions", **body)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, "length")
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(list(expected.log_probs), abs=1e-4)
    parts = events(http, "/v1/completions", **body)
    assert "".join(part["choices"][0]["text"] for part in parts) == expected.text
    assert answer["usage"]["prompt_tokens"] == expected.num_input_tokens
    assert answer["usage"]["completion_tokens"] == 8
    cached = post(http, "/v1/completions", **body)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == expected.num_input_tokens - 1


def test_prompts_of_every_kind(http: httpx.Client, client: LightLLMClient) -> None:
    texts = [PROMPT, "Water is"]
    expected = [client.generate(text, max_tokens=4).text for text in texts]
    body = {"max_tokens": 4, "temperature": 0}
    several = post(http, "/v1/completions", prompt=texts, n=2, **body)["choices"]
    assert [choice["text"] for choice in several] == [text for text in expected for _ in range(2)]
    echoed = post(http, "/v1/completions", prompt=PROMPT, echo=True, **body)["choices"]
    assert echoed[0]["text"] == PROMPT + expected[0]
    ids = encode(PROMPT)
    by_ids = post(http, "/v1/completions", prompt=[ids, ids], echo=True, **body)["choices"]
    assert by_ids[0]["text"] == by_ids[1]["text"] == echoed[0]["text"]


def test_a_chat(http: httpx.Client, client: LightLLMClient) -> None:
    template = ChatTemplate.load(embedded_model_directory())
    expected = client.generate(template.render(QUESTION), max_tokens=8).text
    body = {"messages": QUESTION, "temperature": 0, "max_completion_tokens": 8}
    answer = post(http, "/v1/chat/completions", logprobs=True, top_logprobs=2, **body)
    [choice] = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "length")
    entries = choice["logprobs"]["content"]
    assert [entry["top_logprobs"][0]["token"] for entry in entries] == [entry["token"] for entry in entries]
    parts = events(http, "/v1/chat/completions", **body)
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == expected


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_how_likely_a_prompt_is(http: httpx.Client, client: LightLLMClient, max_tokens: int) -> None:
    """As lm-evaluation-harness asks it: a prompt that ends as greedy decoding would end it is likeliest throughout."""
    begin = client.generate(PROMPT, max_tokens=4)
    prompt = [*encode(PROMPT), *begin.token_ids]
    body = {"prompt": [prompt], "echo": True, "logprobs": 1, "temperature": 0, "seed": 1, "max_tokens": max_tokens}
    [choice] = post(http, "/v1/completions", **body)["choices"]
    assert choice["text"].startswith(PROMPT + begin.text)
    found = choice["logprobs"]
    assert [len(values) for values in found.values()] == [len(prompt) + max_tokens] * 4
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for log_prob, top in zip(found["token_logprobs"][5:], found["top_logprobs"][5:], strict=True):
        assert log_prob == max(top.values())


def test_errors_of_the_engine_have_their_status(http: httpx.Client) -> None:
    longest = http.get("/v1/models").json()["data"][0]["max_model_len"]
    for stream in (False, True):
        body = {"prompt": PROMPT, "max_tokens": 100_000, "stream": stream}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert f"; allowed: at most {longest} in all (" in error["message"]


def test_a_client_that_hangs_up_ends_its_request(http: httpx.Client, server: TritonServer) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
        assert poll(lambda: not server.is_idle()), "the metrics tell it a moment later"
    assert poll(server.is_idle)
