# SPDX-License-Identifier: Apache-2.0
"""LightLLM's clients get LightLLM's JSON."""

import asyncio
import json
import math
from typing import Any

import pytest

from lightllm_backend.front.lightllm.answers import TokenEntries
from lightllm_client import Cancelled, InvalidArgument, LightLLMError, Unavailable
from tests.front.lightllm.engine import EOS, TOKENIZER, Engine, Load, call, chunk, front_with, post

README_BODY = b'{"inputs":"What is AI?","parameters":{"max_new_tokens":17, "frequency_penalty":1}}'
IDS = TOKENIZER.encode("the dog sleeps")[1:]


def words(*texts: str, finish_reason: str = "length") -> Engine:
    ends = [""] * (len(texts) - 1) + [finish_reason]
    return Engine(*(chunk([300 + i], text, ends[i], [-0.5]) for i, text in enumerate(texts)))


def events(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data:{") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


def test_generate_answers_as_in_lightllms_readme() -> None:
    engine = words(" What", " is")
    response = post(engine, "/generate", README_BODY)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert response.json() == {
        "generated_text": [" What is"],
        "count_output_tokens": 2,
        "finish_reason": "length",
        "prompt_tokens": 4,
    }
    [(prompt, options)] = engine.asked
    assert prompt == "What is AI?"
    assert options == {
        "max_tokens": 17,
        "do_sample": False,
        "frequency_penalty": 1.0,
    }


def test_a_log_probability_that_json_does_not_know_is_the_least() -> None:
    engine = Engine(chunk([300, 301], "a", "stop", [float("nan"), -math.inf]))
    body = post(engine, "/generate", {"inputs": [1, 2], "parameters": {"return_details": True}}).json()
    assert [(token["logprob"], token["cumlogprob"]) for token in body["tokens"]] == [(-9999.0, -9999.0)] * 2


def test_details_are_an_entry_for_each_token() -> None:
    engine = Engine(chunk([300], "a", "", [-0.5]), chunk([EOS], "", "stop", [-1.5]))
    body = post(engine, "/generate", {"inputs": [1, 2], "parameters": {"return_details": True}}).json()
    common = {"prompt_tokens": 4}
    assert body["tokens"] == [
        {"id": 300, "text": "a", "logprob": -0.5, "cumlogprob": -0.5, "special": False, "count_output_tokens": 1}
        | common,
        {"id": EOS, "text": "", "logprob": -1.5, "cumlogprob": -1.0, "special": True, "count_output_tokens": 2}
        | common,
    ]
    assert engine.asked[0][1]["return_log_probs"] is True


def test_several_answers_are_lists() -> None:
    engine = words("a", "b", finish_reason="stop")
    parameters = {"best_of": 2, "do_sample": True, "seed": 5}
    body = post(engine, "/generate", {"inputs": "x", "parameters": parameters}).json()
    assert body == {
        "generated_text": ["ab", "ab"],
        "count_output_tokens": [2, 2],
        "finish_reason": ["stop", "stop"],
        "prompt_tokens": 4,
    }
    assert engine.asked == [("x", {"do_sample": True, "seed": 5, "n": 2})]
    parameters["return_details"] = True
    detailed = post(engine, "/generate", {"inputs": "x", "parameters": parameters}).json()
    assert [[entry["text"] for entry in entries] for entries in detailed.pop("tokens")] == [["a", "b"]] * 2
    assert detailed == body


def test_a_stream_has_an_event_for_each_token() -> None:
    engine = words(" What", " is")
    response = post(engine, "/generate_stream", README_BODY)
    assert response.headers["content-type"].startswith("text/event-stream")
    first, last = events(response.text)
    assert first == {
        "token": {
            "id": 300, "text": " What", "logprob": -0.5, "special": False, "count_output_tokens": 1, "prompt_tokens": 4,
        },
        "generated_text": None, "finished": False, "finish_reason": None, "details": None,
    }  # fmt: skip
    assert (last["finished"], last["finish_reason"], last["token"]["count_output_tokens"]) == (True, "length", 2)
    assert engine.streams[0].is_closed


def test_a_chunk_of_several_tokens_becomes_their_texts() -> None:
    maker = TokenEntries(TOKENIZER, True)
    assert [entry["text"] for entry in maker.take(chunk(IDS[:1], TOKENIZER.decode(IDS[:1])))] == ["the"]
    rest = TOKENIZER.decode(IDS)[len("the") :]
    entries = maker.take(chunk(IDS[1:], rest, "stop"))
    assert "".join(entry["text"] for entry in entries) == rest
    assert all(entry["text"] for entry in entries)
    assert [entry["count_output_tokens"] for entry in entries] == list(range(2, len(IDS) + 1))
    # Text that was cut at a stop string is not that of the tokens: the last one has it.
    assert [entry["text"] for entry in maker.take(chunk(IDS, "x", "stop"))] == [""] * (len(IDS) - 1) + ["x"]


def test_an_end_without_a_token_is_an_event() -> None:
    engine = Engine(chunk([300], "a", "", [-0.5]), chunk([], "b", "stop"))
    last = events(post(engine, "/generate_stream", {"inputs": "x"}).text)[-1]
    assert (last["token"]["id"], last["token"]["text"], last["finish_reason"]) == (None, "b", "stop")


def test_special_tokens_may_be_left_out_of_the_prompt() -> None:
    engine = words("a")
    post(engine, "/generate", {"inputs": "the dog", "parameters": {"add_special_tokens": False}})
    assert engine.asked[0][0] == tuple(TOKENIZER.encode("the dog")[1:])


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidArgument("the prompt has 9 tokens"), 417),
        (Unavailable("the queue is full"), 429),
        (Unavailable("no engine"), 503),
        (Cancelled("the deadline has passed"), 504),
    ],
)
def test_an_error_before_the_first_token_is_the_answer(path: str, error: LightLLMError, status: int) -> None:
    response = post(Engine(error), path, {"inputs": "x"})
    assert (response.status_code, response.json()) == (status, {"message": error.message})


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_the_engines_names_are_those_of_the_request(path: str) -> None:
    engine = Engine(InvalidArgument("structured_output cannot be followed: regex: no"))
    response = post(engine, path, {"inputs": "x", "parameters": {"regular_constraint": "("}})
    assert response.json() == {"message": "regular_constraint cannot be followed: regex: no"}
    engine = Engine(InvalidArgument("the prompt has 1 tokens and max_tokens is 9; allowed: at most 8 in all"))
    response = post(engine, path, {"inputs": "x"})
    assert response.json() == {"message": "the prompt has 1 tokens and max_new_tokens is 9; allowed: at most 8 in all"}


def test_a_later_error_is_the_last_event() -> None:
    response = post(Engine(chunk([300], "a"), Unavailable("no engine")), "/generate_stream", {"inputs": "x"})
    assert events(response.text)[1] == {"message": "no engine"}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/generate", b"{", "the body is not JSON"),
        ("/generate", b"\xff", "the body is not UTF-8; allowed: "),
        ("/generate", b"[" * 99 + b"]" * 99, "the body is JSON which is nested more than 64 levels deep; allowed: "),
        ("/generate", [1], "the body is [1]; allowed: a JSON object"),
        ("/generate", {"inputs": "x", "parameters": {"n": 9}}, "n is 9; allowed"),
        (
            "/generate",
            b'{"inputs": "x", "multimodal_params": {"\\ud800": 1}}',
            "multimodal_params.? is 1; allowed",
        ),
        ("/generate_stream", {"inputs": "x", "parameters": {"best_of": 2}}, "n is 2; allowed: 1 (a stream has one"),
        ("/tokens", {"text": 1}, "text is 1; allowed: a string"),
        ("/tokens", b'{"text": "\\ud800"}', "text: the text has a lone surrogate at character 0; allowed: text that"),
        ("/tokens", {"text": "a" * (2**20 + 1)}, "text has 1048577 bytes; allowed: at most 1048576"),
        ("/tokens", {"text": "a", "parameters": {"a": 1}}, 'parameters is {"a": 1}; allowed'),
    ],
)
def test_a_bad_body_is_refused_with_lightllms_status(path: str, body: Any, words: str) -> None:
    engine = Engine()
    response = post(engine, path, body)
    assert (response.status_code, list(response.json())) == (417, ["message"])
    assert words in response.json()["message"]
    assert not engine.asked


def test_tokens_are_counted() -> None:
    num_tokens = len(TOKENIZER.encode("the dog"))
    assert post(Engine(), "/tokens", {"text": "the dog"}).json() == {"ntokens": num_tokens}
    without = {"text": "the dog", "parameters": {"add_special_tokens": False}}
    assert post(Engine(), "/tokens", without).json() == {"ntokens": num_tokens - 1}


def test_health_and_load() -> None:
    for path in ("/health", "/healthz"):
        good = call(front_with(Engine()), lambda client, path=path: client.get(path))
        assert (good.status_code, good.json()) == (200, {"message": "Ok"})
        bad = call(front_with(Engine(is_healthy=False)), lambda client, path=path: client.get(path))
        assert (bad.status_code, bad.json()) == (503, {"message": "Error"})
    assert call(front_with(Engine()), lambda client: client.head("/health")).status_code == 200
    loaded = call(front_with(Engine(), Load(30, 120)), lambda client: client.get("/token_load"))
    assert loaded.json() == {"current_load": 0.25, "logical_max_load": 0.25, "dynamic_max_load": 0.25}
    assert call(front_with(Engine()), lambda client: client.get("/token_load")).status_code == 503


def test_a_client_that_leaves_cancels_its_request() -> None:
    engine = Engine(chunk([300], "a"), hangs=True)
    application = front_with(engine)
    messages: list[Any] = [
        {"type": "http.request", "body": b'{"inputs": "x"}', "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def run() -> None:
        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b"", "state": {}}
        await asyncio.wait_for(application(scope, receive, send), 10)
        await asyncio.sleep(0)  # the cancelled task ends
        assert engine.streams[0].is_closed

    asyncio.run(run())
