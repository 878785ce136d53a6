# SPDX-License-Identifier: Apache-2.0
"""Requests as the clients of other servers write them, and the page's table of what the generate endpoints take."""

from __future__ import annotations

import json
import queue
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from lightllm_client import Generation, InvalidArgument, LightLLMClient
from tests.e2e.calls import NO_PROXY, GenerateStream, generate, in_parallel, stream_grpc
from tests.e2e.conftest import Reference
from tests.e2e.server import TritonServer

pytestmark = pytest.mark.e2e

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
PROMPT = "The capital of Japan is"
ROWS = re.findall(r"^\| `(\{.*?\})` \| `?(\d+|INVALID_ARG|\{.*?\})`? \|", PAGE, flags=re.MULTILINE)
EOS = 2


def test_the_table_was_found() -> None:
    assert len(ROWS) > 50


@pytest.fixture(scope="module")
def answers(full_server: TritonServer) -> dict[str, Any]:
    """What each row of the table gets, all at once: the status and JSON of generate, the events of generate_stream."""

    def ask(keys: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        body = f'{{"text_input": "{PROMPT}", {keys[1:]}'.encode()
        return *generate(full_server, body), list(GenerateStream(full_server, body))

    calls = [lambda keys=keys: ask(keys) for keys, _ in ROWS]
    return {keys: answer for (keys, _), answer in zip(ROWS, in_parallel(calls), strict=True)}


@pytest.mark.parametrize(("keys", "expected"), ROWS, ids=[keys for keys, _ in ROWS])
def test_a_row_of_the_table_of_what_the_generate_endpoints_take(
    answers: dict[str, Any], keys: str, expected: str
) -> None:
    status, answer, [streamed] = answers[keys]
    if not expected.startswith("{"):
        ours = expected == "INVALID_ARG"
        assert status == (400 if ours else int(expected))
        assert ("INVALID_ARG" in answer["error"]) is ours
        assert streamed["error"] == answer["error"]
        return
    assert status == 200, answer
    for name, value in json.loads(expected).items():
        wanted = pytest.approx(value, abs=1e-3) if isinstance(value, float) else value
        assert answer[name] == streamed[name] == wanted


# tensorrtllm_backend


def tensor(module: Any, name: str, array: Any) -> Any:
    made = module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def test_tensorrtllm_backends_curl(full_server: TritonServer) -> None:
    """README.md of tensorrtllm_backend, and what its first versions had there as well."""
    body = {"text_input": PROMPT, "max_tokens": 3, "bad_words": "", "stop_words": ""}
    for more in ({}, {"pad_id": EOS, "end_id": EOS}):
        status, answer = generate(full_server, body | more, model="ensemble")
        assert (status, answer["text_output"]) == (200, " Tokyo.\n")


@pytest.mark.parametrize("stream", [False, True])
def test_tensorrtllm_backends_grpc_client(full_server: TritonServer, stream: bool) -> None:
    """Those of inflight_batcher_llm/client/end_to_end_grpc_client.py with all of its flags that mean something."""
    values = {
        "text_input": np.array([[PROMPT]]).astype(object), "max_tokens": np.array([[4]], dtype=np.int32),
        "stream": np.array([[stream]]), "beam_width": np.array([[1]], dtype=np.int32),
        "temperature": np.array([[0.0]], dtype=np.float32), "num_return_sequences": np.array([[1]], dtype=np.int32),
        "stop_words": np.array([["Alps", "xx"]], dtype=object),
        "repetition_penalty": np.array([[1.0]], dtype=np.float32),
        "return_log_probs": np.array([[True]]), "end_id": np.array([[EOS]], dtype=np.int32),
        "pad_id": np.array([[EOS]], dtype=np.int32), "exclude_input_in_output": np.array([[False]]),
    }  # fmt: skip
    responses: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(full_server.grpc_url, channel_args=NO_PROXY) as full_client:
        full_client.start_stream(callback=lambda result, error: responses.put(error or result))
        full_client.async_stream_infer(
            "ensemble",
            [tensor(tritonclient.grpc, name, array) for name, array in values.items()],
            outputs=[
                tritonclient.grpc.InferRequestedOutput(name)
                for name in ("text_output", "cum_log_probs", "output_log_probs")
            ],
        )
        full_client.stop_stream()
    results = list(responses.queue)
    assert len(results) == (4 if stream else 1)
    assert "".join(result.as_numpy("text_output")[0].decode() for result in results) == f"{PROMPT} Tokyo.\n\n"
    log_probs = np.concatenate([result.as_numpy("output_log_probs") for result in results])
    assert results[-1].as_numpy("cum_log_probs")[0] == pytest.approx(log_probs.sum(), abs=1e-4)
    assert len(log_probs) == 4


# vllm_backend


@pytest.mark.parametrize("asked", [True, False])
def test_vllm_backends_additional_outputs(full_server: TritonServer, asked: bool) -> None:
    """docs/additional_outputs.md of vllm_backend; NVIDIA's OpenAI frontend sends the same."""
    inputs = {
        "text_input": np.array([PROMPT.encode()], dtype=object), "stream": np.array([True]),
        "exclude_input_in_output": np.array([True]),
        "sampling_parameters": np.array([json.dumps({"max_tokens": "3", "logprobs": 1, "n": 1, "min_p": 0.0})], object),
    } | {f"return_{name}": np.array([asked]) for name in VLLM_OUTPUTS}  # fmt: skip
    responses: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(full_server.grpc_url, channel_args=NO_PROXY) as full_client:
        full_client.start_stream(callback=lambda result, error: responses.put(error or result))
        full_client.async_stream_infer(
            "lightllm", [tensor(tritonclient.grpc, name, array) for name, array in inputs.items()]
        )
        full_client.stop_stream()
    results = list(responses.queue)
    decoded = [json.loads(result.as_numpy("logprobs")[0]) for result in results]
    if not asked:
        assert decoded == [None] * len(results)
        return
    tokens = [one for response in decoded for one in response]
    ids = [token_id for result in results for token_id in result.as_numpy("output_ids").tolist()]
    assert [list(token) for token in tokens] == [[str(token_id)] for token_id in ids]
    assert [token[str(token_id)]["decoded_token"] for token, token_id in zip(tokens, ids, strict=True)] == [
        " Tokyo",
        ".",
        "\n",
    ]
    total = sum(token[str(token_id)]["logprob"] for token, token_id in zip(tokens, ids, strict=True))
    assert results[-1].as_numpy("cumulative_logprob")[0] == pytest.approx(total, abs=1e-4)


VLLM_OUTPUTS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")


# Seeds and stop ids


def test_a_seed_as_an_http_request_parameter(full_server: TritonServer) -> None:
    text = tensor(tritonclient.http, "text_input", np.array([PROMPT], dtype=object))
    with tritonclient.http.InferenceServerClient(full_server.http_url) as full_client:

        def ids(seed: int | str) -> list[int]:
            parameters = {"max_tokens": 4, "temperature": 3.0, "seed": seed}
            return full_client.infer("lightllm_unary", [text], parameters=parameters).as_numpy("output_ids").tolist()

        assert ids(2**63 - 1) == ids(str(2**63 - 1)) != ids(str(2**64 - 1))
        with pytest.raises(
            InferenceServerException, match="seed is 1.8.*e.19, which came as a double.*: send a string"
        ):
            ids(2**64 - 1)


def test_stop_token_ids(full_server: TritonServer, full_client: LightLLMClient, reference: Reference) -> None:
    free = full_client.generate(PROMPT, max_tokens=8)
    stop = free.token_ids[2]
    assert stop not in free.token_ids[:2]
    variants: tuple[dict[str, Any], ...] = ({}, {"ignore_eos": True}, {"ignore_eos": True, "stop_words": "Alps"})
    direct = {"input_ids": reference.encode(PROMPT), "sampling_parameters": json.dumps({"stop_token_ids": [int(stop)]})}
    unary_body = {"text_input": PROMPT, "stop_ids": [int(stop)]}
    streamed, waiting, (status, unary), direct_responses, *answers = in_parallel(
        [
            lambda: Generation.join(full_client.stream(PROMPT, max_tokens=8, stop_token_ids=stop)),
            lambda: full_client.generate(PROMPT, max_tokens=8, min_tokens=4, stop_token_ids=stop),
            lambda: generate(full_server, unary_body, model="lightllm_unary"),
            lambda: stream_grpc(full_server, direct, model="generation"),
            *(
                lambda more=more: full_client.generate(PROMPT, max_tokens=8, stop_token_ids=[5, stop], **more)
                for more in variants
            ),
        ]
    )
    for answer in answers:
        assert (answer.token_ids, answer.finish_reason) == (free.token_ids[:3], "stop")
        assert answer.text == reference.decode(list(free.token_ids[:2])), "the id is not text"
    assert streamed.text == reference.decode(list(free.token_ids[:2]))
    assert stop not in waiting.token_ids[:4]
    assert len(waiting.token_ids) > 4
    assert (status, unary["text_output"], unary["finish_reason"]) == (200, " Tokyo.", "stop")
    assert [i for one in direct_responses for i in one["output_ids"]] == list(free.token_ids[:3])
    with pytest.raises(InvalidArgument, match=r"stop_token_ids \(or end_id\) holds 49152; allowed: 0 ≤ id < 49152"):
        full_client.generate(PROMPT, stop_token_ids=[49152])
