# SPDX-License-Identifier: Apache-2.0
"""Statuses and forms of errors, and what the guard does before any handler."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightllm_backend.config import ConfigError, EngineConfig
from lightllm_backend.front import engine_load
from lightllm_backend.front.errors import from_engine
from lightllm_backend.front.json_route import MAX_FIELD_DEPTH
from lightllm_backend.front.security import read_api_keys, tenant_name
from lightllm_backend.front.state import Front
from lightllm_backend.options import parse_request
from lightllm_backend.structured_output import MAX_BYTES, MAX_SCHEMA_DEPTH
from lightllm_client import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    LightLLMError,
    NotFound,
    Unavailable,
)
from tests.front.pretended import Caller, PretendedClient

BODY = {"prompt": "Hi"}
TOO_LONG = "the prompt has 9 tokens and max_tokens is 1; allowed: at most 8 prompt tokens (x)"


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (InvalidArgument("stop_words is 7; allowed: text"), 400, "stop", None),
        (InvalidArgument("stop_token_ids (or end_id) holds 7; allowed: 0 ≤ id < 5"), 400, "stop_token_ids", None),
        (InvalidArgument(TOO_LONG), 400, "prompt", "context_length_exceeded"),
        (InvalidArgument("structured_output allows nothing after this"), 400, "structured_output", None),
        (NotFound("no such model"), 404, None, "model_not_found"),
        (Unavailable("the queue is full (3 requests)"), 429, None, "rate_limit_exceeded"),
        (Unavailable("the engine is not up; try again"), 503, None, "unavailable"),
        (Cancelled("the request's deadline has passed"), 504, None, "deadline_exceeded"),
        (DeadlineExceeded("late"), 504, None, "deadline_exceeded"),
        (Internal("broken"), 500, None, "engine_error"),
        (LightLLMError("strange"), 500, None, "engine_error"),
    ],
)
def test_errors_of_the_engine(error: LightLLMError, status: int, param: str | None, code: str | None) -> None:
    mapped = from_engine(error)
    assert (mapped.status, mapped.param, mapped.code) == (status, param, code)
    assert ("retry-after" in mapped.headers) == (status in (429, 503))


def test_a_server_that_is_not_there_is_not_told_by_its_address() -> None:
    mapped = from_engine(Unavailable("127.0.0.1:8001: failed to connect to all addresses; last error: UNKNOWN: …"))
    assert (mapped.status, mapped.code) == (503, "unavailable")
    assert mapped.message == "the server does not answer: it is starting, or has stopped; try again"


def test_a_body_that_is_not_called_json(call: Caller) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = call("POST", "/v1/completions", content=b'{"prompt": "Hi"}', headers=headers)
    message = "the header Content-Type names no JSON; allowed: application/json"
    assert (response.status_code, response.json()["error"]["message"]) == (400, message)


@pytest.mark.parametrize("name", ["Application/JSON", "application/vnd.api+json; charset=utf-8"])
def test_other_names_of_json(call: Caller, name: str) -> None:
    response = call("POST", "/v1/completions", content=b'{"prompt": "Hi"}', headers={"content-type": name})
    assert response.status_code == 200, response.text


def test_paths_and_methods(call: Caller) -> None:
    assert call("GET", "/v1/nothing").status_code == 404
    response = call("PUT", "/v1/models")
    assert (response.status_code, response.headers["allow"]) == (405, "GET")
    assert response.json()["error"]["message"] == 'PUT "/v1/models": Method Not Allowed; allowed: GET'


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"prompt": ' + b"[" * 10**5, b"[]", b"7", b""])
def test_a_body_that_is_no_json_object(call: Caller, content: bytes) -> None:
    response = call("POST", "/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "allowed: " in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "allowed"),
    [
        ('{"prompt": "a", "temperature": NaN}', "temperature", "a number from 0 to 100"),
        ('{"prompt": "a", "metadata": {"a": 1e999}}', "metadata.a", "a finite number"),
    ],
)
def test_numbers_that_json_does_not_know(call: Caller, body: str, param: str, allowed: str) -> None:
    response = call("POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].endswith(f"; allowed: {allowed}")


def test_a_field_without_a_printable_name(call: Caller) -> None:
    for name, shown in (("", '""'), ("\n", '"\\n"')):
        error = call.refusal("/v1/completions", {**BODY, name: 1})
        assert error["message"].startswith(f"{shown} is not a field of this request; allowed: ")
    assert len(call.refusal("/v1/completions", {**BODY, "a" * 10**6: 1})["message"]) < 400


def test_the_document_names_every_status(call: Caller) -> None:
    document = call("GET", "/openapi.json").json()
    completions = document["paths"]["/v1/completions"]["post"]["responses"]
    assert set(completions) == {"200", "400", "401", "404", "413", "429", "500", "503", "504"}
    generate = document["paths"]["/generate"]["post"]["responses"]
    assert set(generate) == {"200", "401", "413", "417", "429", "500", "503", "504"}
    assert set(completions["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(document["paths"]["/v1/models/{name}"]["get"]["responses"]) == {"200", "401", "404", "500"}


def test_models(call: Caller) -> None:
    [model] = call("GET", "/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 64)
    assert call("GET", "/v1/models/tiny").json() == model
    assert call("GET", "/v1/models/other/name").status_code == 404


@pytest.mark.parametrize(
    ("metrics", "longest"),
    [
        ('lightllm_info{model="a",max_req_total_len="33",tp="1"} 1\n', 33),
        ('lightllm_info{max_req_total_len="33"} 0\nlightllm_info{model="b, }",max_req_total_len="44"} 1\n', 44),
        ('lightllm_info{model=",max_req_total_len=\\"5\\"",tp="1"} 1\n', 64),
        ("lightllm_engine_up 0\n", 64),
        ("", 64),
    ],
)
def test_the_model_s_length_is_the_engine_s_once_it_is_up(
    front: Front, monkeypatch: pytest.MonkeyPatch, metrics: str, longest: int
) -> None:
    monkeypatch.setattr(engine_load, "_metrics", lambda address: metrics)
    call = Caller(replace(front))
    assert call("GET", "/v1/models").json()["data"][0]["max_model_len"] == longest
    assert call("GET", "/v1/models/tiny").json()["max_model_len"] == longest


def test_api_keys(front: Front, client: PretendedClient) -> None:
    call = Caller(front, ("secret", "other"))
    wrong: list[dict[str, str]] = [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}]
    for headers in wrong:
        response = call.post("/v1/completions", BODY, headers=headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "secret" not in response.text
    assert call.post("/v1/completions", BODY, headers={"authorization": "Bearer secret"}).status_code == 200
    assert client.calls[-1][1]["tenant"] == tenant_name("secret")
    assert "secret" not in tenant_name("secret")
    assert call("GET", "/openapi.json").status_code == 200


def test_where_keys_come_from(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\n one \n\ntwo\n")
    config = EngineConfig(api_key_file=str(file))
    assert read_api_keys(config, {"LIGHTLLM_API_KEY": "three, four"}) == {"one", "two", "three", "four"}
    assert read_api_keys(EngineConfig(), {}) == set()
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(config, {})
    with pytest.raises(ConfigError, match="No such file"):
        read_api_keys(EngineConfig(api_key_file="/nowhere"), {})


def test_request_ids_are_repeated(call: Caller) -> None:
    def request_id(path: str, sent: str) -> str:
        return call("GET", path, headers={"x-request-id": sent}).headers["x-request-id"]

    assert request_id("/v1/models", "mine") == request_id("/v1/nothing", "mine") == "mine"
    made = {request_id("/v1/models", "a" * 200) for _ in range(2)}
    assert {len(one) for one in made} == {32}


def test_a_body_that_is_too_large(front: Front) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"a" * 10

    call = Caller(replace(front, config=EngineConfig(max_body_bytes=100)))
    told = "the body is too large; allowed: at most 100 bytes (max_body_bytes)"
    assert call.refusal("/v1/completions", {"prompt": "a" * 100}, status=413)["message"] == told
    response = call("POST", "/v1/completions", content=parts(), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["message"]) == (413, told)


def test_pages_of_other_origins(front: Front) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    header = "access-control-allow-origin"
    assert header not in Caller(front)("OPTIONS", "/v1/models", headers=asked).headers
    call = Caller(replace(front, config=EngineConfig(cors_origins=("https://a.example",))), ("secret",))
    assert call("OPTIONS", "/v1/models", headers=asked).headers[header] == "https://a.example"
    assert header not in call("GET", "/v1/models", headers={"origin": "https://b.example"}).headers


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


MAX = MAX_FIELD_DEPTH
TOO_LARGE = {"const": "a" * MAX_BYTES}


@pytest.mark.parametrize(
    ("path", "body", "param", "told"),
    [
        ("completions", b'{"prompt": "a", "guided_json": {"a": %s}}' % deep(MAX), "guided_json", f"more than {MAX} le"),
        ("completions", b'{"\\u0000": %s}' % deep(MAX + 1), "\0", f'"\\u0000" is nested more than {MAX}'),
        ("chat/completions", b'{"messages": %s}' % deep(150), "messages", f"messages is nested more than {MAX} levels"),
        ("completions", b'{"prompt": %s}' % deep(50_000), None, "the body is nested too deeply; allowed: at most "),
        ("completions", b'{"prompt": "\xff"}', None, "the body is not UTF-8; allowed: a JSON object"),
        ("completions", b'{"seed": 1%s}' % (b"0" * 5000), None, "the body holds an integer of thousands of digits"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_body_that_cannot_be_read(
    call: Caller, path: str, body: bytes, param: str | None, told: str
) -> None:
    response = call("POST", f"/v1/{path}", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert told in error["message"]


def test_a_schema_may_be_as_deep_in_every_field(call: Caller, client: PretendedClient) -> None:
    schema = b'{"items":' * (MAX_SCHEMA_DEPTH - 1) + b"{}" + b"}" * (MAX_SCHEMA_DEPTH - 1)
    headers = {"content-type": "application/json"}
    for field in (
        b'"guided_json": %s',
        b'"structured_outputs": {"json": %s}',
        b'"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": %s}}',
    ):
        body = b'{"prompt": "a", %s}' % (field % schema)
        assert call("POST", "/v1/completions", content=body, headers=headers).status_code == 200
        asked = client.calls[-1][1]["structured_output"]
        assert (
            parse_request({"text_input": "a", "structured_output": asked}).options.sampling.structured_output == asked
        ), "the engine takes it"
    tool = b'{"type": "function", "function": {"name": "f", "parameters": %s}}' % schema
    body = b'{"messages": [{"role": "user", "content": "a"}], "tools": [%s]}' % tool
    assert call("POST", "/v1/chat/completions", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"guided_json": "5"}, "guided_json", 'guided_json is "5", whose JSON Schema is no object; allowed: '),
        ({"guided_json": "[" * 500 + "]" * 500}, "guided_json", "is nested more than 64 levels deep; allowed: a JSON"),
        ({"guided_regex": "a" * MAX_BYTES}, "guided_regex", f"; at most {MAX_BYTES} do; allowed: a regular expression"),
        ({"guided_json": {}, "allowed_token_ids": [5]}, "allowed_token_ids", "guided_json, allowed_token_ids are"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "response_format.json_schema.schema is missing; allowed: a JSON schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": TOO_LARGE}}},
            "response_format.json_schema.schema",
            'response_format.json_schema.schema is {"const": "a',
        ),
    ],
)  # fmt: skip
def test_a_constraint_is_refused_by_its_field_before_the_engine_sees_it(
    call: Caller, client: PretendedClient, body: dict[str, Any], param: str, told: str
) -> None:
    error = call.refusal("/v1/completions", {"prompt": "a", **body})
    assert error["param"] == param
    assert told in error["message"]
    assert client.calls == []


def test_tools_whose_schemas_are_too_large_are_refused_by_their_names(call: Caller, client: PretendedClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": TOO_LARGE}}
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "tool_choice": "required"}
    error = call.refusal("/v1/chat/completions", body)
    assert error["message"].startswith('tools is ["f"], which takes ')
    assert client.calls == []
