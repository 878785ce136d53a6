# SPDX-License-Identifier: Apache-2.0
"""Chat templates: where they come from, and that they render as transformers renders them."""

from __future__ import annotations

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from client.chat import ChatTemplate, ChatTemplateError, default_model_dir

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
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def model_dir(path, **files):
    """A model's directory with JSON (dicts) and text files; `__` in a name stands for the dot."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("source", [CHATML, LLAMA])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_template_renders_as_in_transformers(source, messages, add_generation_prompt):
    expected, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=add_generation_prompt, **TOKENS
    )
    assert ChatTemplate(source, TOKENS).render(messages, add_generation_prompt) == expected[0]


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


def test_of_several_templates_the_default_is_taken(tmp_path):
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert ChatTemplate.load(model_dir(tmp_path, tokenizer_config__json={"chat_template": templates})).render([]) == (
        "plain"
    )


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
        ({"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "x"}]}}, "has no chat template"),
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


def test_the_default_directory_follows_the_cache_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTLLM_CACHE", str(tmp_path))
    assert default_model_dir() == tmp_path / "SmolLM2-135M-Instruct"
    monkeypatch.setenv("LIGHTLLM_CACHE", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(default_model_dir()) == "/home/someone/.cache/lightllm/SmolLM2-135M-Instruct"
