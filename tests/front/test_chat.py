# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions over a pretended engine."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import pytest

from lightllm_backend.front.openai.chat import LONG_BODY
from lightllm_backend.front.state import Front
from lightllm_client import InvalidArgument
from lightllm_client.chat import ChatTemplate
from tests.front.pretended import Caller, PretendedClient, chunk

PATH = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def test_the_whole_answer(call: Caller, client: PretendedClient) -> None:
    answer = call.post(PATH, {**HELLO, "model": "tiny"}).json()
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "Hello", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert client.calls == [("<user>Hi\n<assistant>", {"max_tokens": -1, "temperature": 1.0})]


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(call: Caller) -> None:
    events = call.events(PATH, HELLO)
    assert [(event["choices"][0]["delta"], event["choices"][0]["finish_reason"]) for event in events] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hel"}, None),
        ({"content": "lo"}, None),
        ({}, "stop"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_the_prompt_is_so_with_the_messages(
    call: Caller, client: PretendedClient, stream: bool
) -> None:
    client.items = [InvalidArgument("the prompt has 9 tokens; allowed: at most 8 prompt tokens (x)")]
    response = call.post(PATH, {**HELLO, "stream": stream})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_what_the_template_gets(call: Caller, client: PretendedClient) -> None:
    def prompt(*messages: dict[str, Any], **fields: Any) -> str:
        response = call.post(PATH, {"messages": list(messages), **fields})
        assert response.status_code == 200, response.text
        text: str = client.calls[-1][0]
        return text

    user = {"role": "user", "content": "Hi"}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    function = {"name": "f", "arguments": '{"x": 7}'}
    calls = [{"id": "1", "type": "function", "function": function}, {"function": {"name": "g"}}]
    called = {"role": "assistant", "tool_calls": calls}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert prompt(parts) == "<user>a\nb\n<assistant>"
    for content in ({"content": ""}, {"content": None}, {}):
        assert prompt(user, called | content) == "<user>Hi\n<assistant>7\n<assistant>"
    assert prompt(user, tools=[tool]) == "<user>Hi\ntools=1\n<assistant>"
    assert prompt(user, tools=[tool], tool_choice="none") == "<user>Hi\n<assistant>"
    assert prompt(user, chat_template_kwargs={"extra": "e"}) == "<user>Hi\ne<assistant>"
    assert prompt(user, add_generation_prompt=False) == "<user>Hi\n"
    continued = prompt(user, {"role": "assistant", "content": "So"}, continue_final_message=True)
    assert continued == "<user>Hi\n<assistant>So"


@pytest.mark.parametrize("written", ['{"x": ', "[]", "[" * 100_000, "warm"])
def test_a_call_that_went_wrong_may_come_back(front: Front, client: PretendedClient, written: str) -> None:
    template = "{% for c in messages[0].tool_calls %}{{ c.function.arguments }}{% endfor %}"
    caller = Caller(replace(front, chat_template=ChatTemplate(template, {})))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": written}}
    complaint = {"role": "tool", "tool_call_id": "1", "content": "no JSON object"}
    response = caller.post(PATH, {"messages": [{"role": "assistant", "tool_calls": [call]}, complaint]})
    assert response.status_code == 200
    assert client.calls[-1][0] == written


@pytest.mark.parametrize("field", ["reasoning_effort", "verbosity"])
def test_hints_are_variables_of_the_template(client: PretendedClient, front: Front, field: str) -> None:
    caller = Caller(replace(front, chat_template=ChatTemplate(f"{{{{ {field} }}}}", {})))
    for given, prompt in ((None, ""), ("low", "low")):
        assert caller.post(PATH, {**HELLO, field: given}).status_code == 200
        assert client.calls[-1][0] == prompt


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("{{ messages[0].role }}", "system"),
        ("{# for developers #}{{ messages[0].role }}", "system"),
        ("{% if messages[0].role == 'developer' %}{{ messages[0].role }}{% endif %}", "developer"),
        ('{% if messages[0]["role"] in ["system", "developer"] %}{{ messages[0].role }}{% endif %}', "developer"),
    ],
)
def test_developer_is_system_to_templates_that_do_not_know_it(
    client: PretendedClient, front: Front, template: str, role: str
) -> None:
    caller = Caller(replace(front, chat_template=ChatTemplate(template, {})))
    message = {"role": "developer", "content": "Be brief."}
    assert caller.post(PATH, {"messages": [message, *HELLO["messages"]]}).status_code == 200
    assert client.calls[-1][0] == role


# What templates of models that think, like Qwen3's, do: they drop the thoughts of earlier answers, and leave the model
# no room for new ones if the request says so.
THINKS = (
    "{%- for m in messages -%}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content -%}"
    "{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{%- endif -%}"
)


@pytest.mark.parametrize(
    ("kwargs", "ending", "text", "content", "reasoning"),
    [
        ({}, "", "<think>\nSo.\n</think>\n\nYes.", "Yes.", "So."),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n", "Yes.", "Yes.", None),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n", "\nYes, <think>", "\nYes, <think>", None),
    ],
)
def test_a_model_thinks_unless_the_request_says_no(
    front: Front, client: PretendedClient, kwargs: dict[str, Any], ending: str, text: str, content: str, reasoning: str
) -> None:
    client.items = [chunk(piece, 65) for piece in (text[:3], text[3:])] + [chunk("", 66, finish_reason="stop")]
    caller = Caller(replace(front, chat_template=ChatTemplate(THINKS, {})))
    before = {"role": "assistant", "content": "<think>Who?</think>\n\nHello"}
    messages = [{"role": "user", "content": "Hi"}, before, {"role": "user", "content": "Well?"}]
    answer = caller.post(PATH, {"messages": messages, "chat_template_kwargs": kwargs}).json()
    turns = "".join(
        f"<|im_start|>{role}\n{said}<|im_end|>\n"
        for role, said in (("user", "Hi"), ("assistant", "Hello"), ("user", "Well?"))
    )
    assert client.calls[-1][0] == f"{turns}<|im_start|>assistant\n{ending}"
    message = answer["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content")) == (content, reasoning)


def test_max_completion_tokens_goes_before_max_tokens(call: Caller, client: PretendedClient) -> None:
    call.post(PATH, {**HELLO, "max_tokens": 3, "max_completion_tokens": 4})
    assert client.calls[0][1]["max_tokens"] == 4


def test_log_probabilities(call: Caller, client: PretendedClient) -> None:
    client.items = [chunk("a", 65, finish_reason="stop", log_probs=(-0.5,))]
    [choice] = call.post(PATH, {**HELLO, "logprobs": True}).json()["choices"]
    [entry] = choice["logprobs"]["content"]
    assert (entry["logprob"], entry["top_logprobs"]) == (-0.5, [])
    assert bytes(entry["bytes"]).decode() == entry["token"]
    assert call.refusal(PATH, {**HELLO, "top_logprobs": 2})["param"] == "top_logprobs"
    client.items = [replace(client.items[0], top_log_probs=({66: -0.25, 65: -0.5},))]
    [choice] = call.post(PATH, {**HELLO, "logprobs": True, "top_logprobs": 2}).json()["choices"]
    [entry] = choice["logprobs"]["content"]
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.25, -0.5]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
THINKING = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}{# <tool_call> </think> #}"
CALL = '<tool_call>{"name": "f", "arguments": {"x": 7}}</tool_call>'


@pytest.fixture
def thinking(front: Front, client: PretendedClient) -> Caller:
    """A model that thinks, then says something, then calls a function."""
    text = f"<think>So.</think>Yes.\n{CALL}"
    client.items = [chunk(piece, 65) for piece in (text[:9], text[9:30], text[30:])]
    client.items.append(chunk("", 66, finish_reason="stop"))
    return Caller(replace(front, chat_template=ChatTemplate(THINKING, {})))


def test_reasoning_and_tool_calls_of_the_whole_answer(thinking: Caller) -> None:
    [choice] = thinking.post(PATH, {**HELLO, "tools": [TOOL]}).json()["choices"]
    [called] = choice["message"].pop("tool_calls")
    assert choice["message"] == {
        "role": "assistant", "content": "Yes.", "refusal": None, "reasoning_content": "So.",
    }  # fmt: skip
    assert called == {"id": called["id"], "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    assert choice["finish_reason"] == "tool_calls"
    [choice] = thinking.post(PATH, {**HELLO, "include_reasoning": False}).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": f"Yes.\n{CALL}", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_reasoning_and_tool_calls_of_a_stream(thinking: Caller) -> None:
    choices = [event["choices"][0] for event in thinking.events(PATH, {**HELLO, "tools": [TOOL]})]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "So."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    head, *rest = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert (head["index"], head["type"], head["function"]) == (0, "function", {"name": "f", "arguments": ""})
    assert head["id"].startswith("call_")
    assert "".join(call["function"]["arguments"] for call in rest) == '{"x": 7}'
    assert (deltas[-1], choices[-1]["finish_reason"]) == ({}, "tool_calls")


def test_log_probabilities_of_text_that_is_held_back(thinking: Caller, client: PretendedClient) -> None:
    client.items = [chunk("<tool", 65, log_probs=(-0.5,)), chunk("!", 66, finish_reason="stop", log_probs=(-0.25,))]
    choices = [event["choices"][0] for event in thinking.events(PATH, {**HELLO, "tools": [TOOL], "logprobs": True})]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [entry["logprob"] for entry in entries] == [-0.5, -0.25]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "<tool!"


def test_a_forced_call_constrains_the_answer(thinking: Caller, client: PretendedClient) -> None:
    client.items = [chunk('{"name": "f", "parameters": {}}', 65, finish_reason="stop")]
    named = {"type": "function", "function": {"name": "f"}}
    [choice] = thinking.post(PATH, {**HELLO, "tools": [TOOL], "tool_choice": named}).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    schema = json.loads(client.calls[0][1]["structured_output"])["json_schema"]
    assert schema["properties"]["name"] == {"const": "f"}
    both = {**HELLO, "tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}
    assert thinking.refusal(PATH, both)["param"] == "tool_choice"
    client.items = [InvalidArgument("structured_output cannot be followed: json_schema at /properties/a: no")]
    assert thinking.refusal(PATH, {**HELLO, "tools": [TOOL], "tool_choice": named})["param"] == "tools"


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    ("changed", "param", "words"),
    [
        ({"messages": []}, "messages", "is []; allowed: at least 1 item"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content", "a string, or a list of parts"),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "is missing"),
        ({"messages": [IMAGE]}, "messages.0.content", "parts of type text only, not image_url"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"tool_choice": "maybe"}, "tool_choice", "none, auto, required, or"),
        ({"tool_choice": "required"}, "tool_choice", "since tools is empty"),
        ({"tools": [TOOL, TOOL]}, "tools", "functions with different names"),
        ({"chat_template": "other"}, "chat_template", '"other"; allowed: the name of one of the model\'s: default'),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "allowed: false"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "variables of the template"),
        ({"functions": []}, "functions", "null (use tools)"),
        ({"max_tokens": 0}, "max_tokens", "a whole number from 1 to 2147483647"),
        ({"stream": False, "stream_options": {}}, "stream_options", "is {}; allowed: null, unless stream is true"),
    ],
)
def test_refusals(call: Caller, changed: dict[str, Any], param: str, words: str) -> None:
    error = call.refusal(PATH, {**HELLO, **changed})
    assert error["param"] == param
    assert words in error["message"]


def test_a_template_without_tools(front: Front) -> None:
    caller = Caller(replace(front, chat_template=ChatTemplate("{{ messages }}", {})))
    error = caller.refusal(PATH, {**HELLO, "tools": [TOOL]})
    assert (error["param"], "no place for tools" in error["message"]) == ("tools", True)
    caller = Caller(replace(front, chat_template=ChatTemplate("{{ raise_exception('no') }}", {})))
    assert "failed: no; allowed: messages that the model's" in caller.refusal(PATH, HELLO)["message"]


def test_a_long_conversation_becomes_a_prompt_on_another_thread(front: Front, client: PretendedClient) -> None:
    class Template(ChatTemplate):
        def render(self, *_: Any, **__: Any) -> str:
            return "main" if threading.current_thread() is threading.main_thread() else "another"

    caller = Caller(replace(front, chat_template=Template("", {})))
    for text, thread in (("a", "main"), ("a" * LONG_BODY, "another")):
        caller.post(PATH, {"messages": [{"role": "user", "content": text}]})
        assert client.calls[-1][0] == thread


def test_a_model_without_a_chat_template(front: Front) -> None:
    error = Caller(replace(front, chat_template=None, no_chat_template="no file")).refusal(PATH, HELLO)
    assert error["message"].endswith("; allowed: /v1/completions, since the model has no chat template (no file)")
