# SPDX-License-Identifier: Apache-2.0
"""Random requests to the front, and what every answer to one must be.

The bodies are almost right: some fields of a whole one, of which up to three values are others, spelled as JSON that
may be cut, nested deeply or in another encoding. schemathesis draws others from the OpenAPI document.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from random import Random
from typing import Any, NamedTuple

from hypothesis import strategies as st

from lightllm_backend.front.lightllm.parameters import LIGHTLLM_PARAMETERS
from lightllm_backend.front.openai.schema import ChatCompletionRequest, CompletionRequest
from tests.fuzz.values import json_texts, json_values, texts

MAX_MESSAGE = 20_000  # characters; an error must not repeat what somebody sent by the megabyte
API_KEY = "secret"

_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_FUNCTION = {"name": "f", "description": "It.", "parameters": _SCHEMA, "strict": True}
_SAMPLING: dict[str, Any] = {
    "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "n": 2, "seed": 7,
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1.5, "frequency_penalty": -1,
    "repetition_penalty": 1.1, "logit_bias": {"5": -1.5, "6": 100}, "allowed_token_ids": [5, 6], "stop": ["\n", "x"],
    "stop_token_ids": [3], "ignore_eos": True, "min_tokens": 1, "skip_special_tokens": False, "priority": -1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA, "strict": True}},
    "structured_outputs": {"regex": "a+"}, "guided_json": _SCHEMA, "guided_regex": "a+", "guided_choice": ["a", "b"],
    "guided_grammar": "start: /a/", "user": "u", "metadata": {"a": "b"}, "best_of": 1, "length_penalty": 1.0,
    "bad_words": None, "truncate_prompt_tokens": None,
}  # fmt: skip
_COMPLETION: dict[str, Any] = {**_SAMPLING, "prompt": "Hi", "max_tokens": 2, "echo": True, "logprobs": 2}
_MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
    {"role": "user", "content": "Hi", "name": "u"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "7"},
]
_CHAT: dict[str, Any] = {
    **_SAMPLING, "messages": _MESSAGES, "max_completion_tokens": 2, "max_tokens": 3, "logprobs": True,
    "top_logprobs": 2, "tools": [{"type": "function", "function": _FUNCTION}], "tool_choice": "auto",
    "parallel_tool_calls": False, "reasoning_effort": "low", "include_reasoning": False,
    "add_generation_prompt": False, "continue_final_message": True, "chat_template": "default",
    "chat_template_kwargs": {"extra": "x"}, "documents": [{"text": "d"}], "modalities": ["text"],
}  # fmt: skip
_GENERATE: dict[str, Any] = {
    "inputs": "Hi",
    "multimodal_params": {"images": []},
    "parameters": {
        "max_new_tokens": 2, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "best_of": 2, "n": 2,
        "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.1, "ignore_eos": True,
        "stop_sequences": ["x", [3]], "return_details": True, "add_special_tokens": False, "seed": 7, "tenant": "t",
        "priority": 1, "min_new_tokens": 1, "skip_special_tokens": False, "guided_json": _SCHEMA,
        "allowed_token_ids": [5], "group_request_id": 1,
    },
}  # fmt: skip
_TOKENS: dict[str, Any] = {"text": "Hi", "parameters": {"add_special_tokens": False}}
# Where bodies go, each with a whole one, the fields that a right one needs, and other fields.
_BODIES: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "/v1/completions": (_COMPLETION, ("prompt",), tuple(CompletionRequest.model_fields)),
    "/v1/chat/completions": (_CHAT, ("messages", "max_completion_tokens"), tuple(ChatCompletionRequest.model_fields)),
    "/generate": (_GENERATE, ("inputs",), LIGHTLLM_PARAMETERS),
    "/generate_stream": (_GENERATE, ("inputs",), LIGHTLLM_PARAMETERS),
    "/tokens": (_TOKENS, ("text",), ()),
}
_PATHS = (
    *_BODIES, "/v1/models", "/v1/models/tiny", "/health", "/token_load", "/status", "/openapi.json", "/", "/page/x",
    "/v1",
)  # fmt: skip
_PROMPTS = st.sampled_from(("a", ["a", "b"], [5, 6], [[5], [6, 7]], "{", "\u2028é😀", "a" * 300, [5] * 300))
_TYPES = ("application/json", "application/json; charset=utf-8", "text/plain", "multipart/form-data", "", "\xff")


class HttpCall(NamedTuple):
    """A request: the body comes in pieces, and the client may hang up after some messages of the answer."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    pieces: tuple[bytes, ...]
    hangs_up_after: int | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


class Answer(NamedTuple):
    """What came of a call."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container inside a value with each of its keys."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from _places(item)


def _some(names: Collection[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(sorted(names)), max_size=4)


_rarely = st.sampled_from((False,) * 11 + (True,))
_often = st.sampled_from((False, True))
_names = {path: _some(whole) for path, (whole, _, _) in _BODIES.items()}
_parameters = _some(_GENERATE["parameters"])
_others = {path: st.sampled_from((*whole, *others)) | texts for path, (whole, _, others) in _BODIES.items()}
_num_changes = st.sampled_from((0, 0, 0, 1, 1, 2))
_changes = st.sampled_from(("remove", "replace", "wrap", "add"))
_wraps: st.SearchStrategy[Callable[[Any], Any]] = st.sampled_from(
    (lambda value: [value], lambda value: {"a": value}, str)
)


@st.composite
def _bodies(draw: st.DrawFn, path: str) -> dict[str, Any]:
    whole, needed, _ = _BODIES[path]
    body: dict[str, Any] = copy.deepcopy({name: whole[name] for name in (*needed, *draw(_names[path]))})
    if "parameters" in body and path != "/tokens":
        body["parameters"] = {name: body["parameters"][name] for name in draw(_parameters)}
    if draw(_rarely):
        body[needed[0]] = copy.deepcopy(draw(_PROMPTS))
    for _ in range(draw(_num_changes)):
        places = list(_places(body))
        change = draw(_changes) if places else "add"
        if change == "add":
            body[draw(_others[path])] = draw(json_values)
            continue
        container, key = draw(st.sampled_from(places))
        if change == "remove":
            del container[key]
        else:
            container[key] = draw(json_values) if change == "replace" else draw(_wraps)(container[key])
    return body


_spellings = st.sampled_from(("encoding", "bytes", "twice", "number", "blank", "tail", "surrogates", "", "", ""))
_encodings = st.sampled_from(("utf-16", "utf-32-le", "utf-8-sig", "latin-1"))
_numbers = st.sampled_from(("1" * 5000, "-" + "9" * 400, "1e999", "NaN", "-Infinity", "-0", "1E2", "01", "0x1", "1_0"))


@st.composite
def _encoded(draw: st.DrawFn, path: str) -> bytes:
    """The bytes of a body. One in four is no plain JSON object in UTF-8."""
    if not draw(_often) or draw(_often):
        return json.dumps(draw(_bodies(path))).encode()
    text = draw(json_texts(_bodies(path)))
    spelling = draw(_spellings)
    if spelling == "encoding":
        return text.encode(draw(_encodings), errors="replace")
    if spelling == "bytes":
        return draw(st.binary(max_size=30))
    if spelling == "twice":
        name = draw(_others[path])
        text = text.replace("{", f"{{{json.dumps(name)}: {json.dumps(draw(json_values))}, ", 1)
    elif spelling == "number":
        number = draw(_numbers)
        text = re.sub(r"\d+(\.\d+)?", lambda _: number, text, count=1)
    elif spelling == "blank":
        text = " " * draw(st.sampled_from((9, 30_000))) + text
    elif spelling == "tail":
        return text.encode(errors="replace") + draw(st.binary(max_size=3))
    return text.encode(errors="surrogatepass" if spelling == "surrogates" else "replace")


_paths = st.sampled_from(tuple(_BODIES))
_encoded_by_path = {path: _encoded(path) for path in _BODIES}
_any_method = st.sampled_from(("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "POST", "BREW"))
_any_path = st.sampled_from(_PATHS)
_tails = st.sampled_from(("/", "?a=b", "?%ff", "/..", "/%2e%2e/main.py", "/é", "%00"))
_types = st.sampled_from(_TYPES)
_authorizations = st.sampled_from(("", "Bearer", "Bearer wrong", "Basic secret", "Bearer \xff"))
_request_ids = st.sampled_from(("mine", "a" * 129, "a b", "\xff", ""))
_cuts = st.lists(st.integers(0, 100), max_size=3)


@st.composite
def calls(draw: st.DrawFn) -> HttpCall:
    """Mostly a body for a path that takes one; now and then another method, path or header."""
    path = draw(_paths)
    method, headers = "POST", {"content-type": "application/json", "authorization": f"Bearer {API_KEY}"}
    body = draw(_encoded_by_path[path])
    if draw(_rarely):
        kind = draw(st.integers(0, 4))
        if kind == 0:
            method, path = draw(_any_method), draw(_any_path)
        elif kind == 1:
            path += draw(_tails)
        elif kind == 2:
            headers["content-type"] = draw(_types)
        elif kind == 3:
            headers["authorization"] = draw(_authorizations)
        else:
            headers["x-request-id"] = draw(_request_ids)
    cuts = [0, *sorted(len(body) * cut // 100 for cut in draw(_cuts)), len(body)]
    pieces = tuple(body[begin:end] for begin, end in itertools.pairwise(cuts))
    if draw(_often):
        headers["content-length"] = str(len(body))
    hangs_up = draw(st.integers(0, 3)) if draw(_rarely) else None
    return HttpCall(method, path, tuple(headers.items()), pieces, hangs_up)


def variants(call: HttpCall) -> list[HttpCall]:
    """Return four more requests, always the same ones: three damaged bodies, and the body at another path.

    Drawing as many would take longer than answering them.
    """
    random = Random(zlib.crc32(call.body))
    body = call.body or b"{}"
    begin = random.randrange(len(body))
    end = min(len(body), begin + random.randrange(1, 9))
    other = body[:begin] + bytes([random.choice(b'"\\{}[],:0-.eE \xff') if random.random() < 0.8 else begin % 256])
    damaged = [body[:begin] + body[end:], body[:end] + body[begin:], other + body[begin + 1 :]]
    others = [call._replace(pieces=(one,), headers=_without_length(call)) for one in damaged]
    return [*others, call._replace(path=random.choice(tuple(_BODIES)))]


def _without_length(call: HttpCall) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in call.headers if name != "content-length")


def schema_calls(document: dict[str, Any]) -> st.SearchStrategy[HttpCall]:
    """Right and wrong requests by the front's OpenAPI document, as schemathesis draws them."""
    import schemathesis
    from schemathesis.core import NotSet

    def as_call(case: Any) -> HttpCall:
        headers = {"content-type": case.media_type or "", "authorization": f"Bearer {API_KEY}", **(case.headers or {})}
        body = b"" if isinstance(case.body, NotSet) else case.body
        if not isinstance(body, bytes):
            body = json.dumps(body, default=str).encode()
        return HttpCall(case.method, case.formatted_path, tuple(headers.items()), (body,))

    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    strategies = [
        operation.as_strategy(generation_mode=mode)
        for operation in operations
        if operation.body
        for mode in schemathesis.GenerationMode
    ]
    return st.one_of([strategy.map(as_call) for strategy in strategies])


def check_answer(call: HttpCall, answer: Answer, document: dict[str, Any]) -> None:
    """An answer is right, or a refusal that names what is wrong; the OpenAPI document knows its status."""
    assert answer.status < 500, answer
    assert answer.headers["x-request-id"]
    path = call.path.partition("?")[0]
    operation = document["paths"].get(path, {}).get(call.method.lower())
    if operation and answer.status != 405:
        assert str(answer.status) in operation["responses"], f"{answer.status} is not in the document"
    if answer.status >= 400:
        if call.method != "HEAD":
            _check_refusal(call, answer)
    elif answer.headers.get("content-type", "").startswith("text/event-stream"):
        _check_events(path, answer.body)
    elif operation:
        _strict_json(answer.body)


def _check_refusal(call: HttpCall, answer: Answer) -> None:
    told = _strict_json(answer.body)
    error = told.get("error", told)
    message = error["message"]
    assert 0 < len(message) <= MAX_MESSAGE
    message.encode()
    if "error" in told:
        assert set(error) == {"message", "type", "param", "code"}
    if answer.status in (400, 413, 417):
        assert "; allowed: " in message, message
    if answer.status == 400:
        param = error["param"]
        if param is None:
            assert message.startswith(("the body ", "the header ", "the request asks for ")), message
        else:
            names = (*json.loads(call.body), *CompletionRequest.model_fields, *ChatCompletionRequest.model_fields)
            assert any(param.startswith(name[:100]) for name in names), error
            assert not re.search(r"\b(dict|list|tagged-union)\[", param), "pydantic's own words"


def _check_events(path: str, body: bytes) -> None:
    events = body.decode().split("\n\n")
    assert events.pop() == ""
    if path.startswith("/v1/"):
        assert events.pop() == "data: [DONE]"
    for event in events:
        assert event.startswith("data:")
        assert "\n" not in event
        assert isinstance(_strict_json(event.removeprefix("data:").encode()), dict)


def _strict_json(data: bytes) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(data.decode(), parse_constant=refuse)
