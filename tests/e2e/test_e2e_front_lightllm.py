# SPDX-License-Identifier: Apache-2.0
"""What LightLLM's README, its documentation and its benchmark scripts call, on a real server."""

from __future__ import annotations

import json
import shutil
import subprocess

import httpx
import pytest

from lightllm_client import LightLLMClient
from tests.e2e.front import encode

pytestmark = pytest.mark.e2e

PROMPT = "What is AI?"


def test_the_readmes_curl_command(http: httpx.Client) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = '{"inputs":"What is AI?","parameters":{"max_new_tokens":17, "frequency_penalty":1}}'
    command = [curl, "-s", f"{http.base_url}/generate", "-X", "POST", "-d", body]
    plain = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    headed = subprocess.run([*command, "-H", "Content-Type: application/json"], capture_output=True, check=True).stdout
    assert plain == json.loads(headed)
    assert plain.keys() == {"generated_text", "count_output_tokens", "finish_reason", "prompt_tokens"}
    assert plain["count_output_tokens"] == 17
    assert plain["prompt_tokens"] == len(encode(PROMPT))


def test_the_readmes_script(http: httpx.Client, client: LightLLMClient) -> None:
    data = {"inputs": PROMPT, "parameters": {"do_sample": False, "ignore_eos": False, "max_new_tokens": 8}}
    response = http.post("/generate", headers={"Content-Type": "application/json"}, content=json.dumps(data))
    assert response.status_code == 200
    assert response.json()["generated_text"] == [client.generate(PROMPT, max_tokens=8).text]


def test_the_calls_of_its_benchmarks(http: httpx.Client, client: LightLLMClient) -> None:
    """benchmark_client.py counts the lines, benchmark_qps.py sends add_special_tokens too."""
    parameters = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 8, "add_special_tokens": False}
    with http.stream("POST", "/generate_stream", json={"inputs": PROMPT, "parameters": parameters}) as response:
        lines = [line for line in response.iter_lines() if line]
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    assert [event["token"]["count_output_tokens"] for event in events] == list(range(1, 9))
    assert "".join(event["token"]["text"] for event in events) == client.generate(PROMPT, max_tokens=8).text
    assert [event["finished"] for event in events] == [False] * 7 + [True]
    assert events[-1]["finish_reason"] == "length"
    assert all(event["token"]["logprob"] < 0 for event in events)


def test_details_several_answers_and_the_end(http: httpx.Client, client: LightLLMClient) -> None:
    ids = encode(PROMPT)
    asked = {"max_new_tokens": 4, "return_details": True, "n": 2, "best_of": 2, "do_sample": True, "temperature": 0}
    body = http.post("/generate", json={"inputs": ids, "parameters": asked}).json()
    text = client.generate(ids, max_tokens=4).text
    assert body["generated_text"] == [text, text]
    assert ["".join(token["text"] for token in one) for one in body["tokens"]] == [text, text]
    stopped = {"max_new_tokens": 40, "stop_sequences": [text[-3:]]}
    assert http.post("/generate", json={"inputs": PROMPT, "parameters": stopped}).json()["finish_reason"] == "stop"


def test_refusals_and_the_rest(http: httpx.Client) -> None:
    refused = http.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 10**6}})
    assert refused.status_code == 417
    assert "max_new_tokens is 1000000; allowed" in refused.json()["message"]
    assert http.post("/tokens", json={"text": PROMPT}).json() == {"ntokens": len(encode(PROMPT))}
    load = http.get("/token_load").json()
    assert load.keys() == {"current_load", "logical_max_load", "dynamic_max_load"}
    assert 0 <= load["current_load"] <= 1
