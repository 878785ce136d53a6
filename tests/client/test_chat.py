# SPDX-License-Identifier: Apache-2.0
"""Chat templates: where they come from, and that they render as transformers renders them."""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lightllm_backend.launch.embedded_model import FILES, embedded_model_directory
from lightllm_client import template_sandbox
from lightllm_client.chat import ChatTemplate, ChatTemplateError, default_model_dir

CHATML = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
    {%- endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('role ' + message.role + ' is not known') }}
    {%- endif %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- generation %}{{- '[INST] ' + message.content | trim + ' [/INST]' }}{% endgeneration %}
{%- endfor %}
{{- {'a': '<é>', 'b': [1]} | tojson }} {{ {'a': 1} | tojson(indent=2) }}
{{ strftime_now('%Y') | length }}{{ eos_token }}
"""
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What's <this> & 尾? "}]
DATA = Path(__file__).parents[1] / "data"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def model_dir(path, **files):
    """A model's directory with JSON (dicts) and text files; `__` in a name stands for the dot."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


class Number(IntEnum):
    ONE = 1


WHAT_IS_GIVEN = """\
{%- if tools is not none %}T{{ tools | tojson(indent=1) }}{% endif %}
{%- if documents is not none %}D{{ documents }}{% endif %}
{{- tools is defined }}{{ documents is defined }}{{ thinking is defined and thinking }}{{ add_generation_prompt }}
{%- for message in messages %}
    {%- if message.content is defined %}{{ message.content }}{% endif %}
    {{- message | tojson(True, 2, (',', ':'), True) }}
    {%- if loop.index > 2 %}{% break %}{% endif %}
{%- endfor %}
{%- set n = namespace(x=1) %}{% set y = 1 %}
{%- generation %}{% set n.x = 2 %}{% set y = 2 %}{{ y }}{% endgeneration %}{{ n.x }}{{ y }}
{{- dict(a=1) }}{{ range(2) | list }}{{ strftime_now('%Z') }}
"""
RICH = [
    {"role": "user", "content": None, "tool_calls": None},
    {"role": "assistant", "content": "<é>", "reasoning": "why"},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}],
        "thinking": "because",
        "n": Number.ONE,
        "t": (1, 2),
    },
    {"role": "user", "content": b"bytes", "m": MappingProxyType({"k": [1.5, True]})},
]


def expected_of(source, messages, **options):
    """The same by transformers 5.23 itself."""
    without_none = [{key: value for key, value in message.items() if value is not None} for message in messages]
    expected, _ = render_jinja_template([without_none], chat_template=source, **{**TOKENS, **options})
    return expected[0]


@pytest.mark.parametrize("source", [CHATML, LLAMA, WHAT_IS_GIVEN])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_template_renders_as_in_transformers(source, messages, add_generation_prompt):
    expected = expected_of(source, messages, add_generation_prompt=add_generation_prompt)
    assert ChatTemplate(source, TOKENS).render(messages, add_generation_prompt) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [], "documents": []},
        {"tools": [TOOL], "documents": [{"title": "T", "text": "x"}]},
        {"thinking": True, "bos_token": "other"},
    ],
)
def test_a_template_sees_what_transformers_gives_it(options):
    expected = expected_of(WHAT_IS_GIVEN, RICH, add_generation_prompt=True, **options)
    assert ChatTemplate(WHAT_IS_GIVEN, TOKENS).render(RICH, **options) == expected
    assert expected.startswith("TrueTrue") == (options.get("tools") is None)


TRIMMING = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
PARTS = "{% for m in messages %}[{% for p in m.content %}{{ p.text }}{% endfor %}]{% endfor %}"
THINKING = "{% for m in messages %}({{ m.reasoning_content }})[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize(
    ("source", "final", "field"),
    [
        (CHATML, {"content": "The answer is "}, True),
        (CHATML, {"content": "The answer is"}, "content"),
        (TRIMMING, {"content": "The answer is "}, True),
        (TRIMMING, {"content": "The answer is"}, True),
        (PARTS, {"content": [{"text": "The"}, {"text": " answer "}, {"image": 1}]}, True),
        (THINKING, {"content": "x", "thinking": "Let me "}, "thinking"),
        (THINKING, {"content": "x", "reasoning": "Let me "}, "reasoning"),
    ],
)
def test_a_final_message_is_continued_as_in_transformers(source, final, field):
    messages = [
        {"role": "user", "content": [{"text": "hi"}] if source is PARTS else "hi"},
        {"role": "assistant", **final},
    ]
    expected = expected_of(source, messages, continue_final_message=field)
    assert ChatTemplate(source, TOKENS).render(messages, continue_final_message=field) == expected
    assert messages[1] == {"role": "assistant", **final}


@pytest.mark.parametrize(
    ("source", "messages", "options", "message"),
    [
        (CHATML, MESSAGES, {"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        (CHATML, [], {"continue_final_message": True}, "no final message with 'content'"),
        (CHATML, MESSAGES, {"continue_final_message": "thinking"}, "no final message with 'thinking'"),
        (
            CHATML,
            [{"role": "user", "content": "x", "prefix": "z"}],
            {"continue_final_message": "prefix"},
            "does not know",
        ),
        ("content", MESSAGES, {"continue_final_message": True}, "leaves the final message out"),
        (
            "{{ messages[0].content | upper }}",
            MESSAGES[1:],
            {"continue_final_message": True},
            "leaves the final message",
        ),
        (PARTS, [{"role": "user", "content": [{}]}], {"continue_final_message": True}, "has no text"),
        (CHATML, [{"role": "user", "content": False}], {"continue_final_message": True}, "has no text"),
        (CHATML, [{"role": "user", "content": ["x", {"text": 1}]}], {"continue_final_message": True}, "has no text"),
        (CHATML, MESSAGES, {"tools": [print]}, "tools must be a list of JSON objects"),
        (CHATML, MESSAGES, {"documents": ["x"]}, "documents must be a list of JSON objects"),
    ],
)
def test_what_cannot_be_rendered_is_an_error(source, messages, options, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source, TOKENS).render(messages, **options)


def test_the_template_and_tokens_come_from_the_tokenizers_configuration(tmp_path):
    config = {"chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token is defined }}"}
    config |= {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    template = ChatTemplate.load(model_dir(tmp_path, tokenizer_config__json=config))
    assert template.render([{"role": "user", "content": "hi"}]) == "<s>hi</s>False"


def test_a_template_file_wins_over_the_configuration(tmp_path):
    directory = model_dir(
        tmp_path, tokenizer_config__json={"chat_template": "old", **TOKENS}, chat_template__jinja="new {{ eos_token }}"
    )
    assert ChatTemplate.load(directory).render([]) == "new </s>"


def theirs(directory):
    """What transformers 5.23 makes of a directory's templates."""
    (directory / "tokenizer.json").write_bytes((DATA / "byte_level/tokenizer.json").read_bytes())
    config = directory / "tokenizer_config.json"
    old = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **old}))
    return AutoTokenizer.from_pretrained(directory)


SEVERAL = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


@pytest.mark.parametrize("tools", [None, [], [TOOL]])
@pytest.mark.parametrize("name", [None, "default", "tool_use"])
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": {"chat_template": SEVERAL}},
        {"tokenizer_config__json": {"chat_template": "one {{ tools }}"}},
        {"chat_template__jinja": "plain", "tool_use__jinja": "tools"},
        {"tokenizer_config__json": {"chat_template": "old"}, "chat_template__jinja": "plain"},
    ],
)
def test_of_several_templates_the_one_of_transformers_is_taken(tmp_path, files, tools, name):
    directory = model_dir(tmp_path, **files)
    if (directory / "tool_use.jinja").exists():
        (directory / "additional_chat_templates").mkdir()
        (directory / "tool_use.jinja").rename(directory / "additional_chat_templates/tool_use.jinja")
    library, ours = theirs(directory), ChatTemplate.load(directory)
    if name == "tool_use" and not isinstance(library.chat_template, dict):
        with pytest.raises(ChatTemplateError, match="there is no chat template 'tool_use'; there are: default"):
            ours.render(MESSAGES, tools=tools, chat_template=name)
        return
    named = name if isinstance(library.chat_template, dict) else None
    expected = library.apply_chat_template(MESSAGES, tools=tools, chat_template=named, tokenize=False)
    assert ours.render(MESSAGES, tools=tools, chat_template=name) == expected


def test_a_template_that_is_no_default_has_to_be_named(tmp_path):
    config = {"chat_template": [{"name": "rag", "template": "x"}]}
    template = ChatTemplate.load(model_dir(tmp_path, tokenizer_config__json=config))
    with pytest.raises(ChatTemplateError, match="there is no chat template 'default'; there are: rag"):
        template.render(MESSAGES)
    assert template.render(MESSAGES, chat_template="rag") == "x"


def test_a_processor_s_older_file_is_read_if_there_is_no_other(tmp_path):
    directory = model_dir(tmp_path, chat_template__json={"chat_template": "processor"})
    assert ChatTemplate.load(directory).render(MESSAGES) == "processor"


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map__json": {"bos_token": "<map>", "eos_token": {"content": "</map>"}}},
        {"special_tokens_map__json": {"bos_token": "<map>"}, "tokenizer_config__json": {"bos_token": "<s>"}},
        {
            "special_tokens_map__json": {"bos_token": "<map>"},
            "tokenizer_config__json": {"bos_token": "<s>", "added_tokens_decoder": {}},
        },
        {"tokenizer_config__json": {"image_token": "<image>", "extra_special_tokens": {"boi_token": "<boi>"}}},
        {"tokenizer_config__json": {"pad_token": None, "additional_special_tokens": ["<x>"], "add_bos_token": True}},
    ],
)
def test_special_tokens_are_those_that_transformers_gives(tmp_path, files):
    source = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ boi_token }}|{{ pad_token is defined }}"
    files["tokenizer_config__json"] = {**files.get("tokenizer_config__json", {}), "chat_template": source}
    directory = model_dir(tmp_path, **files)
    ours = ChatTemplate.load(directory)
    assert ours.render(MESSAGES) == theirs(directory).apply_chat_template(MESSAGES, tokenize=False)


POST_PROCESSOR = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer__json": {"post_processor": POST_PROCESSOR}}, "hi <s>"),
        ({"tokenizer__json": {"post_processor": {"type": "ByteLevel"}}}, "<s>hi <s>"),
        ({"tokenizer__json": {"post_processor": None}}, "<s>hi <s>"),
        ({"tokenizer__model": "sentencepiece"}, "hi <s>"),
        ({}, "<s>hi <s>"),
    ],
)
def test_the_beginning_of_sequence_is_left_to_a_tokenizer_that_adds_it(tmp_path, files, expected):
    config = {"chat_template": "{{ bos_token }}hi {{ bos_token }}", **TOKENS}
    assert ChatTemplate.load(model_dir(tmp_path, tokenizer_config__json=config, **files)).render([]) == expected


def test_the_configuration_says_whether_a_sentencepiece_model_adds_it(tmp_path):
    config = {"chat_template": "{{ bos_token }}hi", "add_bos_token": False, **TOKENS}
    directory = model_dir(tmp_path, tokenizer_config__json=config, tokenizer__model="sentencepiece")
    assert ChatTemplate.load(directory).render([]) == "<s>hi"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no chat template"),
        ({"tokenizer_config__json": {}}, "neither chat_template.jinja nor chat_template in tokenizer_config.json"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "rag"}]}}, "has no chat template"),
        ({"chat_template__json": {}}, "has no chat template"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json cannot be read"),
        ({"tokenizer_config__json": "[]"}, "tokenizer_config.json is not a JSON object"),
        ({"chat_template__jinja": "{% for %}"}, "the chat template is not valid"),
    ],
)
def test_a_directory_without_a_usable_template_is_an_error(tmp_path, files, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate.load(model_dir(tmp_path, **files))


def test_a_missing_directory_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ChatTemplateError, match="nowhere does not exist"):
        ChatTemplate.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LLAMA, "role tool is not known"),
        ("{{ messages.append(1) }}", "the chat template failed"),
        ("{{ ''.__class__.__mro__ }}", "the chat template failed"),
        ("{{ messages[0].content + 1 }}", "the chat template failed"),
    ],
)
def test_a_template_that_refuses_or_breaks_out_is_an_error(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source, TOKENS).render([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("cache", ["cache", ""])
def test_the_default_directory_is_the_servers(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIGHTLLM_CACHE", cache and str(tmp_path / cache))
    directory = default_model_dir()
    directory.mkdir(parents=True)
    for name in FILES:
        (directory / name).touch()
    assert embedded_model_directory("no-python-to-make-it-with") == directory


@pytest.mark.parametrize("source", ["{% break %}", "{{ x", "{% include", "{{ " + "(" * 9999 + ")" * 9999 + " }}"])
def test_a_template_that_cannot_be_compiled_is_refused(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template is not valid: "):
        ChatTemplate(source, {})


# Each is harmless at the size that the test's limits allow, and ends by them.
WITHOUT_END = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(64) }}",
    "calls": "{% for a in range(9999) %}{{ range(9999) | list | length }}{% endfor %}",
}
TOO_LARGE = {
    "output": "{% for a in range(99) %}{{ messages[0].content }}0123456789{% endfor %}",
    "times": "{{ 'ab' * 501 }}",
    "times from the left": "{{ 501 * [0, 1] }}",
    "plus": "{% set n = namespace(x='ab') %}{% for a in range(10) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joined": "{% set n = namespace(x='ab') %}{% for a in range(10) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a filter": "{{ 'a' | center(1001) }}",
    "a method": "{{ 'a'.ljust(1001) }}",
    "a format": "{{ '%1001d' % 1 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "captured": "{% set x %}{% for a in range(1001) %}a{% endfor %}{% endset %}{{ x | upper | length }}",
}


@pytest.mark.parametrize("source", WITHOUT_END.values(), ids=WITHOUT_END)
def test_a_template_ends_in_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.1)
    with pytest.raises(ChatTemplateError, match=r"the chat template failed: it takes more than 0.1 s"):
        ChatTemplate(source, {}).render(MESSAGES)


@pytest.mark.parametrize("source", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_template_makes_nothing_too_large(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SIZE", 1000)
    with pytest.raises(ChatTemplateError, match=r"it makes something of size \d+; allowed: at most"):
        ChatTemplate(source, {}).render(MESSAGES)


@pytest.mark.parametrize("expression", ["''.__class__.__mro__", "messages.append(1)", "cycler.__init__.__globals__"])
def test_a_template_cannot_leave_the_sandbox(expression: str) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template failed: .*unsafe|not safely callable"):
        ChatTemplate(f"{{{{ {expression} }}}}", {}).render(MESSAGES)
